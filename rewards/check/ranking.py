"""Tell whether a reward prefers honest pictures, and which other rewards it agrees with. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from imagerl.rl.types import CheckPicture

Verdict = Literal["pass", "note", "fail"]
MARGIN = 0.05  # of the spread: a smaller difference between two kinds of picture counts as none


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check, in one sentence; a failed one says how to mend it."""

    check: str
    verdict: Verdict
    sentence: str


@dataclass(frozen=True, slots=True)
class KindRow:
    """A reward's values for one kind of picture, beside the honest pictures of the same prompts."""

    kind: str
    role: str
    verdict: Verdict
    sentence: str
    mean: float  # NaN where the reward has no value for it
    low: float
    high: float
    behind: float  # mean of (honest − this kind) over prompts that have both
    parts: dict[str, float]  # means of the breakdown


def spread_of(values: np.ndarray) -> float:
    """Return largest less smallest of the finite values; 0 without any."""
    finite = values[np.isfinite(values)]
    return float(finite.max() - finite.min()) if finite.size else 0.0


def rank(
    values: np.ndarray, pictures: Sequence[CheckPicture], parts: dict[str, np.ndarray], sign: float = 1.0
) -> list[KindRow]:
    """Return one row for every kind of picture. `values` [N] are better when larger; `sign` restores what the
    reward said."""
    honest = {p.prompt.index: v for p, v in zip(pictures, values, strict=True) if p.role == "honest"}
    margin = MARGIN * spread_of(values)
    rows = []
    for kind, role in dict.fromkeys((picture.kind, picture.role) for picture in pictures):
        which = np.array([picture.kind == kind for picture in pictures])
        own = values[which]
        prompts = [picture.prompt.index for picture in pictures if picture.kind == kind]
        behind = _mean(np.array([honest.get(prompt, np.nan) for prompt in prompts]) - own)
        verdict, sentence = _judge(kind, role, behind, margin)
        finite = sign * own[np.isfinite(own)]
        low, high = (finite.min(), finite.max()) if finite.size else (np.nan, np.nan)
        means = {name: _mean(column[which]) for name, column in parts.items()}
        rows.append(KindRow(kind, role, verdict, sentence, _mean(sign * own), low, high, behind, means))
    return rows


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else np.nan


def _judge(kind: str, role: str, behind: float, margin: float) -> tuple[Verdict, str]:
    """Judge a kind that earns `behind` less than an honest picture."""
    if role == "honest":
        return "pass", ""
    if not np.isfinite(behind):
        return "note", "not compared: no value"
    if behind < -margin:
        return ("note" if role == "graded" else "fail"), "earns more than an honest picture"
    if behind <= margin:
        if role == "degenerate":
            return "fail", "earns as much as an honest picture"
        return "note", "earns as much as an honest picture"
    return "pass", "earns less than an honest picture"


def judge_ranking(rows: Sequence[KindRow]) -> Finding:
    """Fail when a kind that must earn less does not."""
    worst = [row for row in rows if row.verdict == "fail"]
    means = {row.role: row.mean for row in rows if row.role == "honest"}
    if worst:
        most = min(worst, key=lambda row: row.behind)
        return Finding(
            "ranking",
            "fail",
            f'"{most.kind}" {most.sentence} ({most.mean:.3g} beside {means.get("honest", np.nan):.3g}): a policy '
            f"that is trained on this will draw it{_also(worst, most)}",
        )
    notes = [row.kind for row in rows if row.verdict == "note" and row.role in ("hack", "other")]
    if notes:
        return Finding("ranking", "note", f"as much as an honest picture: {', '.join(notes)}")
    return Finding("ranking", "pass", "honest pictures earn most")


def _also(worst: Sequence[KindRow], most: KindRow) -> str:
    others = [row.kind for row in worst if row is not most]
    return f"; so with {', '.join(others)}" if others else ""


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's where both are finite; ties share their mean rank. NaN where one is constant."""
    from scipy.stats import spearmanr

    known = np.isfinite(a) & np.isfinite(b)
    if known.sum() < 2 or any(np.ptp(column[known]) == 0 for column in (a, b)):
        return float("nan")
    return float(spearmanr(a[known], b[known]).statistic)
