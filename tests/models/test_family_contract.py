"""What every family must keep. A family joins by one builder of a small random model folder in FAMILIES_UNDER_TEST."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from imagerl.models import families
from imagerl.models.base import Policy
from imagerl.models.common.flow_policy import FlowPolicy
from imagerl.rl.rollout.engine import RolloutEngine
from imagerl.rl.rollout.preparing import refuse_impossible
from imagerl.rl.types import (
    FlowSampling,
    ImageRLError,
    Prompt,
    Rows,
    SamplingParams,
    TokenTrajectory,
    repeat,
    select,
)

PROMPTS = [
    Prompt(0, "CAT"),
    Prompt(1, 'a sign that says "42" in red on a white background, seen from far away'),
    Prompt(2, "ünïcödé"),
]
GROUP = 3
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def blip3o_next(folder: Path) -> None:
    from imagerl.models.blip3o_next.loading import save_policy
    from tests.micro import micro_policy
    from tests.models.helpers import stir

    policy, config = micro_policy()
    stir(policy.trainable)
    with torch.no_grad():
        for parameter in policy.decoder.sana.parameters():  # its last layer begins at zero
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    save_policy(policy, folder, config)


def janus_pro(folder: Path) -> None:
    from tests.models.janus_pro.small import saved

    saved(folder)


def glm_image(folder: Path) -> None:
    from tests.models.glm_image.small import small_folder

    small_folder(folder)


# name in `models.families` -> writes a model folder with random weights of a lively size
FAMILIES_UNDER_TEST: dict[str, Callable[[Path], None]] = {
    "blip3o_next": blip3o_next,
    "janus_pro": janus_pro,
    "glm_image": glm_image,
}
if own := os.environ.get("IMAGERL_FAMILY"):  # file.py:Class, and a small model of it in IMAGERL_FAMILY_MODEL
    families.FAMILIES["yours"] = own
    FAMILIES_UNDER_TEST["yours"] = lambda place: shutil.copytree(
        os.environ["IMAGERL_FAMILY_MODEL"], place, dirs_exist_ok=True
    )


@pytest.fixture(scope="module", params=FAMILIES_UNDER_TEST)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp(request.param) / "model"
    place.mkdir()
    FAMILIES_UNDER_TEST[request.param](place)
    return place


@pytest.fixture(scope="module")
def shared(folder: Path) -> Policy:
    return families.load_policy(str(folder))


@pytest.fixture
def policy(shared: Policy) -> Policy:
    """One that a test may change."""
    return copy.deepcopy(shared)


def samplings(policy: Policy) -> Iterator[SamplingParams]:
    """At a temperature, and with guidance of tokens where the family has it."""
    yield replace(policy.sampling, temperature=0.7, token_guidance=1.0, flow_steps=2)
    if policy.prompts.token_guided:
        yield replace(policy.sampling, temperature=0.9, token_guidance=3.0, flow_steps=2)


def uniforms(policy: Policy, count: int, seed: int = 0) -> Tensor:
    tokens = policy.prompts.canvas(PROMPTS[0]).tokens
    return torch.rand(count, tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise(policy: Policy, count: int) -> Tensor | None:
    shape = policy.prompts.canvas(PROMPTS[0]).noise
    return None if shape is None else torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


def drawn(policy: Policy, sampling: SamplingParams) -> tuple[Rows, TokenTrajectory]:
    rows = policy.encode(PROMPTS)
    policy.refresh_sampler()
    return rows, policy.sample_tokens(rows, uniforms(policy, len(PROMPTS) * GROUP), sampling)


def disturb(module: torch.nn.Module, scale: float = 0.05) -> None:
    numbers = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=numbers)


def test_every_family_is_tested() -> None:
    assert FAMILIES_UNDER_TEST.keys() == families.FAMILIES.keys()


def test_the_folder_is_recognised_and_read_alike_without_weights(folder: Path, shared: Policy) -> None:
    own = families.find_family(folder.parent.name.rstrip("0123456789"))
    assert type(families.family_of(folder)) is type(own) and len(own.layouts) >= 1
    for other in families.FAMILIES.keys() - {folder.parent.name.rstrip("0123456789")}:
        with pytest.raises(
            ImageRLError, match=f"holds a model of .*, not of {other}; leave model.family out"
        ):
            families.load_prompts(str(folder), other)
    reader = families.load_prompts(str(folder))
    assert reader.canvas(PROMPTS[0]) == shared.prompts.canvas(PROMPTS[0])
    assert reader.token_guided == shared.prompts.token_guided
    assert reader.longest(PROMPTS) == shared.prompts.longest(PROMPTS) > 0
    reader.require(PROMPTS)
    with pytest.raises(ImageRLError, match=r"prompt 8.*empty"):
        reader.require([PROMPTS[0], Prompt(7, " ")])
    if not reader.token_guided:
        with pytest.raises(ImageRLError, match="token_guidance is 2"):
            refuse_impossible(reader, PROMPTS, SamplingParams(token_guidance=2.0))
    grid = reader.canvas(PROMPTS[0]).grid
    if grid is None:
        with pytest.raises(ImageRLError, match="tokens that lie on one grid"):
            refuse_impossible(reader, PROMPTS, SamplingParams(), regions=True)
    else:
        assert grid[0] * grid[1] == reader.canvas(PROMPTS[0]).tokens


def test_only_the_half_that_writes_tokens_has_gradients(shared: Policy) -> None:
    trains = {id(p) for p in shared.trainable.parameters() if p.requires_grad}
    everything = [p for module in shared.parts().values() for p in module.parameters()]
    assert trains and {id(p) for p in everything if p.requires_grad} == trains
    modules = {module for part in shared.parts().values() for module in part.modules()}
    assert not any(m.training for m in modules if not isinstance(m, torch.nn.ModuleList))  # which only list


def test_a_sample_depends_on_its_own_prompt_and_numbers_alone(shared: Policy) -> None:
    for sampling in samplings(shared):
        _, together = drawn(shared, sampling)
        for place, prompt in enumerate(PROMPTS):
            own = slice(place * GROUP, (place + 1) * GROUP)
            numbers = uniforms(shared, len(PROMPTS) * GROUP)[own]
            alone = shared.sample_tokens(shared.encode([prompt]), numbers, sampling)
            assert torch.equal(alone.tokens, together.tokens[own])
            torch.testing.assert_close(alone.rollout_logprobs, together.rollout_logprobs[own], **CLOSE)


def test_tokens_are_scored_as_they_were_drawn(shared: Policy) -> None:
    for sampling in samplings(shared):
        rows, trajectory = drawn(shared, sampling)
        with torch.no_grad():
            by_group = shared.trainable(rows, trajectory.tokens, sampling)
            each = shared.trainable(repeat(rows, GROUP), trajectory.tokens, sampling)
        mask = trajectory.action_mask
        assert mask.any() and trajectory.rollout_logprobs[mask].std() > 0.01
        torch.testing.assert_close(by_group.logprobs[mask], trajectory.rollout_logprobs[mask], **CLOSE)
        for one, other in zip(by_group, each, strict=True):  # a prompt read once for its group
            torch.testing.assert_close(one[mask], other[mask], **CLOSE)
        assert by_group.logprobs.dtype == torch.float32 and (by_group.entropy[mask] > 0).all()


def test_the_guided_distribution_is_another(shared: Policy) -> None:
    scores = [
        shared.trainable(*_scored(shared, sampling), sampling).logprobs.detach()
        for sampling in (replace(s, temperature=1.0) for s in samplings(shared))
    ]
    assert all((scores[0] - other).abs().max() > 1e-2 for other in scores[1:])


def _scored(policy: Policy, sampling: SamplingParams) -> tuple[Rows, Tensor]:
    rows, trajectory = drawn(policy, replace(sampling, token_guidance=1.0))
    return rows, trajectory.tokens


def along_a_direction(
    module: torch.nn.Module, objective: Callable[[], Tensor], step: float
) -> tuple[Tensor, Tensor]:
    """The slope of an objective along a random direction of a module's weights: by their gradients, which a backward
    pass has left there, and by finite differences."""
    trained = [p for p in module.parameters() if p.requires_grad]
    numbers = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=numbers, dtype=p.dtype) for p in trained]
    slope = sum((p.grad * d).sum() for p, d in zip(trained, direction, strict=True) if p.grad is not None)
    values = []
    with torch.no_grad():
        for factor in (step, -2 * step, step):
            for p, d in zip(trained, direction, strict=True):
                p += factor * d
            values.append(objective())
    return torch.as_tensor(slope, dtype=values[0].dtype), (values[0] - values[1]) / (2 * step)


def test_gradients_are_those_of_finite_differences(policy: Policy) -> None:
    module = policy.trainable.double()
    for sampling in samplings(policy):
        rows, tokens = _scored(copy.deepcopy(policy), sampling)

        def objective(sampling: SamplingParams = sampling) -> Tensor:
            result: Tensor = module(rows, tokens, sampling).logprobs.double().mean()  # noqa: B023
            return result

        module.zero_grad()
        objective().backward()
        slope, estimate = along_a_direction(module, objective, 3e-4)
        torch.testing.assert_close(slope, estimate, rtol=2e-2, atol=1e-4)


def test_pictures_are_of_the_canvas_and_each_its_own(shared: Policy) -> None:
    (sampling, *_) = samplings(shared)
    rows, trajectory = drawn(shared, sampling)
    count = len(trajectory.tokens)
    numbers = noise(shared, count)
    pictures = shared.decode(rows, trajectory, numbers, sampling)
    assert pictures.shape == (count, 3, *shared.prompts.canvas(PROMPTS[0]).pixels)
    assert pictures.min() >= 0 and pictures.max() <= 1
    part = slice(GROUP, 2 * GROUP)
    own = None if numbers is None else numbers[part]
    alone = shared.decode(select(rows, slice(1, 2)), trajectory.rows(part), own, sampling)
    torch.testing.assert_close(alone, pictures[part], rtol=1e-4, atol=1e-4)
    if numbers is not None:  # several pictures of each sequence
        twice = shared.decode(rows, trajectory, numbers.repeat_interleave(2, 0), sampling)
        torch.testing.assert_close(twice[::2], pictures, rtol=1e-4, atol=1e-4)


def test_a_new_adapter_changes_nothing_and_the_reference_stays(policy: Policy) -> None:
    (sampling, *_) = samplings(policy)
    rows, tokens = _scored(policy, sampling)
    with torch.no_grad():
        before = policy.trainable(rows, tokens, sampling).logprobs
    torch.manual_seed(0)
    policy.add_lora(2, 4.0, 0.0, "all-linear")
    assert policy.adapted
    policy.freeze_reference()
    trained = [name for name, p in policy.trainable.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    torch.testing.assert_close(policy.trainable(rows, tokens, sampling).logprobs.detach(), before, **CLOSE)
    disturb(policy.trainable, 0.3)
    with torch.no_grad():
        adapted = policy.trainable(rows, tokens, sampling).logprobs
    assert (adapted - before).abs().max() > 1e-3
    torch.testing.assert_close(policy.reference_scores(rows, tokens, sampling).logprobs, before, **CLOSE)
    policy.refresh_sampler()  # draws by the adapted weights
    again = policy.sample_tokens(rows, uniforms(policy, len(tokens)), sampling)
    with torch.no_grad():
        scores = policy.trainable(rows, again.tokens, sampling)
    # adapters this large make log-probs of tens
    torch.testing.assert_close(scores.logprobs, again.rollout_logprobs, rtol=1e-4, atol=1e-4)
    policy.merge_lora()
    assert not policy.adapted
    with torch.no_grad():
        torch.testing.assert_close(
            policy.trainable(rows, tokens, sampling).logprobs, adapted, rtol=1e-4, atol=1e-4
        )


def test_an_adapter_comes_back_from_its_file(policy: Policy, folder: Path, tmp_path: Path) -> None:
    (sampling, *_) = samplings(policy)
    rows, tokens = _scored(policy, sampling)
    policy.add_lora(2, 4.0, 0.0, "all-linear")
    disturb(policy.trainable, 0.3)
    policy.save_adapter(tmp_path, str(folder))
    again = families.load_policy(str(tmp_path))
    with torch.no_grad():
        wanted, found = (each.trainable(rows, tokens, sampling).logprobs for each in (policy, again))
    assert again.adapted and torch.equal(wanted, found)


def test_the_reference_of_full_weights_stays_until_it_is_renewed(policy: Policy) -> None:
    (sampling, *_) = samplings(policy)
    rows, tokens = _scored(policy, sampling)
    with pytest.raises(ImageRLError, match="no reference policy"):
        policy.reference_scores(rows, tokens, sampling)
    policy.freeze_reference()
    before = policy.reference_scores(rows, tokens, sampling).logprobs
    disturb(policy.trainable)
    assert torch.equal(policy.reference_scores(rows, tokens, sampling).logprobs, before)
    state = {name: value.clone() for name, value in policy.reference_state().items()}
    policy.freeze_reference()
    assert not torch.equal(policy.reference_scores(rows, tokens, sampling).logprobs, before)
    policy.load_reference(state)
    assert torch.equal(policy.reference_scores(rows, tokens, sampling).logprobs, before)
    assert not any(p.grad is not None or p.requires_grad for p in state.values())


def test_saved_and_loaded_it_draws_the_same(policy: Policy, folder: Path, tmp_path: Path) -> None:
    """In the family's own layout, and without adapters."""
    disturb(policy.trainable)
    guidance = 2.0 if policy.prompts.token_guided else 1.0
    policy.sampling = replace(policy.sampling, temperature=0.8, token_guidance=guidance)
    out = tmp_path / "out"
    out.mkdir()
    policy.save(out, next(iter(families.family_of(folder).layouts)), folder, None)
    again = families.load_policy(str(out))
    assert again.sampling == policy.sampling
    results = []
    for each in (policy, again):
        each.refresh_sampler()
        rollout = RolloutEngine(each, replace(each.sampling, flow_steps=2), 0, nullcontext)
        results.append([group for part in rollout.generate(PROMPTS, 2, "test") for group in part])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.tokens, other.tokens) and (one.images == other.images).all()


def test_denoising_steps_are_replayed_as_they_were_drawn(policy: Policy) -> None:
    canvas = policy.prompts.canvas(PROMPTS[0])
    if canvas.noise is None:
        with pytest.raises(ImageRLError):
            policy.train_decoder()
        return
    (sampling, *_) = samplings(policy)
    rows, trajectory = drawn(policy, sampling)
    flow = policy.train_decoder()
    assert policy.flow is flow
    steps = FlowSampling("sde", 0.7, range(0, 2), 2.0, 4)
    count = len(trajectory.tokens)
    start = noise(policy, count)
    assert start is not None
    extra = torch.randn(count, 2, *canvas.noise, generator=torch.Generator().manual_seed(4))
    pictures, kept = flow.decode_steps(rows, trajectory, start, extra, steps)
    assert pictures.shape == (count, 3, *canvas.pixels)
    schedule = flow.schedule(steps, canvas.noise)
    assert schedule.sigma[0] == 1  # where the noise, infinite at 1 itself, is that of the second step
    assert kept.latents.std() < 10
    points = kept.latents[:, :-1], schedule.sigma.expand(count, -1)

    def logprobs() -> Tensor:
        velocity = flow.trainable(kept.condition, *points, 2.0)
        return flow.score(velocity, kept.latents, schedule).logprobs

    before, velocity = logprobs(), flow.trainable(kept.condition, *points, 2.0).detach()
    torch.testing.assert_close(before.detach(), kept.rollout_logprobs, rtol=0, atol=1e-5)
    before.double().mean().backward()
    flow.freeze_reference()
    slope, estimate = along_a_direction(flow.trainable, lambda: logprobs().double().mean(), 3e-5)
    torch.testing.assert_close(slope, estimate, rtol=2e-2, atol=1e-4)
    disturb(flow.trainable)
    frozen = flow.reference_velocity(kept.condition, *points, 2.0)
    torch.testing.assert_close(frozen, velocity, rtol=1e-5, atol=1e-5)
    assert (flow.trainable(kept.condition, *points, 2.0) - frozen).abs().max() > 1e-4


def test_diffusers_loads_the_adapter_of_a_decoder(policy: Policy, folder: Path, tmp_path: Path) -> None:
    canvas = policy.prompts.canvas(PROMPTS[0])
    if canvas.noise is None:
        return
    (sampling, *_) = samplings(policy)
    rows, trajectory = drawn(policy, sampling)
    flow = policy.train_decoder()
    start = noise(policy, len(trajectory.tokens))
    assert isinstance(flow, FlowPolicy) and start is not None and not flow.adapted
    points = start[:, None], torch.full((len(start), 1), 0.5), 2.0
    condition = flow.decoder.flow_condition(rows, trajectory)
    flow.add_lora(2, 3.0, ["to_q", "to_out.0"])  # alpha is no multiple of the rank
    disturb(flow.trainable, 0.3)
    flow.save_adapter(tmp_path)
    base = families.load_policy(str(folder))
    base.encode(PROMPTS)
    again = base.train_decoder()
    assert isinstance(again, FlowPolicy)
    with torch.no_grad():
        wanted, before = flow.trainable(condition, *points), again.trainable(condition, *points)
        transformer = getattr(
            again.decoder, again.decoder.adapted
        )  # a class of diffusers, and its own loader
        transformer.load_lora_adapter(str(tmp_path), weight_name="pytorch_lora_weights.safetensors")
        assert torch.equal(again.trainable(condition, *points), wanted)
    assert (wanted - before).abs().max() > 1e-3
