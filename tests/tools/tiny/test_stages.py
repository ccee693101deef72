from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.rl.data.tiny.shapes import metadata
from imagerl.rl.data.tiny.world import FONTS, render
from imagerl.rl.engine.schedule import learning_rate
from imagerl.rl.errors import ImageRLError
from tests.micro import micro_policy
from tools.tiny.config import GeneratorStage, StageConfig
from tools.tiny.samples import captions, pictures, samples, scenes
from tools.tiny.stages import (
    fit,
    fit_generator,
    fit_reconstruction,
    latent_scale,
    reconstruction_loss,
    token_loss,
)

CPU = torch.device("cpu")
Log = list[tuple[str, int, dict[str, float]]]


def stage(**changes: Any) -> StageConfig:
    return StageConfig(**({"steps": 30, "batch_size": 4, "warmup_steps": 2, "bf16": False} | changes))


def generator_stage(**changes: Any) -> GeneratorStage:
    defaults = {"steps": 12, "batch_size": 4, "lr": 3e-3, "warmup_steps": 1, "bf16": False}
    return GeneratorStage(**(defaults | changes))


def unfrozen_policy() -> ImagePolicy:
    policy, _ = micro_policy()
    policy.decoder.requires_grad_(True)
    return policy


@pytest.mark.parametrize(("warmup", "decay"), [(10, 0.5), (0, 0.0), (1, 1.0)])
def test_the_learning_rate_rises_stays_and_falls(warmup: int, decay: float) -> None:
    """The engine's schedule: rate k / warm-up at update k, constant, then a line that ends one update before zero."""
    settings = stage(steps=100, lr=1.0, warmup_steps=warmup, decay_share=decay).optim()
    rates = [learning_rate(step, 100, settings) for step in range(100)]
    rising = [min(1.0, (step + 1) / max(1, warmup)) for step in range(100)]
    falling = [(100 - step) / max(1.0, 100 * decay) for step in range(100)]
    assert rates == pytest.approx([min(pair) for pair in zip(rising, falling, strict=True)])


def test_batches_are_functions_of_seed_stage_and_step() -> None:
    batch = scenes(0, "generator", 3, 6)
    assert scenes(0, "generator", 3, 6) == batch
    assert scenes(0, "generator", 3, 4) == batch[:4]
    for other in (scenes(1, "generator", 3, 6), scenes(0, "tokenizer", 3, 6), scenes(0, "generator", 4, 6)):
        assert not set(other) & set(batch)
    assert {scene.font for scene in scenes(0, "generator", 0, 20, FONTS[1:2])} == {FONTS[1]}
    assert captions(0, 3) == [scene.caption for scene in scenes(0, "captions", 0, 3)]


def test_pictures_are_between_minus_one_and_one() -> None:
    batch = scenes(0, "x", 0, 2)
    tensor = pictures(batch)
    assert tensor.shape == (2, 3, 32, 64) and tensor.dtype == torch.float32
    for row, scene in zip(tensor, batch, strict=True):
        for x, y in ((0, 0), (30, 15), (33, 16)):
            wanted = [value / 127.5 - 1 for value in render(scene).getpixel((x, y))]
            assert row[:, y, x].tolist() == pytest.approx(wanted, abs=1e-6)


def test_reconstruction_loss_by_hand() -> None:
    assert reconstruction_loss(torch.tensor([0.0, 1.0]), torch.tensor([0.5, -1.0])).item() == pytest.approx(
        (0.5 + 2) / 2 + (0.25 + 4) / 2
    )


@torch.no_grad()
def test_token_loss_by_hand() -> None:
    """Cross-entropy over the whole vocabulary of every token and of the end tag, so that text is unlearned too."""
    policy, _ = micro_policy()
    ar, vocabulary = policy.trainable, policy.vocabulary
    random_numbers = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 32, generator=random_numbers)
    tokens = torch.randint(16, (2, 8), generator=random_numbers)
    total = 0.0
    for row in range(2):
        wanted = [vocabulary.image_start_token_id + int(token) for token in tokens[row]]
        for position, token in enumerate([*wanted, vocabulary.image_end_tag_id]):
            logits = ar.lm.lm_head.weight.double() @ hidden[row, position].double()
            total -= (logits[token] - logits.logsumexp(0)).item()
    assert token_loss(ar, hidden, tokens).item() == pytest.approx(total / 18, rel=1e-5)


def test_latents_get_the_size_of_the_noise() -> None:
    policy, _ = micro_policy()

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return policy.decoder.vae.encode(pixels).latent

    scale = latent_scale(encode, stage(), 0, CPU)
    with torch.no_grad():
        latents = encode(pictures(scenes(0, "other pictures", 0, 64))) * scale
    assert latents.std().item() == pytest.approx(1.0, rel=0.1)
    assert latent_scale(encode, stage(), 0, CPU) == scale


def test_a_stage_without_fonts_learns_from_shapes_never_those_held_out() -> None:
    batch = samples(0, "generator", 3, 300, stage(fonts=[]))
    assert samples(0, "generator", 3, 300, stage(fonts=[])) == batch
    assert pictures(batch[:2]).shape == (2, 3, 32, 64)
    taught = {line["prompt"] for lines in metadata("train").values() for line in lines}
    assert len({one.caption for one in batch}) > 100 and {one.caption for one in batch} <= taught
    assert captions(0, 3, stage(fonts=[]))[0].startswith("a photo of ")
    assert samples(0, "generator", 3, 4, stage()) == scenes(0, "generator", 3, 4)


def test_fit_minimises_repeatably_and_leaves_frozen_parts_alone() -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
        module[0].requires_grad_(False)
        before = module[0].weight.clone()
        log: Log = []

        def loss_of(step: int, module: nn.Module = module) -> tuple[torch.Tensor, dict[str, float]]:
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
            return (module(x) - 2).square().mean(), {"extra": float(step)}

        fit("x", module, loss_of, stage(lr=0.1), lambda *entry, log=log: log.append(entry), every=10)
        assert torch.equal(module[0].weight, before) and not module.training
        runs.append([(name, step, metrics["loss"], metrics["extra"]) for name, step, metrics in log])
    assert runs[0] == runs[1]
    assert [entry[1] for entry in runs[0]] == [0, 10, 20, 29]
    assert runs[0][-1][2] < 0.3 * runs[0][0][2]


def test_a_diverged_stage_stops_and_says_what_to_do() -> None:
    module = nn.Linear(1, 1)
    with pytest.raises(ImageRLError, match=r"gradient norm is nan at update 1; lower"):
        fit("tokenizer", module, lambda _: (module.weight.sum() * math.nan, {}), stage(), lambda *_: None)


@pytest.mark.parametrize("bf16", [False, True])
def test_reconstruction_is_learned(bf16: bool) -> None:
    policy, _ = micro_policy()
    log: Log = []
    fit_reconstruction(
        "tokenizer",
        policy.image_tokenizer,
        policy.image_tokenizer,
        stage(lr=1e-2, bf16=bf16),
        0,
        CPU,
        lambda *entry: log.append(entry),
    )
    assert log[-1][2]["loss"] < 0.8 * log[0][2]["loss"]


def test_both_halves_of_the_generator_learn() -> None:
    policy = unfrozen_policy()
    before = {name: p.clone() for name, p in policy.decoder.named_parameters()}
    tokenizer = [p.clone() for p in policy.image_tokenizer.parameters()]
    log: Log = []
    snapshots: list[int] = []
    fit_generator(
        "generator", policy, generator_stage(snapshot_every=5), 0, lambda *e: log.append(e), snapshots.append
    )
    first, last = log[0][2], log[-1][2]
    assert last["cross_entropy"] < 0.8 * first["cross_entropy"]
    assert first["loss"] == pytest.approx(first["cross_entropy"] + first["flow"], rel=1e-5)
    assert snapshots == [5, 10]
    changed = {name for name, p in policy.decoder.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.startswith("sana.") for name in changed)
    assert any(name.startswith("connector.") for name in changed)
    assert not any(name.startswith("vae.") for name in changed)
    assert all(torch.equal(p, q) for p, q in zip(policy.image_tokenizer.parameters(), tokenizer, strict=True))


def test_the_flow_loss_sees_its_share_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = unfrozen_policy()
    seen = []
    plain = policy.decoder.flow_loss

    def watched(hidden: torch.Tensor, latents: torch.Tensor, sigma: torch.Tensor, *rest: torch.Tensor) -> Any:
        seen.append((len(hidden), len(latents), len(sigma)))
        return plain(hidden, latents, sigma, *rest)

    monkeypatch.setattr(policy.decoder, "flow_loss", watched)
    settings = generator_stage(steps=1, flow_share=0.5, flow_weight=0.25)
    log: Log = []
    fit_generator("generator", policy, settings, 0, lambda *e: log.append(e))
    assert seen == [(2, 2, 2)]
    metrics = log[0][2]
    assert metrics["loss"] == pytest.approx(metrics["cross_entropy"] + 0.25 * metrics["flow"], rel=1e-5)
