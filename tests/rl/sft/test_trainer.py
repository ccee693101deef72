"""The published objective against direct computations, and what a recipe freezes."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.models.blip3o_next.supervised import Lessons, SupervisedModule, prompt_targets
from imagerl.models.common import supervised
from imagerl.models.common.supervised import noise_levels, token_nll
from imagerl.rl.data.image_files import Example
from imagerl.rl.data.seeding import generator
from imagerl.rl.sft.objective import lessons_for
from imagerl.rl.sft.trainer import Collator, SFTBatch, of_one_kind
from imagerl.rl.types import SamplingParams
from tests.micro import MODEL, micro_policy
from tests.models.helpers import stir
from tests.small_sft import examples, recipe, small_trainer, write_pictures
from tools.tiny.model import new_policy
from tools.tiny.samples import captions

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder)
    return folder


def lively(**qwen3: Any) -> ImagePolicy:
    policy = micro_policy(**qwen3)[0]
    for part in (policy.decoder.connector, policy.decoder.sana):
        stir(part)
    return policy


def batch_of(policy: ImagePolicy, pictures: Path, count: int = 3, dropout: float = 0.0) -> SFTBatch:
    engine: Any = SimpleNamespace(autocast=lambda: torch.autocast("cpu", enabled=False))
    randomness = [generator("test", number) for number in range(count)]
    return Collator(policy, policy.lessons(True, True), engine)(
        examples(policy, pictures, count), randomness, dropout
    )


# ---- the objective -----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_cross_entropy_is_that_of_the_plain_language_model(pictures: Path, tied: bool) -> None:
    policy = lively(tie_word_embeddings=tied)
    batch = batch_of(policy, pictures)
    scores = SupervisedModule(policy, on_prompt=True, with_flow=False)(*batch.inputs())
    vocabulary = policy.vocabulary
    for row in range(3):  # one by one, so that nothing is padded
        prompt = batch.prompts["ids"][row][batch.prompts["mask"][row]]
        image = batch.targets["tokens"][row] + vocabulary.image_start_token_id
        end = torch.tensor([vocabulary.image_end_tag_id])
        ids = torch.cat([prompt, image, end])
        logprobs = policy.trainable.lm(ids[None, :-1]).logits[0].double().log_softmax(-1)
        nll = -logprobs.gather(-1, ids[1:, None])[:, 0]
        assert len(image) == 8
        torch.testing.assert_close(scores.image_nll[row].double(), nll[-9:].sum(), **CLOSE)
        torch.testing.assert_close(scores.prompt_nll[row].double(), nll[:-9].sum(), **CLOSE)


@torch.no_grad()
def test_flow_is_that_of_the_diffusers_transformer_on_the_states_of_sampling(pictures: Path) -> None:
    """The condition comes from the sampler itself, made to draw these very tokens; the velocity from diffusers."""
    policy = lively()
    batch = batch_of(policy, pictures, dropout=0.5)
    batch.draws["drop"] = torch.tensor([False, True, False])
    hidden = sampled_states(policy, batch)
    features = policy.decoder.connector(torch.where(batch.draws["drop"][:, None, None], 0.0, hidden))
    level = batch.draws["uniform"][:, None, None, None]
    noisy = (1 - level) * batch.targets["latents"] + level * batch.draws["noise"]
    velocity = policy.decoder.sana(noisy, features, batch.draws["uniform"] * 1000.0, return_dict=False)[0]
    wanted = (velocity - (batch.draws["noise"] - batch.targets["latents"])).square().mean((1, 2, 3))
    scores = SupervisedModule(policy, on_prompt=False, with_flow=True)(*batch.inputs())
    torch.testing.assert_close(scores.flow, wanted, **CLOSE)
    # and no other states would do: those of the public trainer's selection are three positions later
    states = policy.trainable.sequence_states(
        batch.prompts["ids"], batch.prompts["mask"], batch.targets["tokens"]
    )
    shifted = torch.cat([states[:, -6:], states[:, -3:]], dim=1)
    other = policy.decoder.flow_residual(
        shifted, batch.targets["latents"], batch.draws["uniform"], batch.draws["noise"], batch.draws["drop"]
    )
    assert (other.square().mean((1, 2, 3)) - wanted).abs()[[0, 2]].min() > 1e-4


def sampled_states(policy: ImagePolicy, batch: SFTBatch) -> Tensor:
    """Hidden states that the sampler hands to the decoder when it draws a batch's tokens: uniform numbers are chosen in
    the middle of each token's own probability."""
    scores = policy.trainable
    hidden = scores.hidden_states(
        batch.prompts["ids"], batch.prompts["mask"], batch.targets["tokens"][:, :-1]
    )
    cumulative = (hidden @ scores.head.T).double().softmax(-1).cumsum(-1)
    before = torch.cat([torch.zeros_like(cumulative[..., :1]), cumulative], dim=-1)
    chosen = batch.targets["tokens"][..., None]
    uniforms = (before.gather(-1, chosen) + before.gather(-1, chosen + 1))[..., 0] / 2
    trajectory = policy.sample_tokens(
        {"ids": batch.prompts["ids"], "mask": batch.prompts["mask"]}, uniforms, SamplingParams()
    )
    assert torch.equal(trajectory.tokens, batch.targets["tokens"])
    return trajectory.states["hidden"]


@torch.no_grad()
def test_targets_are_the_pictures_tokens_and_latents(pictures: Path) -> None:
    policy = lively()
    batch = batch_of(policy, pictures)
    for row, example in enumerate(examples(policy, pictures, 3)):
        pixels = torch.from_numpy(example.picture.copy()).float().permute(2, 0, 1)[None] / 127.5 - 1
        assert policy.image_tokenizer is not None
        assert torch.equal(policy.image_tokenizer.encode(pixels)[0], batch.targets["tokens"][row])
        torch.testing.assert_close(policy.decoder.encode(pixels)[0], batch.targets["latents"][row], **CLOSE)
        ids, _ = policy.encode_prompts([example.caption])
        assert torch.equal(batch.prompts["ids"][row][batch.prompts["mask"][row]], ids[0])


def test_random_numbers_are_a_samples_own(pictures: Path) -> None:
    policy = lively()
    three, one = batch_of(policy, pictures, 3, 0.5), batch_of(policy, pictures, 1, 0.5)
    for name in ("uniform", "noise", "drop"):
        assert torch.equal(three.draws[name][:1], one.draws[name])
    assert len(set(three.draws["uniform"].tolist())) == 3


def test_sigma_is_uniform_and_shifted_like_the_schedule() -> None:
    uniform = torch.tensor([0.0, 0.25, 0.5, 0.75])
    assert torch.equal(noise_levels(uniform, 1.0), uniform)
    policy = micro_policy()[0]
    policy.decoder.scheduler_config["shift"] = 3.0
    schedule = policy.decoder.sigmas(4)[:4]  # of linspace(1, 1/4, 4)
    torch.testing.assert_close(noise_levels(torch.tensor([1.0, 0.75, 0.5, 0.25]), 3.0), schedule)
    assert noise_levels(torch.tensor(0.5), 3.0) == pytest.approx(0.75)  # 3·½ / (1 + 2·½)


def test_padding_and_reference_pictures_are_no_targets() -> None:
    ids = torch.tensor([[0, 0, 5, 70, 71, 6, 8, 9], [1, 2, 3, 4, 5, 6, 8, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]])
    following, counted = prompt_targets(ids, mask, slice(64, 80))
    assert torch.equal(following, ids[:, 1:])
    assert counted[0].tolist() == [False, False, False, False, True, True, True]
    assert counted[1].all()


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = torch.Generator().manual_seed(0)
    head = torch.randn(11, 4, generator=draws, requires_grad=True)
    hidden = torch.randn(7, 4, generator=draws, requires_grad=True)
    targets = torch.randint(0, 11, (7,), generator=draws)
    whole = token_nll(hidden, head, targets)
    wanted = torch.autograd.grad(whole.sum(), [hidden, head])
    monkeypatch.setattr(supervised, "MAX_LOGITS_PER_CHUNK", 22)
    parts = token_nll(hidden, head, targets)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts.sum(), [hidden, head]), wanted)


def test_recomputed_activations_give_the_same_gradients(pictures: Path) -> None:
    gradients, calls = [], []
    for recompute in (False, True):
        policy = lively()
        module = lessons_for(
            policy,
            recipe(pictures, "train.decoder=full", f"train.gradient_checkpointing={recompute}".lower()),
        ).trainable
        for part in (policy.trainable.lm.model.layers[0].mlp, policy.decoder.sana.transformer_blocks[0].ff):
            part.register_forward_pre_hook(lambda *_, recompute=recompute: calls.append(recompute))
        scores = module.train()(*batch_of(policy, pictures).inputs())
        (scores.image_nll.sum() + scores.flow.sum()).backward()
        gradients.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
    assert (calls.count(False), calls.count(True)) == (2, 4)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **CLOSE)


# ---- training ----------------------------------------------------------------------------------------------


def test_a_step_is_one_update_on_the_means_over_the_batch(pictures: Path) -> None:
    """Two microbatches of 2 against plain autograd over the 4 samples at once."""
    settings = recipe(pictures, "train.decoder=full", "optim.max_grad_norm=0", "objective.flow_weight=0.7")
    trainer, other = small_trainer(lively(), settings), small_trainer(lively(), settings)
    drawn = other.stream.take(4)
    batch = other.collate(
        [one.example for one in drawn], [generator(0, "flow", one.number) for one in drawn], 0.1
    )
    scores = other.module(*batch.inputs())
    positions = batch.targets["tokens"].numel() + 4 + int(batch.prompts["mask"].sum()) - 4
    cross_entropy = (scores.image_nll.sum() + scores.prompt_nll.sum()) / positions
    loss = cross_entropy + 0.7 * scores.flow.mean()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in other.module.parameters() if p.grad is not None]).norm()
    metrics = trainer.step(0)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["cross_entropy"] == pytest.approx(scores.image_nll.mean().item() / 9, rel=1e-5)
    assert metrics["flow"] == pytest.approx(scores.flow.mean().item(), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert metrics["data/seen"] == 4 and metrics["data/bad"] == 0


def test_both_losses_fall(pictures: Path) -> None:
    settings = recipe(
        pictures, "run.steps=30", "train.decoder=full", "data.batch_size=8", "engine.micro_batch_size=8"
    )
    trainer = small_trainer(lively(), settings)
    history = [trainer.step(step) for step in range(30)]
    for name in ("cross_entropy", "prompt_cross_entropy", "flow"):
        first, last = (sum(one[name] for one in part) / 8 for part in (history[:8], history[-8:]))
        assert last < 0.95 * first, name


CHOICES = {
    "published": ((), {"ar", "connector", "caption"}),
    "everything": (("train.decoder=full",), {"ar", "connector", "caption", "decoder"}),
    "decoder alone": (("train={ar: frozen, connector: frozen, decoder: full}",), {"caption", "decoder"}),
    "ar alone": (("train={connector: frozen, decoder: frozen}",), {"ar"}),
    "connector alone": (("train={ar: frozen, decoder: frozen}",), {"connector"}),
    "tokens alone": (
        ("train={connector: frozen, decoder: frozen}", "objective.flow_weight=0"),
        {"ar"},
    ),
    "adapters": (("train={ar: lora, connector: frozen, decoder: frozen}", "train.lora.r=4"), {"lora"}),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_what_is_frozen_stays_bit_for_bit(pictures: Path, choice: str) -> None:
    overrides, trained = CHOICES[choice]
    policy = lively()
    trainer = small_trainer(policy, recipe(pictures, *overrides))
    assert policy.image_tokenizer is not None
    everything = {
        **dict(trainer.module.named_parameters()),
        **{f"vae.{n}": p for n, p in policy.decoder.vae.named_parameters()},
        **{f"tokenizer.{n}": p for n, p in policy.image_tokenizer.named_parameters()},
    }
    before = {name: p.detach().clone() for name, p in everything.items()}
    for step in range(2):
        trainer.step(step)
    changed = {kind(name) for name, p in everything.items() if not torch.equal(p, before[name])}
    assert changed == trained
    still = {n for n, p in everything.items() if kind(n) in trained and torch.equal(p, before[n])}
    assert {name for name in still if not name.endswith(".attn2.to_k.bias")} == set()  # softmax ignores it


def kind(name: str) -> str:
    if name.startswith(("vae.", "tokenizer.")):
        return name.partition(".")[0]
    return "lora" if ".lora_" in name else Lessons.part_of(name).removeprefix("decoder.")


def test_parts_have_learning_rates_of_their_own(pictures: Path) -> None:
    settings = recipe(pictures, "optim.ar_lr=0.001", "optim.decoder_lr=0.006", "optim.warmup_steps=1")
    trainer = small_trainer(lively(), settings)
    trainer.step(0)
    engine = trainer.engine
    rates: dict[str, set[float]] = {}
    for group in engine._base_optimizer.param_groups:
        for parameter in group["params"]:
            (name,) = [n for n, p in trainer.module.named_parameters() if p is parameter]
            rates.setdefault(Lessons.part_of(name).partition(".")[0], set()).add(group["lr"])
    assert {part: len(values) for part, values in rates.items()} == {"ar": 1, "connector": 1, "decoder": 1}
    first = {part: values.pop() for part, values in rates.items()}  # half of the peak: one step of warm-up
    assert first == pytest.approx({"ar": 0.0005, "connector": 0.0015, "decoder": 0.003})


# ---- edits -------------------------------------------------------------------------------------------------


def editing() -> ImagePolicy:
    torch.manual_seed(0)
    policy, _ = new_policy({**copy.deepcopy(MODEL), "edit": True}, captions(0, 20), 300)
    for part in (policy.decoder.connector, policy.decoder.reference_connector, policy.decoder.sana):
        assert part is not None
        stir(part)
    policy.trainable.eval()
    return policy


def with_references(ones: list[Example]) -> list[Example]:
    """Each picture an edit of the one before it."""
    return [replace(one, reference=ones[place - 1].picture) for place, one in enumerate(ones)]


@torch.no_grad()
def test_an_edit_is_scored_after_its_references_tokens(pictures: Path) -> None:
    policy = editing()
    ones = examples(policy, pictures, 3)
    engine: Any = SimpleNamespace(autocast=lambda: torch.autocast("cpu", enabled=False))
    randomness = [generator("test", number) for number in range(3)]
    collate = Collator(policy, policy.lessons(True, True), engine)
    batch = collate(with_references(ones), randomness, 0.0)
    scores = SupervisedModule(policy, on_prompt=True, with_flow=True)(*batch.inputs())
    plain = collate(ones, [generator("test", number) for number in range(3)], 0.0)
    assert all(torch.equal(rows, plain.targets[name]) for name, rows in batch.targets.items())
    torch.testing.assert_close(batch.prompts["reference"], plain.targets["latents"][[2, 0, 1]], **CLOSE)
    ids, mask = policy.encode_prompts([one.caption for one in ones], plain.targets["tokens"][[2, 0, 1]])
    assert torch.equal(ids, batch.prompts["ids"]) and torch.equal(mask, batch.prompts["mask"])
    hidden = policy.trainable.hidden_states(ids, mask, batch.targets["tokens"])
    loss = policy.decoder.flow_loss(
        hidden,
        batch.targets["latents"],
        batch.draws["uniform"],
        batch.draws["noise"],
        batch.draws["drop"],
        batch.prompts["reference"],
    )
    torch.testing.assert_close(scores.flow.mean(), loss, **CLOSE)
    _, counted = prompt_targets(ids, mask, policy.vocabulary.columns)
    assert torch.equal(counted.sum(1), mask.sum(1) - 1 - 8)  # all but the reference's 8 tokens


def test_kinds_are_kept_apart_and_count_as_one_batch(pictures: Path) -> None:
    """5 samples, 2 of them edits, in microbatches of 2: the gradient is that of their mean."""
    settings = recipe(pictures, "train.decoder=full", "optim.max_grad_norm=0", "data.batch_size=5")
    trainer, other = (small_trainer(editing(), settings) for _ in range(2))
    drawn = trainer.stream.take(5)
    edits = with_references([one.example for one in drawn])
    mixed = [replace(one, example=edits[i]) if i in (1, 4) else one for i, one in enumerate(drawn)]
    assert of_one_kind([one.example for one in mixed], 2) == [[0, 2], [3], [1, 4]]
    total, positions = [], 0
    for one in mixed:  # one by one
        batch = other.collate([one.example], [generator(0, "flow", one.number)], 0.1)
        total.append(other.module(*batch.inputs()))
        positions += int(other.counted(batch).sum())
    nll = sum(one.image_nll.sum() + one.prompt_nll.sum() for one in total) / positions
    loss = nll + sum(one.flow.sum() for one in total) / 5
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in other.module.parameters() if p.grad is not None]).norm()
    trainer.stream = SimpleNamespace(take=lambda n: mixed, counts=trainer.stream.counts, epoch=0)  # type: ignore[assignment]
    metrics = trainer.step(0)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    unused = trainer.module.decoder["unused_connector"]
    assert not any(p.requires_grad for p in unused.parameters())


def test_without_edits_the_reference_connector_has_a_gradient_of_zero(pictures: Path) -> None:
    """Or processes that exchange gradients would wait for it."""
    policy = editing()
    module = lessons_for(policy, recipe(pictures)).trainable
    scores = module(*batch_of(policy, pictures).inputs())
    (scores.image_nll.sum() + scores.flow.sum()).backward()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert (parameter.grad.abs().sum() == 0) == ("reference_connector" in name), name
