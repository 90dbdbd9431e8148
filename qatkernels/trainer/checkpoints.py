"""The states that a phase is taken up from: model, optimizer and progress at a step, the last few of them.

    state-00000100.safetensors     one process, or DDP: one file
    state-00000100/                FSDP2: a file for each process, by torch.distributed.checkpoint, also safetensors,
                                   and state.json, which has the progress and the digest of each file

Either appears whole or not at all, and either can be read by any number of processes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, distribute_tensor

from .. import files
from ..files import CheckpointError, DamagedError
from ..methods.stats import GridStats
from .parallel import Processes


def newest_first(folder: Path) -> list[Path]:
    """Return the states in a phase's folder."""
    # An earlier version kept one state, without a number; by name it comes last, and it was the only one.
    return sorted((p for p in folder.glob("state*") if p.suffix in ("", ".safetensors")), reverse=True)


def unfinished(folder: Path) -> list[Path]:
    """Return what kills left of files that were being written in a phase's folder."""
    return sorted(folder.glob("*.tmp"))


def remove(path: Path) -> None:
    """Delete a state, if it is there."""
    with files.explained("deleted", path):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def save(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, header: Mapping[str, Any],
    keep: int, group: Processes, stats: GridStats | None = None,
) -> None:  # fmt: skip
    """Write the state at a step, then delete all but the last ones.

    Args:
        folder: of the phase.
        step: of the phase.
        model: not wrapped.
        optimizer: its AdamW.
        header: JSON-able values that belong to it.
        keep: how many states are left.
        group: the processes; all must call.
        stats: whose next count of flips must not depend on whether training was taken up again.

    Raises:
        CheckpointError: if it cannot be written; earlier states are as they were.
    """
    tensors, path = snapshot(model, optimizer), folder / f"state-{step:08d}"
    if stats is not None:
        tensors |= {f"codes.{name}": codes for name, codes in stats.state_dict().items()}
    before = newest_first(folder)
    try:
        if group.sharded:
            _save_sharded(path, tensors, header, group)
        else:
            file = path.with_suffix(".safetensors")
            _together(file, group, lambda: files.save(file, tensors, header) if group.first else None)
    except CheckpointError as error:
        last = f"; {before[0]} is whole" if before else ""
        raise CheckpointError(f"{error}{last}; the same command goes on from there when that is mended") from error
    if group.first:
        for old in newest_first(folder)[keep:]:
            remove(old)
    group.wait()


def restore(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, group: Processes, stats: GridStats | None = None
) -> dict[str, Any]:
    """Load a state into a model, an optimizer and statistics that were just built, and return its header.

    Raises:
        DamagedError: if it is not what was written.
        CheckpointError: if it cannot be read, or is of another model.
    """
    live = {f"model.{name}": value for name, value in model.state_dict().items()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [p for g in optimizer.param_groups for p in g["params"]]
    try:
        if path.is_dir():
            header = _verified(path, group)
            present = _names(path)
        else:
            tensors, header = files.load(path)
            present = set(tensors)
        moments: dict[int, dict[str, Tensor]] = {}
        for i, parameter in enumerate(order):
            prefix = f"optimizer.{names[id(parameter)]}"
            if f"{prefix}.step" in present:  # a parameter that has not moved yet has none
                moments[i] = {"step": torch.zeros(())}
                moments[i] |= {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                live |= {f"{prefix}.{key}": value for key, value in moments[i].items()}
        codes: dict[str, Tensor] = {}
        if stats is not None and any(name.startswith("codes.") for name in present):
            codes = stats.codes()  # of the shape, type and place of those that were saved
            live |= {f"codes.{name}": value for name, value in codes.items()}
        layouts = {name: live.pop(name) for name in list(live) if name.endswith("_extra_state")}
        live |= {name: layout for name, layout in layouts.items() if name in present}  # earlier versions had none
        if live.keys() != present:
            odd = sorted(live.keys() ^ present)
            raise KeyError(f"it has no {odd[0]}" if odd[0] in live else f"{odd[0]} is not in the model")
        if path.is_dir():
            _load_sharded(path, live)
        else:
            with torch.no_grad():
                for name, value in live.items():
                    if name not in layouts:
                        _fill(value, tensors[name])
            live |= {name: tensors[name] for name in layouts if name in present}
        found = {name.removeprefix("model."): live[name] for name in layouts if name in present}
        model.load_state_dict(found, strict=False)  # which compares them
        if stats is not None:
            stats.load_state_dict(codes)
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
        raise CheckpointError(
            f"{path} does not fit this model ({reason}); delete it to start that phase again"
        ) from error
    return header


def verify(path: Path, group: Processes) -> None:
    """Raise DamagedError if a state, or a safetensors file of this package, is not what was written."""
    if path.is_dir():
        _verified(path, group)
    else:
        files.load(path)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return model and optimizer as one flat dictionary of tensors."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def header(path: Path) -> dict[str, Any]:
    """Return what was saved with the tensors of a state, which are not looked at."""
    if not path.is_dir():
        return files.header(path)
    found: dict[str, Any] = files.read_json(path / "state.json").get("header", {})
    return found


def _fill(live: Tensor, stored: Tensor) -> None:
    if live.shape != stored.shape or live.dtype != stored.dtype:
        raise ValueError(
            f"a tensor of {tuple(stored.shape)} {stored.dtype} for one of {tuple(live.shape)} {live.dtype}"
        )
    if isinstance(live, DTensor):
        stored = distribute_tensor(stored.to(live.device), live.device_mesh, live.placements)
    live.copy_(stored)


def _save_sharded(path: Path, tensors: dict[str, Tensor], header: Mapping[str, Any], group: Processes) -> None:
    import torch.distributed.checkpoint as dcp

    temporary = path.with_name(f"{path.name}.tmp")
    _together(path, group, lambda: remove(temporary) if group.first else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        _together(path, group, lambda: dcp.save(tensors, storage_writer=writer))
    digests = _digests(temporary, group)

    def name() -> None:
        files.write_json(temporary / "state.json", {"header": dict(header), "sha256": digests}, sealed=True)
        remove(path)
        files.rename(temporary, path)

    _together(path, group, name if group.first else lambda: None)


def _together(path: Path, group: Processes, work: Callable[[], object]) -> None:
    """Call `work`, and raise in every process if it failed in one: none may wait for another that has left."""
    failure: str | None = None
    try:
        work()
    except CheckpointError as error:
        failure = str(error)
    except OSError as error:
        failure = f"{path} cannot be written: {error.strerror or error}"
    except CheckpointException as error:  # torch's, from every process
        reason = next(iter(error.failures.values()))[0]
        failure = f"{path} cannot be written: {getattr(reason, 'strerror', None) or reason}"
    for found in group.gathered(failure):
        if found is not None:
            raise CheckpointError(found)


def _load_sharded(path: Path, live: dict[str, Tensor]) -> None:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(live, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=not dist.is_initialized())


def _names(path: Path) -> set[str]:
    import torch.distributed.checkpoint as dcp

    return set(dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata)


def _digests(folder: Path, group: Processes) -> dict[str, str]:
    """Return the SHA-256 of each file of tensors; every process reads its share of them."""
    own = {}
    for file in sorted(folder.glob("*.safetensors"))[group.rank :: group.size]:
        found = hashlib.sha256()
        with files.explained("read", file), open(file, "rb") as content:
            os.fsync(content.fileno())  # of one just written: the name comes after the content
            while part := content.read(2**24):
                found.update(part)
        own[file.name] = found.hexdigest()
    return {name: value for part in group.gathered(own) for name, value in part.items()}


def _verified(path: Path, group: Processes) -> dict[str, Any]:
    """Return the header of a sharded state whose files are what was written."""
    stored = files.read_json(path / "state.json")
    if not isinstance(stored.get("header"), dict) or _digests(path, group) != stored.get("sha256"):
        raise DamagedError(path, "its digests do not match")
    header: dict[str, Any] = stored["header"]
    return header
