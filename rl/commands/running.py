"""What every command that makes a run does with its folder, on any number of processes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from rl.checkpoint import Checkpoint, load_checkpoint
from rl.engine import Engine
from rl.environment import write_environment
from rl.errors import ImageRLError
from rl.run_folder import RunFolder

T = TypeVar("T")


def open_run(
    engine: Engine, folder: RunFolder, recipe: Any, resume: bool, overwrite: bool
) -> Checkpoint | None:
    """The checkpoint to continue from, None for a run from its start. Writes nothing.

    Raises ImageRLError, on all processes alike, when the folder holds what the command must not touch."""
    if not resume:
        on_main(engine, folder.refuse_foreign if overwrite else folder.refuse_run)
        return None
    newest = on_main(engine, lambda: folder.resumable(recipe))
    return load_checkpoint(newest) if newest else None


def begin_run(engine: Engine, folder: RunFolder, recipe: Any, overwrite: bool) -> None:
    """Write the recipe and the environment into the folder, once everything else is found in order."""

    def begin() -> None:
        folder.begin(recipe, overwrite)
        write_environment(folder.path, sys.argv)

    on_main(engine, begin)


def on_main(engine: Engine, action: Callable[[], T]) -> T:
    """Do something on the main process only; what it returns, or its ImageRLError, comes to all of them."""
    outcome: Any = None
    if engine.is_main:
        try:
            outcome = action()
        except ImageRLError as error:
            outcome = error
    outcome = engine.gather_objects(outcome)[0]
    if isinstance(outcome, ImageRLError):
        raise outcome
    return outcome
