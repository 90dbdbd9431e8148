"""Files of a run of the trainer: settings, states, results, log, and files that are made from them."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import torch

from qatkernels import files
from qatkernels.nn import QuantConfig
from qatkernels.trainer import (  # fmt: skip
    CheckpointError,
    ConfigError,
    TrainConfig,
    checkpoints,
    data,
    display,
    generate,
    loop,
    models,
    report,
    resumed,
    saving,
    spectra,
    state,
    train,
)
from qatkernels.trainer.parallel import Processes
from qatkernels.trainer.phases import phases
from qatkernels.trainer.signals import Stop

from . import mutate, tiny
from .runner import Wrong
from .target import TENSORS, Target, bits_of, decoded, difference, is_resealed


class Run(Target):
    """A finished run of `train`, one file of which is changed."""

    changes: dict[str, Any] = {}  # noqa: RUF012

    def make(self) -> None:
        """Train."""
        given = {**tiny.SETTINGS, "data": str(tiny.text(self.folder)), "out": str(self.folder / "run"), **self.changes}
        self.config = TrainConfig(**given).resolved()
        train(self.config, say=lambda line: None)
        self.out = Path(self.config.out)

    def open(self, group: Processes | None = None) -> state.Run:
        """Return the training state of a phase."""
        self.said: list[str] = []
        self.corpus = data.load(self.config.data, self.config.shape.context)
        shown = display.TrainingDisplay(1, self.said.append).__enter__()
        log = report.Log(self.out / "log.jsonl")
        return state.Run(self.config, self.corpus, log, shown, Stop().__enter__(), group or Processes())


class Packed(Run):
    """A packed file, as `generate` loads it."""

    ways = TENSORS

    def make(self) -> None:
        """Train and pack."""
        super().make()
        self.file = self.folder / "packed.safetensors"
        generate.pack(self.out / "w2", self.file)

    def read(self, case: int) -> Any:
        """Return the model's tensors and its outputs."""
        model, _ = generate.load(self.file)
        logits = model(torch.tensor([[1, 2, 3, 250]])[:, : model.config.context])  # a forged header may say 1
        return {**bits_of(model.state_dict()), "logits": bits_of({"": logits})[""]}

    def right(self, content: bytes, found: Any) -> str | None:
        """A forged header may describe another model, but its tensors must be those of the file."""
        if not is_resealed(content, self.original):
            return super().right(content, found)
        for name, bits in bits_of(decoded(content)).items():
            if found.get(name) != bits:
                raise Wrong(f"{name} is not the file's")
        return None


class State(Run):
    """A state of a phase of WinQ that is resumed."""

    ways = TENSORS
    changes = {"method": "winq", "reset_every": 2, "stats_every": 1}  # noqa: RUF012
    sharded = False

    def make(self) -> None:
        """Train, then train again up to a state in the middle of the quantized phase."""
        super().make()
        (self.out / "w2" / "phase.json").unlink()
        self.phase = phases(self.config)[1]
        run = self.open()
        training = loop.begin(run, self.phase)
        progress = state.Progress(first=self.phase.first)
        for step in range(4):
            loop.take_step(training, step)
            progress.step += 1
            training.method.log()
        progress.seconds, progress.start, progress.held_out = 0.5, 7.5, 7.25
        saving.save(training, progress, 2)
        (self.file,) = (self.out / "w2").glob("state-*.safetensors")

    def prepare(self) -> None:
        """Resume from the original state, and start without one."""
        self.training = loop.begin(self.open(), self.phase)
        self.initial = {name: t.clone() for name, t in self.training.model.state_dict().items()}
        self.wanted = self.read(0)
        self.file.unlink()
        self.fresh = self.read(0)
        if self.wanted == self.fresh or self.wanted["step"] != 4:
            raise Wrong("the state is not taken up")

    def read(self, case: int) -> Any:
        """Start the phase, and return everything that a state restores."""
        self.said.clear()
        training, stats = self.training, self.training.method.stats
        training.model.load_state_dict(self.initial)
        training.optimizer.state.clear()
        training.method.load_state_dict({"steps": 0, "resets": 0})
        stats.load_state_dict({})
        progress = saving.resume(training)
        return {
            **vars(progress), **bits_of(checkpoints.snapshot(training.model, training.optimizer)),
            **bits_of({f"codes.{k}": v for k, v in stats.state_dict().items()}),
            "method now": training.method.state_dict(),
        }  # fmt: skip

    def right(self, content: bytes, found: Any) -> str | None:
        """A damaged state is named, and the phase starts over; otherwise the state is restored."""
        if any(f"{self.file} is damaged" in line for line in self.said):
            if found != self.fresh:
                raise Wrong(f"a damaged state left its mark: {difference(found, self.fresh)}")
            return "refused"
        if is_resealed(content, self.original):
            first = json.loads(mutate.split_safetensors(content)[0]["__metadata__"]["header"]).get("first", 6)
            tensors = {f"codes.{k[6:]}" if k[:6] == "codes." else k: v for k, v in bits_of(decoded(content)).items()}
            if first != 6:  # a state of another plan is not used, which is right
                return None
            for name, bits in tensors.items():
                if found.get(name) != bits:
                    raise Wrong(f"{name} is not the file's")
            if not 0 <= found["step"] <= self.phase.steps:
                raise Wrong(f"a state is at step {found['step']} of {self.phase.steps}")
        else:
            super().right(content, found)
        return None


class Sharded(Target):
    """One of the files of a sharded FSDP2 state, including the file of its progress."""

    #: Messages between processes.
    may_unpickle = ("torch.distributed.distributed_c10d",)
    ways = (mutate.mutated_bytes,)

    def make(self) -> None:
        """Write a state with a single process."""
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        from qatkernels import quantize_model

        if not dist.is_initialized():
            store = dist.HashStore()
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        self.group = Processes("fsdp")
        torch.manual_seed(0)
        self.model = quantize_model(torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 4)), QuantConfig(4))
        fully_shard(self.model, mesh=init_device_mesh("cpu", (1,)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.model(torch.ones(2, 16)).sum().backward()
        self.optimizer.step()
        header = {"first": 3, "step": 4, "seconds": 0.5, "start": 2.0, "held_out": 1.5, "method": {}}
        checkpoints.save(self.folder, 4, self.model, self.optimizer, header, 2, self.group)
        (self.state,) = self.folder.glob("state-*")
        self.contents = {path: path.read_bytes() for path in sorted(self.state.iterdir())}
        self.file = self.state / "state.json"
        self.ways = (self.any_file, mutate.mutated_json)

    def prepare(self) -> None:
        """An error may name the file or its folder."""
        self.names = (str(self.state),)
        self.wanted = self.read(0)

    def any_file(self, content: bytes, draw: random.Random) -> bytes:
        """Restore all files, then change this one in half of the cases, and a file with tensors in the others."""
        for path, whole in self.contents.items():
            path.write_bytes(whole)
        if draw.random() < 0.5:
            return mutate.mutated_bytes(content, draw)
        path = draw.choice([path for path in self.contents if path != self.file])
        way = draw.choice((mutate.mutated_bytes, mutate.crafted_header))
        path.write_bytes(way(self.contents[path], draw))
        return content

    def read(self, case: int) -> Any:
        """Load the state into a new model and optimizer, and return the restored values."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.zero_()
        header = checkpoints.restore(self.state, self.model, self.optimizer, self.group)
        for path, whole in self.contents.items():
            path.write_bytes(whole)
        tensors = {k: v.to_local() if hasattr(v, "to_local") else v
                   for k, v in checkpoints.snapshot(self.model, self.optimizer).items()}  # fmt: skip
        return {**header, **bits_of(tensors)}

    def right(self, content: bytes, found: Any) -> str | None:
        """A header without a digest, as earlier versions wrote, must be read as it is."""
        try:
            stored = json.loads(content)
        except (ValueError, RecursionError):
            stored = {}
        wanted = self.wanted
        if "digest" not in stored and isinstance(stored.get("header"), dict):
            tensors = {name: bits for name, bits in self.wanted.items() if "." in name}
            wanted = {**tensors, **stored["header"]}
        if found != wanted and found != self.wanted:
            raise Wrong(f"read as something else: {difference(found, self.wanted)}")


class Result(Run):
    """The ``phase.json`` of a finished phase, which `train` reads as a result and `pack` as a model."""

    ways = (mutate.mutated_bytes, mutate.mutated_json)

    def make(self) -> None:
        """Train."""
        super().make()
        self.file = self.out / "w2" / "phase.json"
        self.run, self.phase = self.open(), phases(self.config)[1]

    def read(self, case: int) -> Any:
        """Read the result, and load the model."""
        if case % 2:
            self.said.clear()
            return saving.finished_result(self.run, self.phase)
        trained = models.load_trained(self.out / "w2")
        return {**bits_of(trained.model.state_dict()), "described": json.dumps(trained.about)}

    def prepare(self) -> None:
        """Read the original result and model."""
        self.wanted, self.result = self.read(0), self.read(1)

    def right(self, content: bytes, found: Any) -> str | None:
        """None means that the phase is trained again; a line of output must say so."""
        if found is None and any(str(self.file) in line for line in self.said):
            return "refused"
        if found is None:
            raise Wrong("a phase is trained again without a word")
        wanted = self.wanted if "described" in found else self.result
        if found != wanted:
            raise Wrong(f"read as something else: {difference(found, wanted)}")
        return None


class Ritz(Run):
    """The file that `spectrum` keeps for a checkpoint."""

    ways = (mutate.mutated_bytes, mutate.mutated_json)

    def make(self) -> None:
        """Analyse a checkpoint."""
        super().make()
        self.analysis = spectra.SpectrumConfig(
            (str(self.out / "w2"),), str(self.folder / "spectrum"), probes=1, steps=3, windows=2, device="cpu"
        )
        spectra.run(self.analysis, say=lambda line: None)
        (self.file,) = (self.folder / "spectrum" / "ritz").iterdir()
        self.identity = files.read_json(self.file)["identity"]

    def read(self, case: int) -> Any:
        """Read the earlier result; None means that it is computed again."""
        return spectra.stored_entry(self.file, self.identity)

    def right(self, content: bytes, found: Any) -> str | None:
        """It is not used, or is the original, except for fields that are not read."""
        if found is not None:
            super().right(content, {name: value for name, value in found.items() if name in self.wanted})


class Configuration(Run):
    """``run.json``, which `--resume` and a repeated command read."""

    errors = (CheckpointError, ConfigError)
    ways = (mutate.mutated_bytes, mutate.mutated_json)

    def make(self) -> None:
        """Train."""
        super().make()
        self.file = self.out / "run.json"
        self.open()

    def prepare(self) -> None:
        """Errors name the option of a value out of range, or the folder."""
        self.names = (str(self.file), f"in {self.out} was started", "--")
        self.wanted = self.read(0)
        self.ours = self.config.settings()

    def read(self, case: int) -> Any:
        """Read the settings of the run, or compare ours with them."""
        if case % 2:
            saving.open_run(self.out, self.config, self.corpus)
            return self.config.settings()
        return resumed({"out": str(self.out)}).settings()

    def right(self, content: bytes, found: Any) -> str | None:
        """A file without a digest, as earlier versions wrote, must be read as it is."""
        stored = json.loads(content)
        wanted = dict(self.wanted)
        if "digest" not in stored:
            wanted |= {key: tuple(v) if key == "bits" else v for key, v in stored.items() if key in wanted}
            wanted["out"] = self.wanted["out"]
        if found != wanted and not (found == self.ours and "digest" not in stored):
            raise Wrong(f"read as something else: {difference(found, wanted)}")
        return None


class Log(Run):
    """``log.jsonl``. A resumed run keeps the entries before the step where it resumes."""

    ways = (mutate.mutated_bytes, mutate.mutated_lines)

    def make(self) -> None:
        """Train."""
        super().make()
        self.file = self.out / "log.jsonl"

    def read(self, case: int) -> Any:
        """Trim the log to a step of the second phase, and read it."""
        log = report.Log(self.file)
        log.trim("w2", 3)
        return log.entries()

    def right(self, content: bytes, found: Any) -> str | None:
        """The remaining entries are complete lines of the file."""
        lines = set()
        for line in re.split(rb"[\n\r]", content):
            try:
                lines.add(json.dumps(json.loads(line)))
            except (ValueError, RecursionError):
                continue
        if strange := [entry for entry in found if json.dumps(entry) not in lines]:
            raise Wrong(f"the log has an entry that is not in the file: {strange[0]!r:.200}")
