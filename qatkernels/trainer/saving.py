"""What a run saves: its configuration, the states that it is resumed from, the models of its phases.

loop.py's docstring has the files. Each is written whole or not at all (:mod:`qatkernels.files`), and checked when it is
read: one that is damaged is made again.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import files
from ..dtensor import whole
from ..files import CheckpointError, DamagedError
from ..options import flag, settings_of
from . import checkpoints, data, models, run_folder
from .build import described, sizes
from .config import ConfigError, TrainConfig, read_run
from .phases import Phase
from .state import Progress, Run, Training


def open_run(out: Path, config: TrainConfig, corpus: data.Corpus) -> None:
    """Write run.json, or compare with the one that is there."""
    now = {**config.settings(), "bits": list(config.bits), "data_sha256": corpus.sha256}
    path = out / "run.json"
    if not path.exists() and (left := run_folder.of_run(out)):
        raise ConfigError(
            f"{out} holds {left[0].relative_to(out)} but no run.json, so that nobody knows what it was trained with; "
            f"delete it and what lies beside it, or give another --out"
        )
    if path.exists():
        before = read_run(path)
        known = settings_of(TrainConfig)
        free = {name for name, setting in known.items() if setting.field.metadata["resumable"]}
        defaults = {name: setting.field.default for name, setting in known.items()}  # an earlier version lacks some
        for name in now.keys() - free:
            if (was := before.get(name, defaults.get(name))) != now[name]:
                option = "the text of --data" if name == "data_sha256" else flag(name)
                raise ConfigError(
                    f"{option} is {now[name]}, but the run in {out} was started with {was}; "
                    "give the same, another --out, or --restart to start over"
                )
    files.write_json(path, now, sealed=True)


def resumed(training: Training) -> Progress:
    """Load the newest state that is whole, if there is one; one that is damaged is deleted, to be made again."""
    run, phase, notes = training.run, training.phase, []
    model, optimizer, group = training.model, training.optimizer, run.group
    progress: Progress | None = None
    _delete(run, *checkpoints.unfinished(run.folder(phase.name)))
    for path in checkpoints.newest_first(run.folder(phase.name)):
        try:
            # With other bit widths than before a part at the constant rate may start elsewhere: of no use then.
            if checkpoints.header(path).get("first", phase.first) == phase.first:
                progress = Progress(**checkpoints.restore(path, model, optimizer, group, training.method.stats))
                progress.check(phase.steps)
                if progress.step:
                    training.method.load_state_dict(progress.method)
                break
        except DamagedError as error:
            notes.append(f"{error.what}: going on from the checkpoint before, or the start of {phase.name}")
            run.display.say(notes[-1])
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is not a checkpoint that this version knows ({error})") from error
        _delete(run, path)
    if progress is None:
        progress = Progress(phase.first)
        if phase.goes_on:
            before = checkpoints.newest_first(run.folder(str(phase.start)))
            if not before:
                raise CheckpointError(f"{run.folder(str(phase.start))} holds no state that {phase.name} can go on from")
            checkpoints.restore(before[0], model, optimizer, group)
    run.log.trim(phase.name, progress.step)
    for note in notes:
        run.log.add(phase=phase.name, step=progress.step, note=note)
    return progress


def _delete(run: Run, *paths: Path) -> None:
    """Delete files that no process needs any more."""
    run.group.wait()
    if run.group.first:
        for path in paths:
            checkpoints.remove(path)
    run.group.wait()


def save(training: Training, progress: Progress, keep: int) -> None:
    """Write a state, and delete all but the newest ``keep``."""
    folder, group = training.run.folder(training.phase.name), training.run.group
    progress.method, stats = training.method.state_dict(), training.method.stats
    if "seen" in progress.method:  # of this process's part of the batch
        progress.method["seen"] = group.means(progress.method["seen"])
    checkpoints.save(folder, progress.step, training.model, training.optimizer, asdict(progress), keep, group, stats)


def finished(run: Run, phase: Phase) -> dict[str, Any] | None:
    """Return the result of a phase that an earlier call finished, None if there is none or its files are damaged."""
    folder = run.folder(phase.name)
    marker, trained = folder / "config.json", folder / "model.safetensors"
    if not marker.exists():
        return None
    try:
        about = files.read_json(marker)
        result: dict[str, Any] = about["result"]
        if trained.exists() and checkpoints.header(trained) != about:
            raise DamagedError(marker, f"{trained.name} says something else of itself")
        left = checkpoints.newest_first(folder)
        for path in (*([trained] if trained.exists() else ()), *(left if phase.kept else ())):
            checkpoints.verify(path, run.group)
    except (DamagedError, KeyError) as error:
        what = error.what if isinstance(error, DamagedError) else f"{marker} has no result"
        run.display.say(f"{what}: training {phase.name} again")
        run.log.add(phase=phase.name, step=0, note=f"{what}: training {phase.name} again")
        _delete(run, marker)  # the model stays until it is replaced, and damaged states are found there again
        return None
    if not phase.kept:
        _delete(run, *left)  # a kill after the marker was written, and before they were deleted
    run.display.begin(phase.name, phase.steps)
    return result


def finish(training: Training, progress: Progress) -> dict[str, Any]:
    """Write the trained model, then config.json, whose presence says that the phase is finished."""
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
    about = described(run.config, phase, model, result)
    _write_model(training, folder / "model.safetensors", about)
    if phase.kept:
        save(training, progress, keep=1)
    if run.group.first:
        if tokenizer := models.tokenizer(run.config.model):
            files.write(folder / tokenizer.name, tokenizer.read_bytes())
        files.write_json(folder / "config.json", about, sealed=True)
    if not phase.kept:
        _delete(run, *checkpoints.newest_first(folder))
    run.group.wait()
    run.display.end(result)
    return result


def _write_model(training: Training, path: Path, about: dict[str, Any]) -> None:
    tensors = {name: whole(tensor) for name, tensor in training.model.state_dict().items()}
    if training.run.group.first:
        files.save(path, tensors, about)


def keep(training: Training, step: int) -> None:
    """Write the model at this step as a file that is like that of a finished phase."""
    run, phase = training.run, training.phase
    result = {"phase": phase.name, "bits": phase.bits, "first": phase.first, "steps": step}
    path = run.folder(phase.name) / f"step-{step:06d}.safetensors"
    _write_model(training, path, described(run.config, phase, training.model, result))
