"""The kinds of files that the mutations are of: how each is read, and what a changed one may be taken for.

`read` returns what the library made of a file, or raises one of the target's documented errors. `right` raises
:class:`Wrong` if that is not what the file says: of a file with a digest only the original counts as right, of others
what a parser of their own finds in the changed bytes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomllib
import torch
from torch import Tensor

from qatkernels import cli, files
from qatkernels.cli import plan
from qatkernels.nn import QuantConfig
from qatkernels.plan import fit
from qatkernels.trainer import (  # fmt: skip
    CheckpointError,
    ConfigError,
    TrainConfig,
    checkpoints,
    data,
    generate,
    loop,
    models,
    report,
    resumed,
    spectra,
    toml,
    train,
)
from qatkernels.trainer.parallel import Processes
from qatkernels.trainer.phases import phases
from qatkernels.trainer.signals import Stop
from qatkernels.units import count

from . import mutate, tiny
from .runner import Wrong

Way = Callable[[bytes, random.Random], bytes]
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
#: Fits of a table take a second, so that only every so many cases have one.
_FIT_EVERY = 250


class Target:
    """One file and its reader.

    Attributes:
        file: what is changed.
        errors: what reading may raise.
        names: texts of which an error must hold one: the file, as a rule.
        ways: how it is changed.
    """

    errors: tuple[type[Exception], ...] = (CheckpointError,)
    ways: tuple[Way, ...] = (mutate.mutated_bytes,)
    #: Modules that may unpickle: what they read is no file's.
    may_unpickle: tuple[str, ...] = ()
    file: Path

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.make()
        self.original = self.file.read_bytes()
        self.names: tuple[str, ...] = (str(self.file),)
        self.prepare()

    def make(self) -> None:
        """Write the file, and what else its reader needs; set ``file``."""

    def prepare(self) -> None:
        """Read the original, as what changed ones are compared with."""
        self.wanted = self.read(0)

    def read(self, case: int) -> Any:
        """Read the file as the library does."""

    def right(self, content: bytes, found: Any) -> str | None:
        """Raise Wrong unless this is the original; return how the case counts, if not as right."""
        if found != self.wanted:
            raise Wrong(f"read as something else: {difference(found, self.wanted)}")


def difference(found: Any, wanted: Any) -> str:
    """Return where two values differ, in a few words."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in [*wanted, *(key for key in found if key not in wanted)]:
            if (mine := found.get(key, "nothing")) != (theirs := wanted.get(key, "nothing")):
                return f"{key}: {difference(mine, theirs)}"
    return f"{found!r:.200} for {wanted!r:.200}"


def bits_of(tensors: dict[str, Any]) -> dict[str, str]:
    """Return a digest of each tensor: dtype, shape and bits."""
    return {name: files.digest({"": t.detach()}) for name, t in tensors.items() if isinstance(t, Tensor)}


def decoded(content: bytes) -> dict[str, Tensor]:
    """Read a safetensors file without its library."""
    header, data_ = mutate.split_safetensors(content)
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            raw, dtype = bytearray(data_[start:end]), _DTYPES[entry["dtype"]]
            flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
            tensors[name] = flat.reshape(entry["shape"])
    return tensors


def resealed(content: bytes, draw: random.Random) -> bytes:
    """Change the header that the package wrote, or exchange two tensors' contents, with a digest that matches."""
    header, data_ = mutate.split_safetensors(content)
    about = json.loads(header["__metadata__"]["header"])
    about = mutate.mutated_value(about, draw)
    text = json.dumps(about)
    header["__metadata__"] = {
        "header": text, "sha256": files.digest(decoded(content), text)
    }  # fmt: skip
    return mutate.join_safetensors(header, data_)


def is_resealed(content: bytes, original: bytes) -> bool:
    """Whether a file's digest matches a header that is not the original's."""
    try:
        mine = mutate.split_safetensors(content)[0]["__metadata__"]
        theirs = mutate.split_safetensors(original)[0]["__metadata__"]
        return bool(mine["header"] != theirs["header"] and mine["sha256"] != theirs["sha256"])
    except (ValueError, KeyError, TypeError):
        return False


TENSORS: tuple[Way, ...] = (
    mutate.mutated_bytes, mutate.mutated_bytes, mutate.swapped_tensors, mutate.crafted_header, resealed,
)  # fmt: skip


class Run(Target):
    """A finished run of `train`, of which a part is changed."""

    changes: dict[str, Any] = {}  # noqa: RUF012

    def make(self) -> None:
        """Train."""
        given = {**tiny.SETTINGS, "data": str(tiny.text(self.folder)), "out": str(self.folder / "run"), **self.changes}
        self.config = TrainConfig(**given).resolved()
        train(self.config, say=lambda line: None)
        self.out = Path(self.config.out)

    def open(self, group: Processes | None = None) -> loop.Run:
        """Return what a phase works with."""
        self.said: list[str] = []
        self.corpus = data.load(self.config.data, self.config.shape.context)
        display = report.Display(1, self.said.append)
        display.__enter__()
        log = report.Log(self.out / "log.jsonl")
        return loop.Run(self.config, self.corpus, log, display, Stop().__enter__(), group or Processes())


class Packed(Run):
    """A packed file, as `generate` loads it."""

    ways = TENSORS

    def make(self) -> None:
        """Train and pack."""
        super().make()
        self.file = self.folder / "packed.safetensors"
        generate.pack(self.out / "w2", self.file)

    def read(self, case: int) -> Any:
        """Return the model's tensors and what it answers."""
        model = generate.load(self.file)
        logits = model(torch.tensor([[1, 2, 3, 250]])[:, : model.config.context])  # a made-up header may say 1
        return {**bits_of(model.state_dict()), "logits": bits_of({"": logits})[""]}

    def right(self, content: bytes, found: Any) -> str | None:
        """A header that someone made up may describe another model, of the file's own tensors."""
        if not is_resealed(content, self.original):
            return super().right(content, found)
        for name, bits in bits_of(decoded(content)).items():
            if found.get(name) != bits:
                raise Wrong(f"{name} is not the file's")
        return None


class State(Run):
    """A state of a phase of WinQ that is taken up again."""

    ways = TENSORS
    changes = {"method": "winq", "reset_every": 2, "stats_every": 1}  # noqa: RUF012
    sharded = False

    def make(self) -> None:
        """Train, then again to a state in the middle of the quantized phase."""
        super().make()
        (self.out / "w2" / "config.json").unlink()
        self.phase = phases(self.config)[1]
        run = self.open()
        training = loop.begin(run, self.phase)
        progress = loop._Progress(first=self.phase.first)
        for step in range(4):
            loop.take_step(training, step)
            progress.step += 1
            training.method.log()
        progress.seconds, progress.start, progress.held_out = 0.5, 7.5, 7.25
        loop._save(training, progress, 2)
        (self.file,) = (self.out / "w2").glob("state-*.safetensors")

    def prepare(self) -> None:
        """Take up the original, and begin anew without one."""
        self.training = loop.begin(self.open(), self.phase)
        self.initial = {name: t.clone() for name, t in self.training.model.state_dict().items()}
        self.wanted = self.read(0)
        self.file.unlink()
        self.fresh = self.read(0)
        if self.wanted == self.fresh or self.wanted["step"] != 4:
            raise Wrong("the state is not taken up")

    def read(self, case: int) -> Any:
        """Take the phase up from its beginning, and return everything that a state restores."""
        self.said.clear()
        training, stats = self.training, self.training.method.stats
        training.model.load_state_dict(self.initial)
        training.optimizer.state.clear()
        training.method.load_state_dict({"steps": 0, "resets": 0})
        stats.load_state_dict({})
        progress = loop._resumed(training)
        return {
            **vars(progress), **bits_of(checkpoints.snapshot(training.model, training.optimizer)),
            **bits_of({f"codes.{k}": v for k, v in stats.state_dict().items()}),
            "method now": training.method.state_dict(),
        }  # fmt: skip

    def right(self, content: bytes, found: Any) -> str | None:
        """What is damaged is named, and the phase starts over; anything else is the state."""
        if any(f"{self.file} is damaged" in line for line in self.said):
            if found != self.fresh:
                raise Wrong(f"a damaged state left its mark: {difference(found, self.fresh)}")
            return "refused"
        if is_resealed(content, self.original):
            first = json.loads(mutate.split_safetensors(content)[0]["__metadata__"]["header"]).get("first", 6)
            tensors = {f"codes.{k[6:]}" if k[:6] == "codes." else k: v for k, v in bits_of(decoded(content)).items()}
            if first != 6:  # of another plan: not used, which is right
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
    """A sharded state of FSDP2: one of its files, the progress beside it among them."""

    #: Messages between processes.
    may_unpickle = ("torch.distributed.distributed_c10d",)
    ways = (mutate.mutated_bytes,)

    def make(self) -> None:
        """Write a state with the one process that there is."""
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
        """Change one of the files of tensors half of the time; the others are as they were."""
        for path, whole in self.contents.items():
            path.write_bytes(whole)
        if draw.random() < 0.5:
            return mutate.mutated_bytes(content, draw)
        path = draw.choice([path for path in self.contents if path != self.file])
        way = draw.choice((mutate.mutated_bytes, mutate.crafted_header))
        path.write_bytes(way(self.contents[path], draw))
        return content

    def read(self, case: int) -> Any:
        """Load the state into what was built, and return what it restored."""
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
        """A header without a digest, as earlier versions wrote it, is what it says."""
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
    """The ``config.json`` of a finished phase: what `train` takes for a result, `pack` for a model."""

    ways = (mutate.mutated_bytes, mutate.mutated_json)

    def make(self) -> None:
        """Train."""
        super().make()
        self.file = self.out / "w2" / "config.json"
        self.run, self.phase = self.open(), phases(self.config)[1]

    def read(self, case: int) -> Any:
        """Ask for the result, and load the model."""
        if case % 2:
            self.said.clear()
            return loop._finished(self.run, self.phase)
        trained = models.load_trained(self.out / "w2")
        return {**bits_of(trained.model.state_dict()), "described": json.dumps(trained.about)}

    def prepare(self) -> None:
        """Both."""
        self.wanted, self.result = self.read(0), self.read(1)

    def right(self, content: bytes, found: Any) -> str | None:
        """None means that the phase is trained again, which a line must say."""
        if found is None and any(str(self.file) in line for line in self.said):
            return "refused"
        if found is None:
            raise Wrong("a phase is trained again without a word")
        wanted = self.wanted if "described" in found else self.result
        if found != wanted:
            raise Wrong(f"read as something else: {difference(found, wanted)}")
        return None


class Ritz(Run):
    """What `spectrum` keeps of a checkpoint."""

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
        """Ask for what was found before; None is computed anew."""
        return spectra.found_before(self.file, self.identity)

    def right(self, content: bytes, found: Any) -> str | None:
        """Of another call, or the original, perhaps with a field that nobody reads."""
        if found is not None:
            super().right(content, {name: value for name, value in found.items() if name in self.wanted})


class Law(Target):
    """A law that `plan --save` wrote, read by `plan --law`."""

    errors = (ValueError, CheckpointError)
    ways = (mutate.mutated_bytes, mutate.mutated_json)

    def make(self) -> None:
        """Fit a law to a table."""
        self.file = self.folder / "law.json"
        write_table(self.folder / "runs.csv")
        asked = {"params": 10**8, "tokens": 10**10, "bits": (2.0, 4.0)}
        plan.answer(plan.PlanConfig(**asked, runs=str(self.folder / "runs.csv"), resamples=0, save=str(self.file)))
        self.config = plan.PlanConfig(**asked, law=str(self.file))

    def read(self, case: int) -> Any:
        """Return what is answered."""
        return json.dumps(plan.answer(self.config)[0])

    def right(self, content: bytes, found: Any) -> str | None:
        """Without a digest it is a law that someone wrote, which is what it says."""
        try:
            stored = json.loads(content)
        except ValueError:
            stored = {}
        if "digest" in stored:
            super().right(content, found)


class Configuration(Run):
    """``run.json``, as `--resume` and the same command read it."""

    errors = (CheckpointError, ConfigError)
    ways = (mutate.mutated_bytes, mutate.mutated_json)

    def make(self) -> None:
        """Train."""
        super().make()
        self.file = self.out / "run.json"
        self.open()

    def prepare(self) -> None:
        """A range is named with its option, another value with the folder."""
        self.names = (str(self.file), f"in {self.out} was started", "--")
        self.wanted = self.read(0)
        self.ours = self.config.settings()

    def read(self, case: int) -> Any:
        """Take the run's settings, or compare ours with them."""
        if case % 2:
            loop._open_run(self.out, self.config, self.corpus)
            return self.config.settings()
        return resumed({"out": str(self.out)}).settings()

    def right(self, content: bytes, found: Any) -> str | None:
        """Without a digest, as earlier versions wrote it, it is what it says."""
        stored = json.loads(content)
        wanted = dict(self.wanted)
        if "digest" not in stored:
            wanted |= {key: tuple(v) if key == "bits" else v for key, v in stored.items() if key in wanted}
            wanted["out"] = self.wanted["out"]
        if found != wanted and not (found == self.ours and "digest" not in stored):
            raise Wrong(f"read as something else: {difference(found, wanted)}")
        return None


_TOML = """\
out = "runs/x"
bits = [4, 1.58]
tokens = "10M"
# a comment
[run]
method = "winq"
act-bits = 8
seed = 3
[training]
lr = 1e-3
qat_fraction = 0.25
accumulate = 2
schedule = "fused"
beta2 = 0.95
[winq]
two-sided = true
scale-noise-std = 0
reset-until = 0.9
[evaluation]
save-every = 50
"""


class Toml(Target):
    """A file of settings for `--config`."""

    errors = (ConfigError,)
    ways = (mutate.mutated_bytes, mutate.mutated_lines)

    def make(self) -> None:
        """Write settings of every kind."""
        self.file = self.folder / "run.toml"
        self.file.write_text(_TOML)

    def prepare(self) -> None:
        """A range is named with its option."""
        self.names = (str(self.file), "--")
        self.read(0)

    def read(self, case: int) -> Any:
        """Read the settings and make a configuration of them."""
        found = toml.read(self.file)
        TrainConfig(**found)
        return found

    def right(self, content: bytes, found: Any) -> str | None:
        """Each setting is what a TOML parser finds under its name."""
        flat: dict[str, Any] = {}
        for name, value in tomllib.loads(content.decode()).items():
            flat |= value if isinstance(value, dict) else {name: value}
        flat = {name.replace("-", "_"): value for name, value in flat.items()}
        if flat.keys() != found.keys():
            raise Wrong(f"settings are {sorted(found)}, the file has {sorted(flat)}")
        for name, value in flat.items():
            mine = found[name]
            if isinstance(mine, tuple):
                wanted: Any = tuple(value) if isinstance(value, list) else (value,)
            elif name == "tokens":
                wanted = count(str(value))
            else:  # a number may be written as a text, and a whole one where a float is asked for
                wanted = float(value) if isinstance(mine, float) else value
            if mine != wanted or isinstance(mine, bool) != isinstance(value, bool):
                raise Wrong(f"{name} is {mine!r}, the file says {value!r}")
        return None


def write_table(path: Path) -> None:
    """Write a table of runs that a law can be fitted to."""
    from studies.plan_recovery import table

    columns = table("small", 0.005, 0)
    keep = [i for i, (n, b) in enumerate(zip(columns["params"], columns["bits"], strict=True)) if n < 1e9 and b != 6]
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow([*columns, "schedule"])
        out.writerows([*(float(columns[name][i]) for name in columns), "classic"] for i in keep)


class Runs(Target):
    """A table for `plan --runs`."""

    errors = (fit.FitError,)
    ways = (mutate.mutated_bytes, mutate.mutated_lines)

    def make(self) -> None:
        """Write a table."""
        self.file = self.folder / "runs.csv"
        write_table(self.file)

    def read(self, case: int) -> Any:
        """Read it, and fit it now and then."""
        if case % _FIT_EVERY == _FIT_EVERY - 1:
            plan.answer(plan.PlanConfig(10**8, 10**10, (2.0,), runs=str(self.file), resamples=0))
            return None
        return fit.read_runs(self.file)

    def right(self, content: bytes, found: Any) -> str | None:
        """Each number is the one in its cell."""
        if found is None:
            return
        rows = [row for row in csv.reader(io.StringIO(content.decode(), newline="")) if row]
        places = {name: i for i, name in enumerate(rows[0])}
        for name in fit.COLUMNS:
            wanted = [float(row[places[name]]) for row in rows[1:]]
            mine = found[name]
            if len(mine) != len(wanted) or any(
                a != b and not (math.isnan(a) and math.isnan(b)) for a, b in zip(mine, wanted, strict=True)
            ):
                raise Wrong(f"column {name} is not the file's")


class External(Target):
    """Weights of a model of transformers for `train --model`."""

    errors = (CheckpointError, ConfigError, ValueError)
    ways = (mutate.mutated_bytes, mutate.swapped_tensors, mutate.crafted_header)

    def make(self) -> None:
        """Write a tiny model."""
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
        )  # fmt: skip
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(self.folder / "llama")
        self.file = self.folder / "llama" / "model.safetensors"
        self.model = models.build(models.describe(str(self.folder / "llama"), TrainConfig().shape))

    def prepare(self) -> None:
        """What does not fit is named with its folder."""
        self.names = (str(self.file.parent),)
        self.wanted = self.read(0)

    def read(self, case: int) -> Any:
        """Start from the weights as a run does."""
        source = str(self.file.parent)
        weights = models.initial_weights(source)
        if weights is None:
            raise Wrong("weights are drawn although there are some")
        models.fill(self.model, weights, source)
        return bits_of(self.model.state_dict())

    def right(self, content: bytes, found: Any) -> str | None:
        """The weights are those of the file, whose contents have no digest."""
        wanted = bits_of({name: t.float() for name, t in decoded(content).items()})
        if found != wanted:
            raise Wrong(f"the model has other weights than the file: {difference(found, wanted)}")


class Log(Run):
    """``log.jsonl``, of which a resumed run keeps what it does not do again."""

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
        """What is left are lines of the file, whole ones."""
        lines = set()
        for line in re.split(rb"[\n\r]", content):
            try:
                lines.add(json.dumps(json.loads(line)))
            except (ValueError, RecursionError):
                continue
        if strange := [entry for entry in found if json.dumps(entry) not in lines]:
            raise Wrong(f"the log has an entry that is not in the file: {strange[0]!r:.200}")


TARGETS: dict[str, type[Target]] = {
    "packed": Packed, "state": State, "sharded": Sharded, "result": Result, "ritz": Ritz, "law": Law,
    "run": Configuration, "toml": Toml, "runs": Runs, "external": External, "log": Log,
}  # fmt: skip


def warm() -> None:
    """Import what readers import on their first call, so that it is not counted as theirs."""
    import transformers  # noqa: F401

    hashlib.sha256(b"")
    cli.COMMANDS.keys()
