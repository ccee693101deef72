"""The harness for rewards: what it passes, and the sentence with which it fails each kind of mistake."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from imagerl.api.checking import CheckResult, page_content
from imagerl.rewards.base import LoadedReward, load_reward
from imagerl.rewards.check.checks import CheckReport, check
from imagerl.rewards.check.ranking import rank, rank_correlation
from imagerl.rl.data.tiny.pictures import KINDS, check_pictures
from imagerl.rl.run.report import render_page
from imagerl.rl.types import RewardOutput

PICTURES = check_pictures(4)


def check_function(function: Callable[..., Any], **options: Any) -> CheckReport:
    """Checks a function that takes keywords."""
    return check(LoadedReward("mine", function), PICTURES, **options)


def contrast(images: list[Any], **_: Any) -> list[float]:
    """1 for strokes that are darker than an even rim; ties with the pictures that hack it, beats blank ones."""
    grey = [np.asarray(image.convert("L").resize((64, 32)), dtype=float) / 255 for image in images]
    return [_strokes(picture) for picture in grey]


def _strokes(grey: np.ndarray) -> float:
    """How much is darker than the rim, at most 1; 0 where the rim itself varies."""
    rim = np.concatenate([grey[0], grey[-1]])
    dark = float((grey < rim.mean() - 0.25).mean())
    return min(10 * dark, 1.0) if rim.std() < 0.02 and dark < 0.5 else 0.0


def findings(report: CheckReport) -> dict[str, tuple[str, str]]:
    return {finding.check: (finding.verdict, finding.sentence) for finding in report.findings}


def test_a_sound_reward_passes() -> None:
    label, colours = load_reward("colours")
    report = check(LoadedReward(label, colours), PICTURES, [LoadedReward("contrast", contrast)])
    assert not report.failed
    assert [f.check for f in report.findings] == [
        "answer", "values", "applies", "repeat", "batch order", "batch size", "odd sizes", "odd modes",
        "empty rows", "ranking", "time", "company",
    ]  # fmt: skip
    rows = {row.kind: row for row in report.kinds}
    assert rows["honest"].mean == 1.0 and rows["wrong ink"].mean == 0.0 and rows["wrong ink"].behind == 1.0
    assert rows["blank"].parts == {"ink": 0.0, "background": 1.0}
    assert report.ms_batch > 0 and report.ms_alone > 0
    assert set(report.correlations) == {"contrast"}


def test_its_own_fixture_passes() -> None:
    """Each mistake below is made in this function alone, so that nothing else fails it."""
    assert not check_function(contrast).failed


def _random(images: list[Any], **_: Any) -> list[float]:
    return [random.random() for _ in images]


def _normalised(images: list[Any], **_: Any) -> list[float]:
    values = np.array(contrast(images))
    return list(values / max(values.max(), 1e-9))


def _by_place(images: list[Any], **_: Any) -> list[float]:
    return [value + 0.01 * place for place, value in enumerate(contrast(images))]


def _one_size(images: list[Any], **_: Any) -> list[float]:
    return [value + 0.0 * np.asarray(image)[31, 63, 0] for value, image in zip(contrast(images), images)]  # noqa: B905


def _one_mode(images: list[Any], **_: Any) -> list[float]:
    return [value + 0.0 * np.asarray(image)[0, 0, 2] for value, image in zip(contrast(images), images)]  # noqa: B905


def _alpha(images: list[Any], **_: Any) -> list[float]:
    bands = [len(image.getbands()) for image in images]
    return [value / count for value, count in zip(contrast(images), bands, strict=True)]


def _no_none(images: list[Any], target: list[str], **_: Any) -> list[float]:
    return [value + 0 * len(text) for value, text in zip(contrast(images), target, strict=True)]


def _silent(images: list[Any], target: list[str | None], **_: Any) -> list[float]:
    return [value if text else 0.0 for value, text in zip(contrast(images), target, strict=True)]


def _brightness(images: list[Any], **_: Any) -> list[float]:
    return [float(np.asarray(image.convert("L")).mean()) / 255 for image in images]


def _some_nan(images: list[Any], **_: Any) -> list[float]:
    return [np.log(value) if value else float("nan") for value in contrast(images)]


def _zero_division(images: list[Any], **_: Any) -> list[float]:
    return [1 / 0 for _ in images]


@pytest.mark.parametrize(
    ("function", "checks", "words"),
    [
        (_random, {"repeat", "batch order", "batch size"}, "seed what is random"),
        (_normalised, {"batch size"}, "alone; how many pictures a call holds is not promised"),
        (_by_place, {"batch order", "batch size"}, "with the batch reversed"),
        (_one_size, {"odd sizes", "odd modes"}, "IndexError"),
        (_one_mode, {"odd modes"}, "begin with image.convert('RGB')"),
        (_alpha, {"odd modes"}, "an opaque RGBA picture earned"),
        (_no_none, {"empty rows"}, "return None for such a sample"),
        (_silent, {"empty rows"}, "earned 0 without a word"),
        (_brightness, {"ranking"}, '"blank" earns more than an honest picture'),
        (_some_nan, {"values"}, "NaN or infinite (the first: faint, 'a sign that says"),
        (_zero_division, {"answer"}, "the call failed: ZeroDivisionError: division by zero (test_checks.py:"),
        (lambda images, **_: [0.5] * len(images), {"values", "ranking"}, "every picture earned 0.5"),
        (lambda images, **_: [None] * len(images), {"values", "applies"}, "None for every picture"),
        (lambda images, **_: [1.0], {"answer"}, "returned 1 values for"),
        (lambda images, **_: "high", {"answer"}, "return a list with one number per sample"),
    ],
)
def test_mistakes(function: Callable[..., Any], checks: set[str], words: str) -> None:
    failed = check_function(function).failed
    assert checks <= {finding.check for finding in failed}
    assert any(words in finding.sentence for finding in failed), failed


def test_a_reward_that_compares_within_a_prompt() -> None:
    def relative(images: list[Any], prompts: list[str], **_: Any) -> list[float]:
        values = contrast(images)
        best = {
            prompt: max(v for p, v in zip(prompts, values, strict=True) if p == prompt) for prompt in prompts
        }
        return [v - best[prompt] for prompt, v in zip(prompts, values, strict=True)]

    assert findings(check_function(relative))["batch size"][0] == "fail"
    assert findings(check_function(relative, grouped=True))["batch size"][0] == "pass"


def test_a_penalty_is_better_when_smaller() -> None:
    def badness(images: list[Any], **_: Any) -> list[float]:
        return [-value for value in contrast(images)]

    assert findings(check_function(badness))["ranking"][0] == "fail"
    report = check_function(badness, penalty=True)
    assert findings(report)["ranking"][0] != "fail"
    honest = next(row for row in report.kinds if row.role == "honest")
    assert honest.mean == pytest.approx(np.mean(badness([p.image for p in PICTURES if p.role == "honest"])))


def test_scale_time_and_company_are_told() -> None:
    def large(images: list[Any], **_: Any) -> list[float]:
        return [1000 * value for value in contrast(images)]

    report = check_function(large, others=[LoadedReward("contrast", contrast)], max_ms=0.0)
    told = findings(report)
    assert told["values"][0] == "note" and "divide" in told["values"][1]
    assert told["time"][0] == "fail" and "0 ms are allowed" in told["time"][1]
    assert report.correlations["contrast"] == pytest.approx(1.0)
    assert told["company"] == ("note", "contrast +1.00: says almost the same as contrast")


def test_rank_correlation_by_hand() -> None:
    # Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: 4.5 / sqrt(4.5 · 5).
    a, b = np.array([1.0, 2.0, 2.0, 3.0, np.nan]), np.array([10.0, 30.0, 20.0, 40.0, 0.0])
    assert rank_correlation(a, b) == pytest.approx(4.5 / np.sqrt(22.5))
    assert rank_correlation(a, -b) == pytest.approx(-4.5 / np.sqrt(22.5))
    assert np.isnan(rank_correlation(a, np.ones(5)))


def test_ranks_by_prompt() -> None:
    """A kind is compared with the honest picture of the same prompt, and only where both have a value."""
    pictures = [p for p in PICTURES if p.kind in ("honest", "blank", "word repeated")][:6]
    values = np.array([1.0, 0.4, 1.02, 0.2, np.nan, 0.1])  # honest, blank, repeated of two prompts
    kinds = [p.kind for p in pictures]
    assert kinds == ["honest", "blank", "word repeated"] * 2
    rows = {row.kind: row for row in rank(values, pictures, {"part": values * 2})}
    assert rows["blank"].behind == pytest.approx(0.6) and rows["blank"].verdict == "pass"
    assert rows["word repeated"].behind == pytest.approx((-0.02 + 0.1) / 2)
    assert rows["word repeated"].verdict == "note"  # 0.04 is within 5 % of the spread, 0.92
    assert rows["blank"].parts == {"part": pytest.approx(0.8)}


def test_pictures_are_the_same_again() -> None:
    again = check_pictures(4)
    assert all(
        a.kind == b.kind and a.image.tobytes() == b.image.tobytes()
        for a, b in zip(PICTURES, again, strict=True)
    )
    assert check_pictures(4, seed=1)[6].image.tobytes() != PICTURES[6].image.tobytes()  # noise
    by_prompt = [list(group) for _, group in itertools.groupby(PICTURES, lambda p: p.prompt.index)]
    assert [len(group) for group in by_prompt] == [len(KINDS) + 1] * 4
    assert all(group[0].role == "honest" for group in by_prompt)
    assert {p.role for p in PICTURES} == {"honest", "graded", "degenerate", "hack", "other"}


def test_page_stands_alone_and_escapes() -> None:
    def script(images: list[Any], **_: Any) -> RewardOutput:
        return RewardOutput(contrast(images), {"<b>": [None] * len(images)})

    report = check(LoadedReward("<script>", script), PICTURES[:12])
    page = render_page("check.html.j2", page_content(report, PICTURES[:12], "imagerl reward check <script>"))
    assert page.count("data:image/png;base64,") == 12
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "http" not in page and "<b>" not in page.split("</style>")[1].replace("<b class", "")
    broken = check(LoadedReward("broken", _zero_division), PICTURES[:12])
    assert "not fit to train on" in render_page("check.html.j2", page_content(broken, PICTURES[:12], "x"))


def test_a_reward_that_says_why_it_has_no_value_is_quoted() -> None:
    def judge(images: list[Any], **_: Any) -> RewardOutput:
        return RewardOutput([float("nan")] * len(images), {}, "the judge refuses: HTTP 400: \x1b[31mtoo dark")

    (finding,) = [finding for finding in check_function(judge).failed if finding.check == "values"]
    assert "pictures have no value (the first: " in finding.sentence and "guard" not in finding.sentence
    assert finding.sentence.endswith("): the judge refuses: HTTP 400: too dark")
    report = CheckReport("judge", [finding])
    assert (
        repr(CheckResult(report, [], "")).splitlines()[0].endswith("): the judge refuses: HTTP 400: too dark")
    )
