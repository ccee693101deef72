"""Fine-tuning small enough for unit tests: the micro model on a few rendered pictures."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import yaml

from imagerl.api.fine_tuning import open_sources
from imagerl.models.base import Policy
from imagerl.rl.config.recipe import apply_override, validate_recipe
from imagerl.rl.config.sft import SFTRecipe
from imagerl.rl.data.image_data import ImageStream
from imagerl.rl.data.image_files import Example, Limits, load_example
from imagerl.rl.engine.engine import Engine
from imagerl.rl.sft.objective import learning_rate_share, lessons_for
from imagerl.rl.sft.trainer import Collator, SFTTrainer
from imagerl.rl.types import Prompt
from tools.tiny.render import rendered, write_folder, write_shards

LIMITS = Limits(max_pixels=1 << 20, min_side=8, max_aspect=4.0, max_caption_chars=200)


def write_pictures(folder: Path) -> None:
    """`train` (20 loose pictures), `shards` (3 tars of 7) and `heldout` (6)."""
    write_folder(folder / "train", rendered(20, "train", 0))
    write_shards(folder / "shards", rendered(21, "train", 1), 7)
    write_folder(folder / "heldout", rendered(6, "heldout", 0))


def recipe_data(folder: Path, *overrides: str) -> dict[str, Any]:
    data: dict[str, Any] = {
        "kind": "sft",
        "run": {"steps": 6, "output_dir": str(folder / "run"), "sample_prompts": 2},
        "model": {"path": str(folder / "model")},
        "data": {
            "train": [str(folder / "train"), {"path": str(folder / "shards"), "weight": 0.5}],
            "heldout": [str(folder / "heldout")],
            "batch_size": 4,
            "open_shards": 2,
        },
        "optim": {"lr": 0.003, "min_lr": 0.0, "eps": 1e-4},
        "engine": {"device": "cpu", "threads": 1, "micro_batch_size": 2},
        "eval": {"size": 6},
        "checkpoint": {"every": 2},
    }
    for override in overrides:
        apply_override(SFTRecipe, data, override)
    return data


def write_recipe(folder: Path, *overrides: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(recipe_data(folder, *overrides)))
    return path


def recipe(folder: Path, *overrides: str) -> SFTRecipe:
    return validate_recipe(SFTRecipe, recipe_data(folder, *overrides), "test")


def examples(policy: Policy, folder: Path, count: int) -> list[Example]:
    from imagerl.rl.data.image_sources import open_source

    entries = open_source(str(folder / "train"))[0].entries()
    return [
        load_example(entry, policy.prompts.canvas(Prompt(0, "")).pixels, LIMITS) for entry in entries[:count]
    ]


def small_trainer(policy: Policy, settings: SFTRecipe) -> SFTTrainer:
    """Put together as the command line does it."""
    engine = Engine(settings.engine)
    lessons = lessons_for(policy, settings)
    share = partial(learning_rate_share, settings, lessons)
    engine.prepare(lessons.trainable, settings.optim, settings.run.steps, None, share)
    stream = ImageStream(
        open_sources(settings.data.train, settings.data, settings.run.seed),
        [source.weight for source in settings.data.train],
        settings.run.seed,
        lambda entry: load_example(entry, policy.prompts.canvas(Prompt(0, "")).pixels, LIMITS),
    )
    return SFTTrainer(settings, lessons, stream, Collator(policy, lessons, engine), engine)
