"""Each model at its best temperature: chosen on the other half of the prompts, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from imagerl.rl.evaluation.temperatures import at_best, compare_at_best, told_at_best


def _rows(*hits: float) -> list[dict[str, Any]]:
    return [{"index": i, "prompt": "p", "total": h, "exact_match": h} for i, h in enumerate(hits)]


def test_no_prompt_chooses_its_own_temperature() -> None:
    """Prompts 0 and 2 do well at 1, prompts 1 and 3 at 0.4: each half is judged at what the other half prefers."""
    tried = {1.0: _rows(1, 0, 1, 0), 0.4: _rows(0, 1, 0, 1)}
    rows, chosen = at_best(tried, "exact_match")
    assert chosen == (0.4, 1.0)
    assert [(row["index"], row["exact_match"]) for row in rows] == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert at_best({0.4: _rows(1, 1), 1.0: _rows(1, 1)}, "exact_match")[1] == (1.0, 1.0)


def test_choosing_among_equal_temperatures_by_chance_gains_nothing() -> None:
    """The best of ten noisy looks at the same prompts would be 2 standard errors too good; this one is not."""
    random, gains, greedy = np.random.default_rng(0), [], []
    for _ in range(200):
        tried = {float(t): _rows(*(random.random(40) < 0.5).astype(float)) for t in range(1, 11)}
        rows, _ = at_best(tried, "exact_match")
        gains.append(np.mean([row["exact_match"] for row in rows]) - 0.5)
        greedy.append(max(np.mean([row["exact_match"] for row in rows]) for rows in tried.values()) - 0.5)
    assert abs(np.mean(gains)) < 3 * 0.08 / np.sqrt(200) and np.mean(greedy) > 0.1


def test_both_models_are_compared_at_their_own() -> None:
    before = {1.0: _rows(*[0] * 8, *[1] * 2), 0.4: _rows(*[0] * 4, *[1] * 6)}
    after = {1.0: _rows(*[1] * 10), 0.4: _rows(*[0] * 10)}
    best = compare_at_best(before, after)
    assert best is not None and best["chosen"] == {"before": (0.4, 0.4), "after": (1.0, 1.0)}
    assert best["metrics"]["exact_match"]["difference"].mean == pytest.approx(0.4)
    line = told_at_best(compare_at_best(before, after))
    assert line is not None and "(0.4 before, 1 after, chosen on the other prompts): 60.0 % → 100.0 %" in line
    assert compare_at_best({1.0: _rows(1)}, {1.0: _rows(1)}) is None and told_at_best(None) is None
