"""Contrastive training of a small CLIP on the tiny world, and what it has learned.

Every batch is a pure function of (seed, step)."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from imagerl.rewards.clip.models import load_clip
from imagerl.rl.config.engine import EngineConfig
from imagerl.rl.data.seeding import derive_seed
from imagerl.rl.data.tiny.pictures import KINDS
from imagerl.rl.data.tiny.world import (
    BACKGROUNDS,
    DIGITS,
    FONTS,
    INKS,
    LETTERS,
    Scene,
    prompt_set,
    render,
    split_of,
)
from imagerl.rl.engine.engine import Engine
from imagerl.rl.evaluation.stats import Interval, number, span, wilson_interval
from imagerl.rl.files.environment import write_environment
from imagerl.rl.files.metrics import to_json
from imagerl.rl.files.writing import write_atomic
from imagerl.rl.types import Prompt
from tools.tiny.clip_model import build_tokenizer, new_model, preprocessing, save_model
from tools.tiny.config import ClipRecipe, ClipStage
from tools.tiny.samples import captions, scenes
from tools.tiny.stages import LogFn, fit

PARTS = ("text", "ink", "background")
BLOCK = 64  # pictures among which one is looked for
# Pictures that answer no prompt at all.
POOR = [draw for _, role, draw in KINDS if role in ("degenerate", "hack")]
MAX_SCALE = 100.0  # of the logits, as in arXiv 2103.00020


Encode = Callable[[Sequence[Image.Image]], Tensor]
Tokenize = Callable[[list[str]], Tensor]


def altered(scene: Scene, part: str, rng: random.Random) -> Scene:
    """Return the scene with one thing wrong: one letter or digit, the ink, or the background."""
    if part != "text":
        choices = [name for name in (INKS if part == "ink" else BACKGROUNDS) if name != getattr(scene, part)]
        return replace(scene, **{part: rng.choice(choices)})
    place = rng.randrange(len(scene.text))
    alphabet = DIGITS if scene.text[place] in DIGITS else LETTERS
    letter = rng.choice([letter for letter in alphabet if letter != scene.text[place]])
    return replace(scene, text=scene.text[:place] + letter + scene.text[place + 1 :])


def trainable(scene: Scene, part: str, rng: random.Random) -> Scene:
    """Return `altered`, but never with a held-out text, not even as a wrong one."""
    while True:
        other = altered(scene, part, rng)
        if split_of(other.text) == "train":
            return other


def contrastive_loss(pictures: Tensor, captions: Tensor, count: int, scale: Tensor) -> Tensor:
    """Return the symmetric cross-entropy (arXiv 2103.00020) of B = `count` captions with their pictures.

    `pictures` [B + P, D] and `captions` [B + W, D] are normalised, and the first B of each belong together. The others
    answer nothing: P pictures that no caption may choose, W captions that no picture may."""
    right = torch.arange(count, device=pictures.device)
    logits = scale * pictures.float() @ captions.float().T
    of_pictures = F.cross_entropy(logits[:count], right)
    return (of_pictures + F.cross_entropy(logits[:, :count].T, right)) / 2


def fit_clip(model: Any, encode: Encode, tokenize: Tokenize, stage: ClipStage, seed: int, log: LogFn) -> None:
    """Train a model of open_clip's shape: `encode_image`, `encode_text`, `logit_scale`. `encode` turns PIL pictures
    into its input [B, 3, H, W], `tokenize` texts into [B, L]."""
    device = next(model.parameters()).device

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        batch = scenes(seed, "clip", step, stage.batch_size, stage.fonts)
        rng = random.Random(derive_seed(seed, "clip wrong", step))
        wrong = [trainable(scene, PARTS[n % 3], rng) for n in range(stage.wrong_captions) for scene in batch]
        poor = [rng.choice(POOR)(scene, rng) for scene in batch[: stage.poor_pictures]]
        pixels = encode([*(render(scene) for scene in batch), *poor]).to(device)
        tokens = tokenize([scene.caption for scene in [*batch, *wrong]]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=stage.bf16):
            pictures = model.encode_image(pixels, normalize=True)
            captions = model.encode_text(tokens, normalize=True)
        scale = model.logit_scale.exp().clamp(max=MAX_SCALE)
        loss = contrastive_loss(pictures, captions, len(batch), scale)
        return loss, {"scale": scale.item()}

    fit("clip", model, loss_of, stage, log)


def measure(encode_pictures: Encode, encode_captions: Tokenize, count: int, seed: int) -> dict[str, Interval]:
    """Measure a model on `count` held-out pictures, whole BLOCKs of them: shares with their 95 % intervals.

    `caption_of_64` and `picture_of_64`: the right one is nearest among those of 64 held-out texts. `caption/<part>` and
    `picture/<part>`: the right one is nearer than the same with one thing wrong: a letter, the ink, the background.
    Both functions return features [B, D] of length 1."""
    rng = random.Random(derive_seed(seed, "clip measure"))
    right = [_scene(prompt, rng) for prompt in prompt_set("heldout", count - count % BLOCK, seed)]

    def pictures_of(some: Sequence[Scene]) -> Tensor:
        return encode_pictures([render(scene) for scene in some])

    def captions_of(some: Sequence[Scene]) -> Tensor:
        return encode_captions([scene.caption for scene in some])

    pictures, captions = pictures_of(right), captions_of(right)
    blocks = (
        pictures.unflatten(0, (-1, BLOCK)) @ captions.unflatten(0, (-1, BLOCK)).mT
    )  # [blocks, pictures, captions]
    found = {
        "caption_of_64": blocks.argmax(dim=2) == torch.arange(BLOCK),
        "picture_of_64": blocks.argmax(dim=1) == torch.arange(BLOCK),
    }
    own = (pictures * captions).sum(dim=1)
    for part in PARTS:
        wrong = [altered(scene, part, rng) for scene in right]
        found[f"caption/{part}"] = own > (pictures * captions_of(wrong)).sum(dim=1)
        found[f"picture/{part}"] = own > (pictures_of(wrong) * captions).sum(dim=1)
    return {name: wilson_interval(int(hits.sum()), len(right)) for name, hits in found.items()}


def _scene(prompt: Prompt, rng: random.Random) -> Scene:
    columns = prompt.columns
    return Scene(columns["target"], columns["ink"], columns["background"], rng.choice(FONTS))


def run(recipe: ClipRecipe) -> Path:
    """Train the model of a recipe, measure it and write its folder, which is returned."""
    device = Engine(EngineConfig(device=recipe.run.device, threads=recipe.run.threads)).device
    seed, out = recipe.run.seed, Path(recipe.run.output_dir)
    tokenizer = build_tokenizer(captions(seed, 2000), recipe.vocabulary)
    torch.manual_seed(derive_seed(seed, "init"))
    model, model_cfg = new_model(recipe.model, tokenizer)
    model.to(device)
    prepare = preprocessing(recipe.preprocess)
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
        recipe.training,
        seed,
        log,
    )
    minutes = {
        "wall": (time.perf_counter() - started) / 60,
        "processor": (time.process_time() - used) / 60,
    }
    save_model(model, model_cfg, recipe.preprocess, tokenizer, out / "model")
    judge = load_clip(str(out / "model"))
    measured = measure(judge.encode_pictures, judge.encode_captions, recipe.measured, seed)
    for name, interval in measured.items():
        print(f"{name:>20}  {number(interval.mean)}  ({span(interval)}, n={interval.n})")
    write_environment(out, [])
    document = {
        "recipe": recipe.model_dump(mode="json"),
        "minutes": minutes,
        "measured": {name: asdict(interval) for name, interval in measured.items()},
        "environment": json.loads((out / "environment.json").read_text(encoding="utf-8")),
    }
    write_atomic(out / "model" / "training.json", to_json(document, indent=1) + "\n")
    return out / "model"
