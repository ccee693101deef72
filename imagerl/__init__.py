"""ImageRL: reinforcement-learning post-training for image generators, half autoregressive and half flow matching.

Everything here is imported when it is first used::

    import imagerl

    check = imagerl.check_reward(my_reward)
    run = imagerl.train("tiny_ocr_grpo", ["run.steps=20"], rewards=["ocr", my_reward])
    imagerl.evaluate(run, "ocr", n=64, against="tiny")

What the user can mend is an `ImageRLError`, whose message is one line. docs/api.md has the whole of it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imagerl.api.checking import CheckResult, check_reward
    from imagerl.api.comparing import ComparisonResult, compare
    from imagerl.api.drawing import load_policy
    from imagerl.api.evaluating import EvaluationResult, evaluate
    from imagerl.api.exporting import ExportResult, export
    from imagerl.api.recipes import list_recipes, load_recipe
    from imagerl.api.runs import TrainingResult, load_run
    from imagerl.api.sampling import Samples, sample
    from imagerl.api.training import train
    from imagerl.rl.errors import ImageRLError
    from imagerl.rl.rollout.engine import RolloutEngine
    from imagerl.rl.types import Prompt, RewardOutput, SamplingParams

_PLACES = {
    "imagerl.api.checking": ("CheckResult", "check_reward"),
    "imagerl.api.comparing": ("ComparisonResult", "compare"),
    "imagerl.api.drawing": ("load_policy",),
    "imagerl.api.evaluating": ("EvaluationResult", "evaluate"),
    "imagerl.api.exporting": ("ExportResult", "export"),
    "imagerl.api.recipes": ("list_recipes", "load_recipe"),
    "imagerl.api.runs": ("TrainingResult", "load_run"),
    "imagerl.api.sampling": ("Samples", "sample"),
    "imagerl.api.training": ("train",),
    "imagerl.rl.errors": ("ImageRLError",),
    "imagerl.rl.rollout.engine": ("RolloutEngine",),
    "imagerl.rl.types": ("Prompt", "RewardOutput", "SamplingParams"),
}
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}

__all__ = [
    "CheckResult",
    "ComparisonResult",
    "EvaluationResult",
    "ExportResult",
    "ImageRLError",
    "Prompt",
    "RewardOutput",
    "RolloutEngine",
    "Samples",
    "SamplingParams",
    "TrainingResult",
    "check_reward",
    "compare",
    "evaluate",
    "export",
    "list_recipes",
    "load_policy",
    "load_recipe",
    "load_run",
    "sample",
    "train",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("imagerl")
    if name not in _PLACE_OF:
        raise AttributeError(f"module 'imagerl' has no attribute {name!r}; it has: {', '.join(__all__)}")
    found = getattr(import_module(_PLACE_OF[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
