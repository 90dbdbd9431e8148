"""The states that a phase is resumed from: model, optimizer and progress at a step. The last few are kept.

    state-00000100.safetensors     one process, or DDP: one file
    state-00000100/                FSDP2: torch.distributed.checkpoint writes one safetensors file for each process;
                                   state.json has the progress and the digest of each file

A state is written completely or not at all. Any number of processes can read either form.
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
    # An earlier version kept a single state without a number. Sorted by name it comes last, and it is the only one.
    return sorted((p for p in folder.glob("state*") if p.suffix in ("", ".safetensors")), reverse=True)


def unfinished(folder: Path) -> list[Path]:
    """Return the temporary files in a phase's folder: a process was killed while it wrote them."""
    return sorted(folder.glob("*.tmp"))


def remove(path: Path) -> None:
    """Delete a state if it exists."""
    with files.explained("deleted", path):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def save(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, header: Mapping[str, Any],
    keep: int, group: Processes, stats: GridStats | None = None,
) -> None:  # fmt: skip
    """Write the state at a step, then delete all but the newest states.

    Args:
        folder: folder of the phase.
        step: step of the phase.
        model: the model, not wrapped.
        optimizer: its AdamW.
        header: JSON-able values that are saved with the tensors.
        keep: how many states to keep.
        group: the processes that train together; all must call this function.
        stats: statistics of the codes. They are saved so that the next count of flips is the same after a resume.

    Raises:
        CheckpointError: if the state cannot be written; earlier states are not touched.
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
            _in_every_process(file, group, lambda: files.save(file, tensors, header) if group.first else None)
    except CheckpointError as error:
        last = f"; {before[0]} is whole" if before else ""
        raise CheckpointError(f"{error}{last}; once this is fixed, the same command resumes from there") from error
    if group.first:
        for old in newest_first(folder)[keep:]:
            remove(old)
    group.wait()


def restore(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, group: Processes, stats: GridStats | None = None
) -> dict[str, Any]:
    """Load a state into a newly built model, optimizer and statistics, and return the header of the state.

    Raises:
        DamagedError: if the state is damaged.
        CheckpointError: if the state cannot be read, or belongs to another model.
    """
    live = {f"model.{name}": value for name, value in model.state_dict().items()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [p for g in optimizer.param_groups for p in g["params"]]
    try:
        if path.is_dir():
            header = _verified_header(path, group)
            present = _tensor_names(path)
        else:
            tensors, header = files.load(path)
            present = set(tensors)
        moments: dict[int, dict[str, Tensor]] = {}
        for i, parameter in enumerate(order):
            prefix = f"optimizer.{names[id(parameter)]}"
            if f"{prefix}.step" in present:  # a parameter that the optimizer has not stepped yet has no moments
                moments[i] = {"step": torch.zeros(())}
                # Moments of bfloat16 weights are float32 too (Bfloat16Weights).
                wide = torch.promote_types(parameter.dtype, torch.float32)
                moments[i] |= {key: torch.zeros_like(parameter, dtype=wide) for key in ("exp_avg", "exp_avg_sq")}
                live |= {f"{prefix}.{key}": value for key, value in moments[i].items()}
        codes: dict[str, Tensor] = {}
        if stats is not None and any(name.startswith("codes.") for name in present):
            codes = stats.codes()  # buffers with the shape, dtype and device of the saved codes
            live |= {f"codes.{name}": value for name, value in codes.items()}
        layouts = {name: live.pop(name) for name in list(live) if name.endswith("_extra_state")}
        live |= {
            name: layout for name, layout in layouts.items() if name in present
        }  # earlier versions saved no layout
        if live.keys() != present:
            different = sorted(live.keys() ^ present)[0]
            raise KeyError(f"it has no {different}" if different in live else f"{different} is not in the model")
        if path.is_dir():
            _load_sharded(path, live)
        else:
            with torch.no_grad():
                for name, value in live.items():
                    if name not in layouts:
                        _copy_into(value, tensors[name])
            live |= {name: tensors[name] for name in layouts if name in present}
        saved_layouts = {name.removeprefix("model."): live[name] for name in layouts if name in present}
        model.load_state_dict(saved_layouts, strict=False)  # raises an error if a layout differs
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
    """Raise DamagedError if a state, or a safetensors file of this package, does not match its digests."""
    if path.is_dir():
        _verified_header(path, group)
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
    """Return the header of a state, without reading its tensors."""
    if not path.is_dir():
        return files.header(path)
    stored: dict[str, Any] = files.read_json(path / "state.json").get("header", {})
    return stored


def _copy_into(live: Tensor, stored: Tensor) -> None:
    if live.shape != stored.shape or live.dtype != stored.dtype:
        raise ValueError(
            f"a stored tensor has shape {tuple(stored.shape)} and dtype {stored.dtype}, the model's has "
            f"{tuple(live.shape)} and {live.dtype}"
        )
    if isinstance(live, DTensor):
        stored = distribute_tensor(stored.to(live.device), live.device_mesh, live.placements)
    live.copy_(stored)


def _save_sharded(path: Path, tensors: dict[str, Tensor], header: Mapping[str, Any], group: Processes) -> None:
    import torch.distributed.checkpoint as dcp

    temporary = path.with_name(f"{path.name}.tmp")
    _in_every_process(path, group, lambda: remove(temporary) if group.first else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        _in_every_process(path, group, lambda: dcp.save(tensors, storage_writer=writer))
    digests = _digests(temporary, group)

    def publish() -> None:
        files.write_json(temporary / "state.json", {"header": dict(header), "sha256": digests}, sealed=True)
        remove(path)
        files.rename(temporary, path)

    _in_every_process(path, group, publish if group.first else lambda: None)


def _in_every_process(path: Path, group: Processes, work: Callable[[], object]) -> None:
    """Call `work`, and raise an error in every process if it failed in one.

    Without that, the other processes would wait forever for the one that stopped.
    """
    failure: str | None = None
    try:
        work()
    except CheckpointError as error:
        failure = str(error)
    except OSError as error:
        failure = f"{path} cannot be written: {error.strerror or error}"
    except CheckpointException as error:  # torch raises it in every process
        reason = next(iter(error.failures.values()))[0]
        failure = f"{path} cannot be written: {getattr(reason, 'strerror', None) or reason}"
    for message in group.gathered(failure):
        if message is not None:
            raise CheckpointError(message)


def _load_sharded(path: Path, live: dict[str, Tensor]) -> None:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(live, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=not dist.is_initialized())


def _tensor_names(path: Path) -> set[str]:
    import torch.distributed.checkpoint as dcp

    return set(dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata)


def _digests(folder: Path, group: Processes) -> dict[str, str]:
    """Return the SHA-256 of each file of tensors by name; every process reads a share of the files."""
    digests = {}
    for file in sorted(folder.glob("*.safetensors"))[group.rank :: group.size]:
        digest = hashlib.sha256()
        with files.explained("read", file), open(file, "rb") as content:
            # A file that was just written must be on disk before its folder gets its final name.
            os.fsync(content.fileno())
            while part := content.read(2**24):
                digest.update(part)
        digests[file.name] = digest.hexdigest()
    return {name: value for part in group.gathered(digests) for name, value in part.items()}


def _verified_header(path: Path, group: Processes) -> dict[str, Any]:
    """Return the header of a sharded state, after comparing the digests of its files."""
    stored = files.read_json(path / "state.json")
    if not isinstance(stored.get("header"), dict) or _digests(path, group) != stored.get("sha256"):
        raise DamagedError(path, "its digests do not match")
    header: dict[str, Any] = stored["header"]
    return header
