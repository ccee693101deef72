"""Trackers: a run's numbers, pictures, alarms and results, told to the services that people watch runs with.

Accelerate begins and ends each tracker and takes numbers and settings. Pictures, words and tables have no common
interface there, so a class below calls what the tracker itself has for them. A tracker that fails is told of once and
left out from then on: no run ends because of who watches it.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image

from imagerl.rl.errors import ImageRLError, one_line
from imagerl.rl.files.reading import read_json
from imagerl.rl.files.writing import write_atomic, write_error
from imagerl.rl.run.folder import TRACKERS_FILE

_logger = logging.getLogger(__name__)


class Tracker:
    """A tracker that is known by Accelerate's interface alone. `options` are what Accelerate passes to its start."""

    def __init__(self, name: str, project: str, options: Mapping[str, object]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        self.name = name
        self.accelerated = LOGGER_TYPE_TO_CLASS[name](project, **options)
        self.accelerated.start()

    @classmethod
    def options(cls, folder: Path, known: Mapping[str, str], resume_step: int | None) -> dict[str, object]:
        """Return what the run in `folder` is called, and how its line is found again."""
        return {"name": folder.resolve().name, "id": known["id"], "resume": "allow"}

    def identity(self) -> dict[str, str]:
        """Return what only the tracker knows and a resumed run must."""
        return {}

    def settings(self, settings: Mapping[str, object]) -> None:
        self.accelerated.store_init_configuration(dict(settings))

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.accelerated.log(dict(values), step=step)

    def pictures(self, step: int, grid: Path, images: Sequence[np.ndarray], captions: Sequence[str]) -> None:
        """Show pictures [H, W, 3], each with its caption; `grid` is a file of all of them with captions drawn."""
        image = import_module(self.name).Image
        shown = [
            image(Image.fromarray(i), caption=caption) for i, caption in zip(images, captions, strict=True)
        ]
        self.accelerated.log({"samples": shown}, step=step)

    def alarm(self, step: int, text: str) -> None:
        self.accelerated.tracker.alert(title="alarm", text=text)

    def table(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        table = import_module(self.name).Table(columns=list(columns), data=[list(row) for row in rows])
        self.accelerated.log({"held-out": table}, step=step)

    def finish(self) -> None:
        self.accelerated.finish()


class Trackio(Tracker):
    @classmethod
    def options(cls, folder: Path, known: Mapping[str, str], resume_step: int | None) -> dict[str, object]:
        # It knows runs by name, and folders of several projects have the same.
        name = f"{folder.resolve().name}-{known['id'][:4]}"
        return {"name": name, "resume": "allow", "auto_log_gpu": False, "auto_log_cpu": False}

    def pictures(self, step: int, grid: Path, images: Sequence[np.ndarray], captions: Sequence[str]) -> None:
        image = import_module(self.name).Image
        shown = {
            f"samples/{place}": image(pixels, caption=caption)
            for place, (pixels, caption) in enumerate(zip(images, captions, strict=True))
        }
        self.accelerated.log(shown, step=step)


class Swanlab(Tracker):
    def alarm(self, step: int, text: str) -> None:
        self.accelerated.log({"alarms": import_module(self.name).Text(text)}, step=step)

    def table(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        self.accelerated.log({"held-out": import_module(self.name).Text(markdown(columns, rows))}, step=step)


class TensorBoard(Tracker):
    """Events in `tb/` of the run folder. Steps after the checkpoint that a run resumes from are forgotten."""

    @classmethod
    def options(cls, folder: Path, known: Mapping[str, str], resume_step: int | None) -> dict[str, object]:
        forgotten = {} if resume_step is None else {"purge_step": resume_step + 1}
        return {"logging_dir": str(folder), **forgotten}

    def settings(
        self, settings: Mapping[str, object]
    ) -> None:  # Accelerate's would make a run of its own of them
        lines = [f"    {key}: {value}" for key, value in settings.items()]
        self.accelerated.log({"recipe": "\n".join(lines)}, step=0)

    def pictures(self, step: int, grid: Path, images: Sequence[np.ndarray], captions: Sequence[str]) -> None:
        pixels = np.asarray(Image.open(grid).convert("RGB"))[None]
        self.accelerated.log_images({"samples": pixels}, step=step, dataformats="NHWC")

    def alarm(self, step: int, text: str) -> None:
        self.accelerated.log({"alarms": text}, step=step)

    def table(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        self.accelerated.log({"held-out": markdown(columns, rows)}, step=step)


class MLflow(Tracker):
    @classmethod
    def options(cls, folder: Path, known: Mapping[str, str], resume_step: int | None) -> dict[str, object]:
        return {"run_name": folder.resolve().name, "run_id": known.get("mlflow")}

    def identity(self) -> dict[str, str]:
        return {"mlflow": self.accelerated.tracker.info.run_id}

    def settings(self, settings: Mapping[str, object]) -> None:
        # Parameters are written once, and a resumed run may have other ones than it began with.
        import_module(self.name).log_dict(dict(settings), "recipe.json")

    def pictures(self, step: int, grid: Path, images: Sequence[np.ndarray], captions: Sequence[str]) -> None:
        self.accelerated.log_artifact(str(grid), "samples")

    def alarm(self, step: int, text: str) -> None:
        import_module(self.name).set_tag(f"alarm at step {step}", text)

    def table(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        import_module(self.name).log_text(markdown(columns, rows), "held-out.md")


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Tracker,
    "trackio": Trackio,
    "mlflow": MLflow,
    "swanlab": Swanlab,
}


class Trackers:
    """The trackers that a run reports to."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = list(trackers)

    @classmethod
    def begin(
        cls,
        names: Sequence[str],
        project: str,
        folder: Path,
        settings: Mapping[str, object],
        resume_step: int | None = None,
    ) -> Trackers:
        """Start trackers for the run in `folder`, or let them go on after `resume_step`.

        Raises ImageRLError for one that cannot be started, such as one that nobody is logged in to."""
        file = folder / TRACKERS_FILE
        known: dict[str, str] = (
            read_json(file) if resume_step is not None and file.is_file() else {"id": uuid.uuid4().hex[:12]}
        )
        begun = []
        for name in names:
            kind = TRACKERS[name]
            place = "tb" if name == "tensorboard" else project
            try:
                tracker = kind(name, place, kind.options(folder, known, resume_step))
                known |= tracker.identity()
                tracker.settings(flat(settings))
            except Exception as error:  # of a library that is not ours
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    raise write_error(folder, error) from error
                raise ImageRLError(
                    f"{name} could not be started ({one_line(error, 200)}); log in to it, choose its offline mode, or "
                    "take it out of run.report_to, and go on with --resume"
                ) from error
            begun.append(tracker)
        if set(names) - {"tensorboard"}:
            write_atomic(file, json.dumps(known) + "\n")
        return cls(begun)

    def numbers(self, step: int, values: Mapping[str, float | None]) -> None:
        """Tell metrics; what is not measured is left out."""
        known = {key: float(value) for key, value in values.items() if value is not None}
        self._each(lambda tracker: tracker.numbers(step, known))

    def pictures(self, step: int, grid: Path, images: Sequence[np.ndarray], captions: Sequence[str]) -> None:
        """Show a grid of samples: its file, and its pictures with their captions."""
        self._each(lambda tracker: tracker.pictures(step, grid, images, captions))

    def alarm(self, step: int, text: str) -> None:
        self._each(lambda tracker: tracker.alarm(step, text))

    def table(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Show the final results."""
        self._each(lambda tracker: tracker.table(step, columns, rows))

    def finish(self) -> None:
        self._each(lambda tracker: tracker.finish())
        self._trackers.clear()

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                tell(tracker)
            except Exception as error:  # of a library that is not ours, or its service
                self._trackers.remove(tracker)
                _logger.warning("%s failed and is told nothing more: %s", tracker.name, one_line(error, 200))


def refuse_missing(names: Sequence[str]) -> None:
    """Raises ImageRLError for a tracker that is not installed, with the package that holds it."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ImageRLError(f"run.report_to: {name} is not installed; pip install {name}, or leave it out")


def flat(settings: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return settings by dotted key, lists as JSON: trackers take numbers, words and None only."""
    found: dict[str, object] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, list) else value
    return found


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Write a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
