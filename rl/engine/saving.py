"""Checkpoints that are written while training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from imagerl.rl.engine.checkpoint import save_checkpoint


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a run after a step, copied to host memory: no later step changes it."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]  # group -> name -> whole tensor; empty groups but on rank 0
    state: Mapping[str, object]


class Saver:
    """Writes checkpoints one after the other in a thread of its own. Copying to host memory is all that holds up the
    accelerator; hashing and the disk do not."""

    def __init__(self) -> None:
        self._writer = ThreadPoolExecutor(1, "checkpoint")  # the interpreter waits for it when it ends
        self._write: Future[None] | None = None
        self._handed: dict[Path, int] = {}  # place -> step last handed over, unless it could not be written

    def has(self, place: Path, step: int) -> bool:
        """Tell whether the newest checkpoint in `place`, written or in the making, is that of `step`."""
        return self._handed.get(place) == step

    def save(self, place: Path, snapshot: Snapshot, keep: int) -> None:
        """Hand a snapshot over, once the one before is written: memory holds that one and the newest.

        Raises:
            ImageRLError: the one before could not be written.
        """
        self.wait()
        self.add(place, snapshot, keep)

    def add(self, place: Path, snapshot: Snapshot, keep: int) -> None:
        """Hand a snapshot over at once; for a run that comes to its end."""
        self._handed[place] = snapshot.step
        self._write = self._writer.submit(self._save, place, snapshot, keep)

    def _save(self, place: Path, snapshot: Snapshot, keep: int) -> None:
        try:
            save_checkpoint(place, snapshot.step, snapshot.tensors, snapshot.state, keep)
        except BaseException:
            self._handed.pop(place, None)
            raise

    def check(self) -> None:
        """Raise the ImageRLError of a save that has failed meanwhile."""
        if self._write is not None and self._write.done():
            self.wait()

    def wait(self) -> None:
        """Wait until all is written.

        Raises:
            ImageRLError: the last one could not be.
        """
        write, self._write = self._write, None
        if write is not None:
            write.result()

    def close(self) -> None:
        """End the thread, once all is written: who calls `train` finds none of it left."""
        self._writer.shutdown()
