"""Check on pictures of known worth whether a function is fit to be a reward; nothing here draws or prints."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np

from imagerl.rewards.base import LoadedReward
from imagerl.rewards.boundary.guard import Failure, answered
from imagerl.rewards.check.ranking import (
    Finding,
    KindRow,
    Verdict,
    judge_ranking,
    rank,
    rank_correlation,
    spread_of,
)
from imagerl.rewards.workers.scoring import RewardValues, to_values
from imagerl.rl.types import CheckPicture, ImageRLError, Prompt

TOLERANCE = 1e-4  # of the spread of all values: what rounding may change between two calls
LARGE = 100.0  # absolute value from which a reward is out of scale with others
SAME = 0.95  # rank correlation from which two rewards say the same
SINGLES = 48  # pictures scored one at a time
SIZES = ((1, 1), (1, 64), (200, 3), (17, 31), (1024, 768))  # pixels, width × height
MODES = ("1", "L", "LA", "P", "RGBA", "CMYK")


@dataclass(slots=True)
class CheckReport:
    """The findings about a reward. `values` [N] are in the order of the pictures, NaN where there is none."""

    label: str
    findings: list[Finding]
    kinds: list[KindRow] = field(default_factory=list)
    values: np.ndarray = field(default_factory=lambda: np.zeros(0))
    correlations: dict[str, float] = field(default_factory=dict)  # rank correlation by reward
    ms_alone: float = np.nan  # median of calls with one picture (one prompt's pictures, for a grouped reward)
    ms_batch: float = np.nan  # per picture, all in one call

    @property
    def failed(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.verdict == "fail"]


def score_pictures(reward: LoadedReward, pictures: Sequence[CheckPicture]) -> RewardValues:
    """Call a reward once. Raises ImageRLError as the reward does, and Failure for all else it may do wrong.

    Stand-ins for image tokens are made from the pixels."""
    names = dict.fromkeys(name for picture in pictures for name in picture.prompt.columns)
    samples: dict[str, list[object]] = {
        "prompts": [picture.prompt.text for picture in pictures],
        "completions": [list(picture.image.tobytes()[:64]) for picture in pictures],
        "images": [picture.image for picture in pictures],
        "groups": [picture.prompt.index for picture in pictures],
        "progress": [0.0] * len(pictures),
        **{name: [picture.prompt.columns.get(name) for picture in pictures] for name in names},
    }
    return to_values(answered(reward.fn, samples))


def check(
    reward: LoadedReward,
    pictures: Sequence[CheckPicture],
    others: Sequence[LoadedReward] = (),
    *,
    grouped: bool = False,
    penalty: bool = False,
    max_ms: float | None = None,
) -> CheckReport:
    """Run every check on pictures that stand together by prompt.

    `others` are rewards to correlate with. `grouped`: the reward compares the pictures of a prompt, so they are
    never torn apart. `penalty`: less is better. `max_ms` is the time allowed per picture in a batch.

    Raises ImageRLError as the reward itself does, for example because a column is missing."""
    report = CheckReport(reward.label, [])
    started = time.perf_counter()
    try:
        first = score_pictures(reward, pictures)
    except Failure as refusal:
        report.findings.append(Finding("answer", "fail", f"the call failed: {refusal}"))
        return report
    first_s = time.perf_counter() - started
    report.values = first.values
    report.findings.append(Finding("answer", "pass", f"one number for each of {len(pictures)} pictures"))
    report.findings += [_values(first, pictures), _nones(first)]
    if not np.isfinite(first.values).any():
        return report
    started = time.perf_counter()
    report.findings.append(_repeat(reward, pictures, first))
    report.ms_batch = (time.perf_counter() - started) / len(pictures) * 1e3
    report.findings.append(_order(reward, pictures, first))
    finding, report.ms_alone = _batch_size(reward, pictures, first, grouped)
    report.findings.append(finding)
    honest = next((p for p in pictures if p.role == "honest"), pictures[0])
    report.findings += [_sizes(reward, honest), _modes(reward, honest, first.values)]
    report.findings.append(_empty_rows(reward, pictures, first))
    sign = -1.0 if penalty else 1.0
    report.kinds = rank(sign * first.values, pictures, first.parts, sign)
    report.findings.append(judge_ranking(report.kinds))
    report.findings.append(_speed(report, first_s, max_ms))
    report.correlations = {other.label: _correlation(other, pictures, first.values) for other in others}
    if others:
        report.findings.append(_company(report.correlations))
    return report


def _shown(picture: CheckPicture) -> str:
    return f"{picture.kind}, {picture.prompt.text!r}"


def _values(first: RewardValues, pictures: Sequence[CheckPicture]) -> Finding:
    broken = ~np.isfinite(first.values) & ~first.not_applicable
    if broken.any():
        where = _shown(pictures[int(np.flatnonzero(broken)[0])])
        count = f"{int(broken.sum())} of {broken.size}"
        if first.reason is not None and not first.reason.startswith(
            ("returned nan", "returned inf", "returned -inf")
        ):
            return Finding(
                "values", "fail", f"{count} pictures have no value (the first: {where}): {first.reason}"
            )
        return Finding(
            "values",
            "fail",
            f"{count} values are NaN or infinite (the first: {where}): guard divisions and logarithms, and return "
            "None where the reward does not apply",
        )
    finite = first.values[np.isfinite(first.values)]
    if not finite.size:
        return Finding("values", "fail", "no picture has a value, so there is nothing to learn from")
    if finite.min() == finite.max():
        return Finding(
            "values", "fail", f"every picture earned {finite[0]:.4g}: there is nothing to learn from"
        )
    text = f"from {finite.min():.3g} to {finite.max():.3g}, mean {finite.mean():.3g}"
    if max(abs(finite.min()), abs(finite.max())) > LARGE:
        return Finding("values", "note", f"{text}: divide, or other rewards will not be heard beside it")
    return Finding("values", "pass", text)


def _nones(first: RewardValues) -> Finding:
    share = float(first.not_applicable.mean())
    if share == 1:
        why = first.reason or "which column does it miss?"
        return Finding("applies", "fail", f"None for every picture: it applies to none; {why}")
    verdict: Verdict = "note" if share > 0.5 else "pass"
    return Finding(
        "applies", verdict, "to every picture" if not share else f"None for {share:.0%} of pictures"
    )


def _differences(a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """Mark, as [B] bool, where two calls disagree beyond rounding, or only one has a value."""
    known = np.isfinite(a) & np.isfinite(b)
    return (np.isfinite(a) != np.isfinite(b)) | (
        known & (np.abs(np.where(known, a - b, 0)) > TOLERANCE * scale)
    )


def _compare(
    name: str,
    first: RewardValues,
    pictures: Sequence[CheckPicture],
    call: Callable[[], np.ndarray],
    good: str,
    bad: str,
) -> Finding:
    """Compare a call with the first one on the same pictures; `bad` may use {picture}, {before} and {after}."""
    before = first.values[: len(pictures)]
    try:
        after = call()
    except (Failure, ImageRLError) as error:
        return Finding(name, "fail", f"the call failed: {error}")
    wrong = np.flatnonzero(_differences(before, after, spread_of(first.values)))
    if not wrong.size:
        return Finding(name, "pass", good)
    at = int(wrong[0])
    text = bad.format(picture=_shown(pictures[at]), before=_number(before[at]), after=_number(after[at]))
    return Finding(name, "fail", f"{wrong.size} of {before.size} values changed: {text}")


def _number(value: float) -> str:
    return f"{value:.4g}" if np.isfinite(value) else "no value"


def _repeat(reward: LoadedReward, pictures: Sequence[CheckPicture], first: RewardValues) -> Finding:
    good = "the same pictures earn the same again"
    bad = (
        "{picture} earned {before}, and in a second call {after}; seed what is random, put models in eval mode, "
        "keep nothing between calls"
    )
    return _compare("repeat", first, pictures, lambda: score_pictures(reward, pictures).values, good, bad)


def _order(reward: LoadedReward, pictures: Sequence[CheckPicture], first: RewardValues) -> Finding:
    """Reverse the batch: pictures of a prompt stay together, and every one moves."""
    bad = (
        "{picture} earned {before}, and {after} with the batch reversed; score each picture by itself and return "
        "values in the order of the pictures"
    )
    backwards = lambda: score_pictures(reward, pictures[::-1]).values[::-1]  # noqa: E731
    return _compare("batch order", first, pictures, backwards, "does not matter", bad)


def _batch_size(
    reward: LoadedReward, pictures: Sequence[CheckPicture], first: RewardValues, grouped: bool
) -> tuple[Finding, float]:
    """Compare with small batches, and return the median ms of one."""
    few = pictures[:SINGLES]
    times: list[float] = []

    def call() -> np.ndarray:
        values = []
        for _, part in groupby(few, (lambda p: p.prompt.index) if grouped else id):
            started = time.perf_counter()
            values.append(score_pictures(reward, list(part)).values)
            times.append((time.perf_counter() - started) * 1e3)
        return np.concatenate(values)

    unit = "the pictures of a prompt alone" if grouped else "alone"
    bad = (
        f"{{picture}} earned {{before}} among {len(pictures)} pictures and {{after}} {unit}; how many pictures a "
        "call holds is not promised, so divide by nothing that is taken over the batch"
    )
    finding = _compare("batch size", first, few, call, f"{unit} or with others: the same", bad)
    return finding, float(np.median(times)) if times else np.nan


def _refusals(
    reward: LoadedReward, pictures: Sequence[tuple[str, CheckPicture]]
) -> tuple[list[str], list[RewardValues]]:
    """Score pictures one by one; return the error of each that failed, and the values of the others."""
    wrong, values = [], []
    for name, picture in pictures:
        try:
            value = score_pictures(reward, [picture])
        except (Failure, ImageRLError) as error:
            wrong.append(f"{name}: {error}")
            continue
        values.append(value)
        if not (np.isfinite(value.values[0]) or value.not_applicable[0]):
            wrong.append(f"{name}: {value.reason}")
    return wrong, values


def _sizes(reward: LoadedReward, honest: CheckPicture) -> Finding:
    resized = [(f"{w}×{h}", replace(honest, image=honest.image.resize((w, h)))) for w, h in SIZES]
    wrong, _ = _refusals(reward, resized)
    if wrong:
        return Finding("odd sizes", "fail", f"{len(wrong)} of {len(SIZES)} sizes failed, {wrong[0]}")
    return Finding("odd sizes", "pass", f"from {resized[0][0]} to {resized[-1][0]} pixels")


def _modes(reward: LoadedReward, honest: CheckPicture, values: np.ndarray) -> Finding:
    converted = [(mode, replace(honest, image=honest.image.convert(mode))) for mode in ("RGB", *MODES)]
    wrong, got = _refusals(reward, converted)
    if wrong:
        return Finding(
            "odd modes", "fail", f"{len(wrong)} modes failed, {wrong[0]}; begin with image.convert('RGB')"
        )
    plain, opaque = got[0].values, got[1 + MODES.index("RGBA")].values
    if _differences(plain, opaque, spread_of(values)).any():
        return Finding(
            "odd modes",
            "fail",
            f"an opaque RGBA picture earned {_number(opaque[0])}, the same in RGB {_number(plain[0])}; begin with "
            "image.convert('RGB')",
        )
    return Finding("odd modes", "pass", ", ".join(MODES))


def _empty_rows(reward: LoadedReward, pictures: Sequence[CheckPicture], first: RewardValues) -> Finding:
    """Score rows whose columns are missing and whose prompt is empty."""
    which = [index for index, picture in enumerate(pictures) if picture.role == "honest"][:8]
    emptied = [
        replace(
            pictures[index],
            prompt=Prompt(pictures[index].prompt.index, "", dict.fromkeys(pictures[index].prompt.columns)),
        )
        for index in which
    ]
    name = "empty rows"
    try:
        values = score_pictures(reward, emptied)
    except ImageRLError as error:
        return Finding(name, "pass", f"refused with: {error}")
    except Failure as refusal:
        return Finding(
            name, "fail", f"an empty prompt and columns of None gave {refusal}; return None for such a sample"
        )
    if (~np.isfinite(values.values) & ~values.not_applicable).any():
        return Finding(
            name, "fail", "an empty prompt and columns of None gave NaN; return None for such a sample"
        )
    if (
        not values.not_applicable.any()
        and not values.values.any()
        and np.nan_to_num(first.values[which]).any()
    ):
        return Finding(
            name,
            "fail",
            "an empty prompt and columns of None earned 0 without a word: return None, or such prompts teach that "
            "every picture is bad",
        )
    said = "None" if values.not_applicable.all() else f"{np.nanmean(values.values):.3g} on average"
    return Finding(name, "pass", f"an empty prompt and columns of None give {said}")


def _speed(report: CheckReport, first_s: float, max_ms: float | None) -> Finding:
    text = (
        f"{report.ms_batch:.3g} ms a picture in one batch, {report.ms_alone:.3g} ms for a call of its own, "
        f"first call {first_s:.2g} s"
    )
    if max_ms is not None and report.ms_batch > max_ms:
        return Finding("time", "fail", f"{text}; {max_ms:g} ms are allowed")
    return Finding("time", "pass", text)


def _correlation(other: LoadedReward, pictures: Sequence[CheckPicture], values: np.ndarray) -> float:
    try:
        return rank_correlation(values, score_pictures(other, pictures).values)
    except (Failure, ImageRLError):  # it may want a column that this set does not have
        return float("nan")


def _company(correlations: dict[str, float]) -> Finding:
    known = {label: value for label, value in correlations.items() if np.isfinite(value)}
    text = ", ".join(f"{label} {value:+.2f}" for label, value in known.items()) or "none could be compared"
    same = [label for label, value in known.items() if abs(value) >= SAME]
    if same:
        return Finding("company", "note", f"{text}: says almost the same as {', '.join(same)}")
    return Finding("company", "pass", f"rank correlation with the shipped rewards: {text}")
