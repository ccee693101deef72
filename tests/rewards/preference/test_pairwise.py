"""Win rates within a group: worked out by hand, with a judge that prefers brightness, a place, or nothing."""

import base64
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from PIL import Image

from imagerl.rewards.preference.pairwise import PairwiseReward, pairs, parse_verdict, win_rates
from imagerl.rewards.workers.pool import RewardWorkers
from imagerl.rl.types import ImageRLError, RewardRequest
from tests.served import served

Judge = Callable[[list[int]], str]
GROUP = [10, 40, 20, 30]  # brightness of the pictures


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (2, 2), (shade, shade, shade))


def brightest(shades: list[int]) -> str:
    return f"<think>so</think> Image {1 + (shades[1] > shades[0])} is better"


def first(shades: list[int]) -> str:
    return '"Image 2 is better"? No: Image 1 is better.'


@contextmanager
def endpoint(judge: Judge) -> Iterator[tuple[str, list[list[int]]]]:
    """An endpoint whose `judge` sees the shades of the pictures; and what it was asked."""
    asked: list[list[int]] = []

    async def complete(request: web.Request) -> web.Response:
        parts = (await request.json())["messages"][-1]["content"]
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        files = [io.BytesIO(base64.b64decode(url.partition(",")[2])) for url in urls]
        asked.append([Image.open(file).getpixel((0, 0))[0] for file in files])
        assert "a lamp" in parts[-1]["text"]
        answer = judge(asked[-1])
        if not answer:
            return web.json_response({"error": "broken"}, status=400)
        usage = {"prompt_tokens": 100, "completion_tokens": 10}
        return web.json_response({"choices": [{"message": {"content": answer}}], "usage": usage})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
    with served(app, None) as address:
        yield f"{address}/v1", asked


def score(reward: PairwiseReward, shades: list[int], groups: list[int] | None = None, **more: Any) -> Any:
    return reward(
        prompts=["a lamp"] * len(shades), images=[picture(s) for s in shades], groups=groups, **more
    )


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("opponents", range(1, 9))
def test_every_picture_meets_as_many_others(size: int, opponents: int) -> None:
    found = list(pairs(size, opponents))
    assert len({frozenset(pair) for pair in found}) == len(found) <= size * (opponents + 1) / 2
    met = [sum(row in pair for pair in found) for row in range(size)]
    assert met == [min(size - 1, opponents + opponents % 2)] * size


def test_win_rates_by_hand() -> None:
    rates = win_rates(4, {(0, 1): 1.0, (1, 2): 0.5, (2, 0): 0.25})
    assert rates[:3] == [(1.0 + 0.75) / 2, (0.0 + 0.5) / 2, (0.5 + 0.25) / 2] and np.isnan(rates[3])


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("Image 1 is better", 1.0),
        ("Image 1 is better in colour, but all in all\n**Image 2** is better", 0.0),
        ("<answer>image 2 is the better</answer>", 0.0),
        ("Both are equal", 0.5),
    ],
)
def test_the_last_word_of_a_verdict_counts(answer: str, value: float) -> None:
    assert parse_verdict(answer) == value
    with pytest.raises(ValueError, match=r"did not say which is better but: neither$"):
        parse_verdict("neither")


def test_the_better_wins_more_often_and_groups_stay_apart() -> None:
    with endpoint(brightest) as (address, asked):
        reward = PairwiseReward(address, "eyes", opponents=3)
        output = score(reward, [*GROUP, 90, 80, 70], [0, 0, 0, 0, 1, 1, 2])
        assert output.rewards == pytest.approx([0, 1, 1 / 3, 2 / 3, 1, 0, 0.5])
        assert output.breakdown["agreed"] == [1.0] * 6 + [None]
        assert output.breakdown["first_wins"] == [0.5] * 6 + [None]
        assert len(asked) == 2 * (6 + 1) == sum(output.breakdown["questions"])
        assert sum(output.breakdown["tokens_in"]) == 1400
        again = score(reward, GROUP, [5] * 4)
        assert again.rewards == pytest.approx([0, 1, 1 / 3, 2 / 3]) and len(asked) == 14  # remembered
        assert score(reward, [7, 7]).rewards == [0.5, 0.5] and len(asked) == 14  # nothing to ask


def test_a_preference_for_a_place_cancels() -> None:
    with endpoint(first) as (address, _):
        output = score(PairwiseReward(address, "eyes", opponents=2), GROUP)
    assert output.rewards == [0.5] * 4
    assert output.breakdown["agreed"] == [0.0] * 4 and output.breakdown["first_wins"] == [1.0] * 4


def test_a_pair_without_both_orders_does_not_count(tmp_path: Path) -> None:
    """Whoever is shown 10 first is refused; a cache on disk has the others."""

    def half(shades: list[int]) -> str:
        return "" if shades[0] == 10 else brightest(shades)

    with endpoint(half) as (address, asked):
        for _ in range(2):
            output = score(PairwiseReward(address, "eyes", opponents=3, cache=str(tmp_path)), GROUP)
            assert np.isnan(output.rewards[0]) and output.rewards[1:] == [1.0, 0.0, 0.5]
            assert output.reason == "the judge refuses: HTTP 400: broken"
        assert len(asked) == 12 + 3


def test_it_is_a_reward_by_name_and_shows_the_source_of_an_edit(tmp_path: Path) -> None:
    (tmp_path / "ask.txt").write_text("Which edit is better? {prompt}")
    with endpoint(lambda shades: brightest(shades[1:])) as (address, asked):
        entry = {"name": "pairwise", "endpoint": address, "model": "eyes", "source": True}
        scorer = RewardWorkers([entry | {"ask": str(tmp_path / "ask.txt")}], workers=0, columns=["reference"])
        images = np.stack([np.full((2, 2, 3), shade, np.uint8) for shade in GROUP])
        request = RewardRequest(["a lamp"] * 4, [[0]] * 4, images, {"reference": [picture(5)] * 4}, 2)
        scores = scorer.collect(scorer.submit(request))
    assert scores.totals.tolist() == [0, 1, 0, 1] and all(shades[0] == 5 for shades in asked)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "ask.txt").write_text("Which is better?")
    with endpoint(brightest) as (address, _):
        for settings, text in [
            ({"opponents": 0}, "opponents must be 1 or more"),
            ({"ask": str(tmp_path / "ask.txt")}, "must have {prompt} where the caption belongs"),
            ({"timeout_s": 0.0}, "must be positive"),
        ]:
            with pytest.raises(ImageRLError, match=text):
                PairwiseReward(address, "eyes", **json.loads(json.dumps(settings)))
        with pytest.raises(ImageRLError, match="needs the column reference"):
            score(PairwiseReward(address, "eyes", source=True), GROUP)
    with pytest.raises(ImageRLError, match="endpoint of reward 'pairwise' must be http"):
        PairwiseReward("ftp://x", "eyes")
