"""Files that users or other programs write: settings in TOML, tables of runs, laws, weights of transformers."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import tomllib
import torch

from qatkernels.cli import plan
from qatkernels.plan import fit
from qatkernels.trainer import (  # fmt: skip
    CheckpointError,
    ConfigError,
    TrainConfig,
    models,
    toml,
)
from qatkernels.units import count

from . import mutate
from .runner import Wrong
from .target import Target, bits_of, decoded, difference

#: A fit of a table takes a second, so only every n-th case has one.
_FIT_EVERY = 250


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
        """Return the answers of the law."""
        return json.dumps(plan.answer(self.config)[0])

    def right(self, content: bytes, found: Any) -> str | None:
        """A law without a digest was written by a user; it must be read as it is."""
        try:
            stored = json.loads(content)
        except ValueError:
            stored = {}
        if "digest" in stored:
            super().right(content, found)


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
        """Errors of a value out of range name the option."""
        self.names = (str(self.file), "--")
        self.read(0)

    def read(self, case: int) -> Any:
        """Read the settings, and make a configuration."""
        found = toml.read(self.file)
        TrainConfig(**found)
        return found

    def right(self, content: bytes, found: Any) -> str | None:
        """Each setting has the value that a TOML parser finds."""
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
            else:  # a number may be written as a string, and an integer may stand for a float
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
        """Read it, and sometimes fit it."""
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
        """Errors of weights that do not fit name the folder."""
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
        """The weights are those of the file. It has no digest."""
        wanted = bits_of({name: t.float() for name, t in decoded(content).items()})
        if found != wanted:
            raise Wrong(f"the model has other weights than the file: {difference(found, wanted)}")
