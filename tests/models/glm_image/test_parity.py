"""The library's own pipeline is the oracle: what it computes of a model, ours computes of the folder it saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from imagerl.models.glm_image.family import GlmImage
from imagerl.models.glm_image.policy import GlmImagePolicy
from imagerl.models.glm_image.sizes import Size, upsampled
from imagerl.rl.types import Prompt, Rows, SamplingParams, TokenTrajectory
from tests.models.glm_image.small import PROMPTS, build_pipeline, pipeline, saved, sizes

HEIGHT, WIDTH, STEPS = 64, 32, 3
GREEDY = SamplingParams(temperature=1e-4)


def prompt_of(text: str, height: int = HEIGHT, width: int = WIDTH) -> Prompt:
    return Prompt(0, text, {"height": height, "width": width})


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("glm_image"))


@pytest.fixture(scope="module")
def policy(folder: Path) -> GlmImagePolicy:
    return GlmImage().load(folder, "cpu", torch.float32)


@pytest.fixture(scope="module")
def rows(policy: GlmImagePolicy) -> Rows:
    return policy.encode([prompt_of(text) for text in PROMPTS])


@pytest.fixture(scope="module")
def inputs() -> Any:
    """What the library's processor makes of the prompts, in one left-padded batch."""
    messages = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in PROMPTS]
    settings = {"padding": True, "target_h": HEIGHT, "target_w": WIDTH, "return_tensors": "pt"}
    return pipeline().processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, processor_kwargs=settings
    )


@pytest.fixture(scope="module")
def greedy(inputs: Any) -> Any:
    """The library's own generation: the most probable tokens, with their logits."""
    tokens = Size(HEIGHT, WIDTH).tokens
    return pipeline().vision_language_encoder.generate(
        **inputs, max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
    )


@pytest.fixture(scope="module")
def trajectory(policy: GlmImagePolicy, rows: Rows) -> TokenTrajectory:
    tokens = policy.prompts.canvas(prompt_of(PROMPTS[0])).tokens
    middle = torch.full(
        (len(PROMPTS), tokens), 0.5
    )  # within the most probable token's share, wherever it lies
    return policy.sample_tokens(rows, middle, GREEDY)


def test_prompts_are_those_of_the_librarys_processor(rows: Rows, inputs: Any) -> None:
    assert torch.equal(rows["ids"], inputs["input_ids"])
    assert torch.equal(rows["mask"], inputs["attention_mask"])
    assert len(set(rows["mask"].sum(1).tolist())) == len(PROMPTS)  # lengths differ, so padding is tried


def test_greedy_tokens_are_the_librarys(inputs: Any, greedy: Any, trajectory: TokenTrajectory) -> None:
    theirs = greedy.sequences[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(trajectory.tokens, theirs)
    assert len(theirs.unique()) > 10


def test_scores_are_the_librarys(policy: GlmImagePolicy, rows: Rows, greedy: Any, trajectory: Any) -> None:
    codes = sizes()["codes"]
    logits = torch.stack(greedy.logits, 1)[..., :codes]
    theirs = logits.log_softmax(-1).gather(-1, trajectory.tokens[..., None])[..., 0]
    scores = policy.trainable(rows, trajectory.tokens, SamplingParams())
    assert_close(scores.logprobs.detach(), theirs)
    hidden = policy.trainable.hidden_states(rows, trajectory.tokens)
    assert_close(policy.trainable.logits(hidden).detach(), logits)


def test_prior_tokens_are_the_librarys(trajectory: TokenTrajectory) -> None:
    size = Size(96, 160)
    tokens = torch.arange(2 * size.tokens).view(2, -1)
    rows, columns = size.large
    for own, row in zip(upsampled(tokens, size.large), tokens, strict=True):
        theirs = pipeline()._upsample_token_ids(row[-rows * columns :], rows, columns)
        assert torch.equal(own[None], theirs)


def library_run(text: str, prior: Tensor, noise: Tensor, pipe: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
    """Draw with the library; returns its output and what its transformer was given and said at each call."""
    calls: list[Any] = []
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, given, out: calls.append((given, out[0])), with_kwargs=True
    )
    try:
        out = pipe(
            text,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=STEPS,
            prior_token_ids=prior[None],
            latents=noise[None],
            return_dict=False,
            **kwargs,
        )
    finally:
        hook.remove()
    return out[0], calls


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_velocities_latents_and_pictures_are_the_librarys(
    policy: GlmImagePolicy, rows: Rows, trajectory: TokenTrajectory, guidance: float
) -> None:
    """Ours draws all prompts in one batch. The library would pad glyphs without a mask, so it draws one by one."""
    decoder = policy.decoder
    noise = torch.randn(len(PROMPTS), 4, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(1))
    condition = decoder.flow_condition(rows, trajectory)
    latents = decoder.latents(condition, noise, guidance, STEPS)
    pictures = policy.decode(rows, trajectory, noise, SamplingParams(guidance=guidance, flow_steps=STEPS))
    seen, sigmas = decoder.seen(condition, guidance), decoder.sigmas(STEPS, noise.shape[1:])
    for row, text in enumerate(PROMPTS):
        given = condition["prior"][row], noise[row], pipeline()
        theirs, calls = library_run(text, *given, output_type="latent", guidance_scale=guidance)
        assert_close(latents[row], theirs[0])
        images, _ = library_run(text, *given, output_type="pt", guidance_scale=guidance)
        assert_close(pictures[row], images[0])
        each = 1 if guidance == 1.0 else 2
        for step in range(STEPS):
            (first, conditional), *rest = calls[each * step : each * (step + 1)]
            x = first["hidden_states"].repeat(len(PROMPTS), 1, 1, 1)
            ours = decoder.guided_velocity(x, sigmas[step].expand(len(x)), seen, guidance)[row]
            wanted = conditional[0]
            for _, without in rest:
                wanted = without[0] + guidance * (conditional[0] - without[0])
            assert_close(ours, wanted)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dynamic_shifting": True, "time_shift_type": "exponential", "base_shift": 0.1, "max_shift": 0.2},
        {"use_dynamic_shifting": False, "shift": 3.0},
    ],
)
def test_other_schedules_are_the_librarys(policy: GlmImagePolicy, settings: dict[str, Any]) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = build_pipeline()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    decoder = type(policy.decoder)(
        pipe.transformer, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler
    )
    noise = torch.randn(4, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(1))
    prior = torch.zeros(1, noise[0].numel() // 4, dtype=torch.long)
    condition = {"prior": prior, "glyphs": decoder.glyphs_of(PROMPTS[:1])}
    theirs, calls = library_run(PROMPTS[0], prior[0], noise, pipe, output_type="latent")
    assert_close(decoder.latents(condition, noise[None], 1.5, STEPS), theirs)
    times = torch.stack([given["timestep"] for given, _ in calls[::2]])
    assert torch.equal(decoder.timesteps(decoder.sigmas(STEPS, noise.shape)[:-1, None], noise.shape), times)


@pytest.mark.slow
def test_the_whole_pipeline_draws_what_ours_draws(policy: GlmImagePolicy) -> None:
    """From words to pixels: with only the most probable token left, the library's sampling has no choice."""
    pipe = build_pipeline()
    pipe.vision_language_encoder.generation_config.top_k = 1
    noise = torch.randn(1, 4, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(2))
    theirs = pipe(
        PROMPTS[2],
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=2,
        latents=noise,
        output_type="pt",
        return_dict=False,
    )[0]
    prompt = prompt_of(PROMPTS[2])
    rows = policy.encode([prompt])
    trajectory = policy.sample_tokens(
        rows, torch.full((1, policy.prompts.canvas(prompt).tokens), 0.5), GREEDY
    )
    ours = policy.decode(rows, trajectory, noise, SamplingParams(guidance=1.5, flow_steps=2))
    assert_close(ours, theirs)


def test_exports_load_in_the_librarys_pipeline_and_draw_the_same(
    policy: GlmImagePolicy, folder: Path, tmp_path: Path
) -> None:
    from diffusers import GlmImagePipeline

    policy.save(tmp_path, "glm_image", folder, None)
    again = GlmImagePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    noise = torch.randn(4, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(3))
    prior = torch.arange(noise[0].numel() // 4)
    pictures = [
        library_run(PROMPTS[0], prior, noise, pipe, output_type="pt")[0] for pipe in (pipeline(), again)
    ]
    assert_close(*pictures)  # equal weights; on other addresses, some kernels add up in another order
    for name, weight in pipeline().vision_language_encoder.state_dict().items():
        assert torch.equal(weight, again.vision_language_encoder.state_dict()[name]), name
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not [file for file in files if str(folder).encode() in file.read_bytes()]
