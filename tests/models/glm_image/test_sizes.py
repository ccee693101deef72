"""Sizes, grids and places on the rotary axes, by hand and by the library."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from imagerl.models.glm_image.decoder import FlowDecoder, quoted_texts
from imagerl.models.glm_image.loading import load_policy
from imagerl.models.glm_image.sizes import Size, require_size, size_of
from imagerl.rl.errors import ImageRLError
from imagerl.rl.evaluation.evaluate import evaluate
from imagerl.rl.rollout.engine import RolloutEngine
from imagerl.rl.types import Prompt, RewardRequest, RewardScores
from tests.models.glm_image.small import pipeline, small_folder


@pytest.mark.parametrize("size", [(1024, 1024), (1152, 768), (64, 32), (32, 2048), (2048, 352)])
def test_grids_are_the_librarys(size: tuple[int, int]) -> None:
    theirs = pipeline().processor._get_target_shape(*size)
    own = Size(*size)
    assert (*own.large, *own.preview) == theirs
    assert own.tokens == theirs[0] * theirs[1] + theirs[2] * theirs[3]


def test_a_square_has_a_preview_of_256_tokens() -> None:
    assert Size(1024, 1024).preview == (16, 16) and Size(1024, 1024).tokens == 1280


def test_the_preview_comes_first_and_both_grids_have_places_of_their_own() -> None:
    """Five ids stand at 0 to 4. The preview begins at 5 on all axes, the large grid behind its longer side."""
    model = pipeline().vision_language_encoder.model
    ids = torch.full((1, 5), 60)
    grids = torch.tensor([[1, 2, 3], [1, 1, 4]])  # large, preview
    places, _ = model.get_rope_index(ids, grids, torch.tensor([2]), torch.ones_like(ids))
    assert places[:, 0].tolist() == [[0, 1, 2, 3, 4]] * 3
    time, rows, columns = model._cached_decode_position_ids[0].tolist()
    assert time == [5] * 4 + [9] * 6 + [12]
    assert rows == [5] * 4 + [9, 9, 9, 10, 10, 10] + [12]
    assert columns == [5, 6, 7, 8] + [9, 10, 11, 9, 10, 11] + [12]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"height": 100, "width": 64}, "height is 100: .* multiples of 32; the nearest is 96"),
        ({"height": 64, "width": 16}, "width is 16: .* the nearest is 32"),
        ({"height": 4096, "width": 64}, "height is 4096, but the model draws at most 2048 pixels a side"),
        ({"height": 64}, r"height and width are \[64, None\]; give both"),
        ({"height": "tall", "width": 64}, "give both, as pixels"),
    ],
)
def test_sizes_that_no_grid_holds_are_refused(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ImageRLError, match=message):
        size_of(columns, Size(64, 64))


@pytest.mark.parametrize("size", [Size(1024, 768), Size(96, 32), Size(64, 32)])
def test_the_schedule_of_every_size_begins_at_1_to_the_bit(size: Size) -> None:
    """The first stochastic step divides by 1 − sigma, and in float32 the shift makes 1 ± 1e-7 of it for these."""
    pipe = pipeline()
    decoder = FlowDecoder(pipe.transformer, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler)
    latents = (4, size.height // decoder.compression, size.width // decoder.compression)
    assert decoder.sigmas(4, latents)[0] == 1


def test_a_prompt_without_a_size_has_the_default() -> None:
    assert size_of({}, Size(64, 32)) == (64, 32)
    assert size_of({"height": "96", "width": 64.0 and 64}, Size(64, 32)) == (96, 64)
    assert require_size(Size(32, 2048)) == (32, 2048)


class Shade:
    """A scorer with one reward: how bright a picture is."""

    def submit(self, request: RewardRequest, with_gold: bool = False) -> RewardRequest:
        return request

    def collect(self, ticket: RewardRequest) -> RewardScores:
        value = ticket.images.mean((1, 2, 3)) / 255
        return RewardScores(value, {"shade": value}, {}, {})


def test_an_evaluation_draws_prompts_of_several_sizes_and_keeps_their_order(tmp_path: Path) -> None:
    policy = load_policy(small_folder(tmp_path / "model"), "cpu", torch.float32)
    sizes = [(32, 64), (64, 32), (32, 64)]
    prompts = [
        Prompt(i, f"sign {i}", {"height": height, "width": width}) for i, (height, width) in enumerate(sizes)
    ]
    rollout = RolloutEngine(policy, replace(policy.sampling, flow_steps=1), 0, nullcontext)
    result = evaluate("ocr", prompts, rollout, Shade(), batch_size=2)
    assert [row["index"] for row in result.per_prompt] == [0, 1, 2]
    assert [picture.shape[:2] for picture in result.images] == sizes
    for row, picture in zip(result.per_prompt, result.images, strict=True):
        assert row["total"] == pytest.approx(picture.mean() / 255)


def test_quoted_texts_are_the_librarys() -> None:
    prompts = [
        "'a' and \"b\"",
        "it's one's own",
        "“c” 「d」 'e'",
        "nothing",
        '"unfinished',
        '""',
    ]
    assert [list(quoted_texts(prompt)) for prompt in prompts] == pipeline().get_glyph_texts(prompts)
