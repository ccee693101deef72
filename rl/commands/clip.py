"""`imagerl clip`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from imagerl.rl.commands.options import Overrides


def clip(
    recipe: Annotated[str, typer.Argument(help="recipe YAML of kind clip")], overrides: Overrides = None
) -> None:
    """Train a small CLIP, a judge of pictures for rewards, from pictures rendered on the fly."""
    import json
    from dataclasses import asdict

    import torch

    from imagerl.rewards.clip.building import build_tokenizer, new_model, preprocessing, save_model
    from imagerl.rewards.clip.models import load_clip
    from imagerl.rl.config.recipe import load_yaml_recipe
    from imagerl.rl.data.seeding import derive_seed
    from imagerl.rl.evaluation.stats import number, span
    from imagerl.rl.files.environment import write_environment
    from imagerl.rl.files.metrics import to_json
    from imagerl.rl.files.writing import write_atomic
    from imagerl.rl.sft.pretraining.clip import fit_clip, measure
    from imagerl.rl.sft.pretraining.clip_config import ClipRecipe
    from imagerl.rl.sft.pretraining.stages import captions, resolve_device

    settings = load_yaml_recipe(ClipRecipe, recipe, overrides or [])
    if settings.run.threads:
        torch.set_num_threads(settings.run.threads)
    seed, out = settings.run.seed, Path(settings.run.output_dir)
    tokenizer = build_tokenizer(captions(seed, 2000), settings.vocabulary)
    torch.manual_seed(derive_seed(seed, "init"))
    model, model_cfg = new_model(settings.model, tokenizer)
    model.to(resolve_device(settings.run.device))
    prepare = preprocessing(settings.preprocess)
    length = model_cfg["text_cfg"]["context_length"]

    def log(name: str, step: int, metrics: dict[str, float]) -> None:
        shown = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
        print(f"{name} {step}: {shown}", flush=True)

    started, used = time.perf_counter(), time.process_time()
    fit_clip(
        model,
        lambda pictures: torch.stack([prepare(picture) for picture in pictures]),
        lambda texts: (
            tokenizer(
                texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).input_ids
        ),
        settings.training,
        seed,
        log,
    )
    minutes = {
        "wall": (time.perf_counter() - started) / 60,
        "processor": (time.process_time() - used) / 60,
    }
    save_model(model, model_cfg, settings.preprocess, tokenizer, out / "model")
    judge = load_clip(str(out / "model"))
    measured = measure(judge.encode_pictures, judge.encode_captions, settings.measured, seed)
    for name, interval in measured.items():
        print(f"{name:>20}  {number(interval.mean)}  ({span(interval)}, n={interval.n})")
    write_environment(out, [])
    document = {
        "recipe": settings.model_dump(mode="json"),
        "minutes": minutes,
        "measured": {name: asdict(interval) for name, interval in measured.items()},
        "environment": json.loads((out / "environment.json").read_text(encoding="utf-8")),
    }
    write_atomic(out / "model" / "training.json", to_json(document, indent=1) + "\n")
    print(f"model: {out / 'model'}")
