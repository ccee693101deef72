"""The folder of a run as every command that makes one handles it, on any number of processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from imagerl.rl.config.sft import AnyRecipe
from imagerl.rl.engine.checkpoint import MANIFEST, Checkpoint, load_checkpoint
from imagerl.rl.engine.engine import Engine
from imagerl.rl.files.writing import wait_for
from imagerl.rl.run.folder import RunFolder, told_changes
from imagerl.rl.run.trackers import refuse_missing


def open_run(
    engine: Engine, folder: RunFolder, recipe: AnyRecipe, resume: bool | int, overwrite: bool
) -> Checkpoint | None:
    """Return the checkpoint to continue from, None for a run from its start. The folder is locked, until
    `folder.release()`, and else as it was.

    Raises ImageRLError, on all processes alike, when the folder is in use, cannot be written to, or holds what the
    command must not touch."""
    checkpoint = None
    refuse_missing(recipe.run.report_to)

    def look() -> Path | None:
        nonlocal checkpoint
        folder.lock()
        if resume is False:
            folder.refuse_loss(recipe, overwrite)
            return None
        checkpoint = folder.resumable(recipe, None if resume is True else resume)
        if checkpoint and (told := told_changes(checkpoint, recipe, engine.world_size)):
            print(f"imagerl: {told}", file=sys.stderr)
        return checkpoint.folder if checkpoint else None

    chosen = engine.on_main(look)
    if engine.is_main or chosen is None:
        return checkpoint
    wait_for(chosen / MANIFEST)
    return load_checkpoint(chosen, verify=False)


def begin_run(
    engine: Engine, folder: RunFolder, recipe: AnyRecipe, overwrite: bool, command: Sequence[str] | None
) -> None:
    """Write the recipe and the environment into the folder, once everything else is found in order. Of a run begun
    from Python the command is one that repeats it."""
    repeat = ["imagerl", recipe.kind, f"{folder.path}/recipe.yaml", "run.output_dir=NEW_FOLDER"]
    engine.on_main(lambda: folder.begin(recipe, command or repeat, overwrite))


@contextmanager
def settings_kept() -> Iterator[None]:
    """Inside, settings of the process may change: of torch and Accelerate, environment, random numbers. Afterwards they
    are as before."""
    import torch  # before it is looked at  # noqa: F401
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from imagerl.rewards.boundary.guard import process_kept

    kept = [(state, dict(state._shared_state)) for state in (PartialState, AcceleratorState, GradientState)]
    with process_kept():
        try:
            yield
        finally:
            for state, values in kept:
                state._shared_state.clear()
                state._shared_state.update(values)
