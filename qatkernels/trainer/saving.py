"""Saves and resumes a run: its configuration, the states of its phases, and their models.

The docstring of loop.py lists the files. Each file is written completely or not at all (:mod:`qatkernels.files`). Its
digest is checked when it is read. The contents of a damaged file are computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import files
from ..dtensor import whole
from ..files import CheckpointError, DamagedError
from ..methods.bfloat16_weights import STEPS
from ..options import flag, settings_of
from . import checkpoints, data, hf_folder, models, run_folder
from .build import model_header, sizes
from .config import ConfigError, TrainConfig, read_run
from .phases import Phase
from .state import Progress, Run, Training


def open_run(out: Path, config: TrainConfig, corpus: data.Corpus) -> None:
    """Write run.json, or compare the configuration with the run.json that exists.

    Raises:
        ConfigError: if the folder holds another run, or files of a run without run.json.
    """
    new = {**config.settings(), "bits": list(config.bits), "data_sha256": corpus.sha256}
    path = out / "run.json"
    if not path.exists() and (left_over := run_folder.files_of_run(out)):
        raise ConfigError(
            f"{out} holds {left_over[0].relative_to(out)} but no run.json, so the settings of that run are unknown; "
            f"delete the folders of its phases, or give another --out"
        )
    if path.exists():
        stored = read_run(path)
        settings = settings_of(TrainConfig)
        may_change = {name for name, setting in settings.items() if setting.field.metadata["resumable"]}
        # A run of an earlier version may lack settings. It was trained with what is now their default.
        defaults = {name: setting.field.default for name, setting in settings.items()}
        for name in new.keys() - may_change:
            if (old := stored.get(name, defaults.get(name))) != new[name]:
                option = "the text of --data" if name == "data_sha256" else flag(name)
                raise ConfigError(
                    f"{option} is {new[name]}, but the run in {out} was started with {old}; "
                    "give the same value, another --out, or --restart to start over"
                )
    files.write_json(path, new, sealed=True)


def resume(training: Training) -> Progress:
    """Load the newest undamaged state of a phase, if there is one, and return the progress of the phase.

    Damaged states are deleted; training computes them again. Without a state, a phase that continues another one loads
    that phase's last state.

    Raises:
        CheckpointError: if a state cannot be used, or the state to continue from is missing.
    """
    run, phase, notes = training.run, training.phase, []
    model, optimizer, group = training.model, training.optimizer, run.group
    progress: Progress | None = None
    _delete(run, *checkpoints.unfinished(run.folder(phase.name)))
    for path in checkpoints.newest_first(run.folder(phase.name)):
        try:
            # If bit widths were added, a part at the constant rate may now start at another step. Its old states are
            # then useless, and are deleted below.
            if checkpoints.header(path).get("first", phase.first) == phase.first:
                progress = Progress(**checkpoints.restore(path, model, optimizer, group, training.method.stats))
                progress.check(phase.steps)
                if progress.step:
                    training.method.load_state_dict(progress.method)
                if STEPS in optimizer.param_groups[0]:
                    optimizer.param_groups[0][STEPS] = progress.step
                break
        except DamagedError as error:
            notes.append(f"{error.what}: resuming from the checkpoint before it, or from the start of {phase.name}")
            run.display.say(notes[-1])
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is not a checkpoint that this version knows ({error})") from error
        _delete(run, path)
    if progress is None:
        progress = Progress(phase.first)
        if phase.takes_optimizer:
            before = checkpoints.newest_first(run.folder(str(phase.start)))
            if not before:
                raise CheckpointError(f"{run.folder(str(phase.start))} holds no state that {phase.name} can start from")
            checkpoints.restore(before[0], model, optimizer, group)
    run.log.trim(phase.name, progress.step)
    for note in notes:
        run.log.add(phase=phase.name, step=progress.step, note=note)
    return progress


def _delete(run: Run, *paths: Path) -> None:
    """Delete files once no process reads them any more; all processes must call this."""
    run.group.wait()
    if run.group.first:
        for path in paths:
            checkpoints.remove(path)
    run.group.wait()


def save(training: Training, progress: Progress, keep: int) -> None:
    """Write a state, and delete all but the newest ``keep`` states."""
    folder, group = training.run.folder(training.phase.name), training.run.group
    progress.method, stats = training.method.state_dict(), training.method.stats
    if "seen" in progress.method:  # SQuAT's measurements are of this process's share of the batch
        progress.method["seen"] = group.means(progress.method["seen"])
    checkpoints.save(folder, progress.step, training.model, training.optimizer, asdict(progress), keep, group, stats)


def finished_result(run: Run, phase: Phase) -> dict[str, Any] | None:
    """Return the result of a phase that is finished; None if it is not, or if its files are damaged."""
    folder = run.folder(phase.name)
    marker, trained = folder / models.MARKER, folder / "model.safetensors"
    if not marker.exists():
        return None
    try:
        about = files.read_json(marker)
        result: dict[str, Any] = about["result"]
        if trained.exists() and checkpoints.header(trained) != about:
            raise DamagedError(marker, f"it differs from the header of {trained.name}")
        states = checkpoints.newest_first(folder)
        for path in (*([trained] if trained.exists() else ()), *(states if phase.keeps_state else ())):
            checkpoints.verify(path, run.group)
    except (DamagedError, KeyError) as error:
        what = error.what if isinstance(error, DamagedError) else f"{marker} has no result"
        run.display.say(f"{what}: training {phase.name} again")
        run.log.add(phase=phase.name, step=0, note=f"{what}: training {phase.name} again")
        # resume() deletes damaged states, and finish() replaces the model.
        _delete(run, marker, folder / "config.json")
        return None
    if not phase.keeps_state:
        _delete(run, *states)  # left by a kill between writing the marker and deleting the states
    run.display.begin(phase.name, phase.steps)
    return result


def results_so_far(out: Path, plan: Sequence[Phase]) -> list[dict[str, Any]]:
    """Return the results of the phases that are finished, in order, without looking at their weights.

    Raises:
        CheckpointError: if the marker of a phase is damaged.
    """
    markers = [out / phase.name / models.MARKER for phase in plan]
    return [files.read_json(marker)["result"] for marker in markers if marker.exists()]


def finish(training: Training, progress: Progress) -> dict[str, Any]:
    """Write the trained model, then phase.json, which marks the phase as finished; return the result."""
    run, phase, model = training.run, training.phase, training.model
    folder, seconds = run.folder(phase.name), progress.seconds
    result = {
        "phase": phase.name,
        "bits": phase.bits,
        "start": phase.start,
        "first": phase.first,
        "steps": phase.steps,
        "start_bits_per_byte": progress.start,
        "bits_per_byte": progress.held_out,
        "seconds": seconds,
        "tokens_per_second": run.config.training.batch * run.config.shape.context * phase.steps / seconds
        if seconds
        else 0.0,
        **sizes(model),
    }
    about = model_header(run.config, phase, model, result)
    _write_model(training, folder / "model.safetensors", about)
    if phase.keeps_state:
        save(training, progress, keep=1)
    if run.group.first:
        if (settings := run.config.described.get("transformers")) is not None:
            hf_folder.copy_tokenizer(Path(run.config.model), folder)
            hf_folder.write_config(folder, model, settings)
        files.write_json(folder / models.MARKER, about, sealed=True)
    if not phase.keeps_state:
        _delete(run, *checkpoints.newest_first(folder))
    run.group.wait()
    run.display.end(result)
    return result


def _write_model(training: Training, path: Path, about: dict[str, Any]) -> None:
    # A tied weight has several names, and is written by its first one.
    first = {id(tensor): name for name, tensor in reversed(training.model.state_dict(keep_vars=True).items())}
    tensors = {name: whole(tensor) for name, tensor in training.model.state_dict().items() if name in first.values()}
    if training.run.group.first:
        files.save(path, tensors, about)


def keep_model(training: Training, step: int) -> None:
    """Write the model at this step to ``step-<n>.safetensors``, in the format of a finished phase's model."""
    run, phase = training.run, training.phase
    result = {"phase": phase.name, "bits": phase.bits, "first": phase.first, "steps": step}
    path = run.folder(phase.name) / f"step-{step:06d}.safetensors"
    _write_model(training, path, model_header(run.config, phase, training.model, result))
