"""Tables and page of a comparison, from run folders written by hand."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagerl.api.comparing import ComparisonResult
from imagerl.rl.compare import page as comparison_page
from imagerl.rl.compare.page import comparison_charts, sentence, write_comparison_page
from imagerl.rl.compare.plan import BudgetSpec, Plan
from imagerl.rl.compare.results import Contrast, collect
from imagerl.rl.compare.tables import write_tables
from imagerl.rl.errors import ImageRLError
from imagerl.rl.evaluation.stats import Interval, crossed_interval
from imagerl.rl.files.grids import image_grid, save_image
from imagerl.rl.files.metrics import MetricsLog, to_json
from imagerl.rl.run.charts import Chart
from tests.rl.run.test_report import HOSTILE, _Page

PROMPTS = 20


def write_run(
    folder: Path, hits: Sequence[int], steps: int = 2, every: int = 8, lr: float = 0.1, prompts: int = PROMPTS
) -> None:
    """A run whose evaluations, at equal distances, have so many prompts right; `ink` (gold) is always 1, `hard`
    missing for the first prompt."""
    folder.mkdir(parents=True)
    gold = "[{import_path: 'x.py:ink'}]"
    (folder / "recipe.yaml").write_text(f"run: {{steps: {steps}}}\noptim: {{lr: {lr}}}\ngold: {gold}\n")
    with MetricsLog(folder) as log:
        log.log(0, {"eval/ocr/exact_match": hits[0] / prompts})
        for step in range(1, steps + 1):
            log.log(
                step,
                {
                    "rollout/images": every,
                    "time/step_s": 30.0,
                    "reward/mean": step / 10,
                    "kl/k3": 0.01 * step,
                },
            )
    for number, right in enumerate(hits):
        rows = [
            {
                **{"index": i, "prompt": f"{HOSTILE} {i}", "exact_match": float(i < right), "ink": 1.0},
                "hard": None if i == 0 else i / prompts,
            }
            for i in range(prompts)
        ]
        step = number * steps // (len(hits) - 1)
        path = folder / "eval" / f"ocr_step_{step:06d}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(to_json({"suite": "ocr", "step": step, "per_prompt": rows}))
        grid = image_grid(np.full((2, 8, 16, 3), 9 * number, np.uint8), 2)
        save_image(grid, folder / "samples" / f"step_{step:06d}.png")
    (folder / "eval" / "comparison.json").write_text("{}")


def write_plan(folder: Path, *labels: str, seeds: int = 3, unit: Any = "images") -> None:
    paths = {label: f"{label}.yaml" for label in labels}
    folder.mkdir(parents=True, exist_ok=True)
    Plan(BudgetSpec(unit, 16), list(range(seeds)), paths, labels[0], []).write(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`b` ends 8 of 20 prompts above `a` with every seed."""
    write_plan(tmp_path, "a", "b")
    for seed in range(3):
        write_run(tmp_path / "a" / f"seed-{seed}", [4, 6 + seed])
        write_run(tmp_path / "b" / f"seed-{seed}", [4, 14 + seed], lr=0.2)
    return tmp_path


def gaps_of(more: int, least: int) -> np.ndarray:
    """[3, 20] differences between a run that has the first `least` + seed prompts right and one of `more` more."""
    right = np.arange(PROMPTS) < np.arange(least, least + 3)[:, None]
    return (np.arange(PROMPTS) < np.arange(least + more, least + more + 3)[:, None]).astype(float) - right


def test_numbers_are_those_of_the_runs(folder: Path) -> None:
    results = collect(folder)
    assert results.metrics == ["exact_match", "ink", "hard"] and results.gold == ["ink"]
    standing = {(s.label, s.metric, s.kind): s for s in results.standings}
    assert standing["b", "exact_match", "final"].by_seed == {0: 0.7, 1: 0.75, 2: 0.8}
    assert standing["b", "exact_match", "final"].iqm == pytest.approx(0.75)
    assert standing["b", "exact_match", "mean"].by_seed[0] == pytest.approx((0.2 + 0.7) / 2)
    assert standing["a", "hard", "final"].mean.mean == pytest.approx(np.mean([i / 20 for i in range(1, 20)]))
    (final,) = [c for c in results.contrasts if (c.metric, c.kind) == ("exact_match", "final")]
    assert (final.label, final.baseline, final.seeds, final.prompts) == ("b", "a", [0, 1, 2], 20)
    assert final.difference.mean == pytest.approx(0.4) and final.spread == pytest.approx(0.0)
    # 6 prompts differ with all seeds, 2 with two of them, 2 with one: sum of squares 6 + 8/9 + 2/9, about 0.4
    half = 2.093 * ((6 + 10 / 9 - 20 * 0.4**2) / 19 / 20) ** 0.5
    assert final.these_runs.high - 0.4 == pytest.approx(half, rel=1e-3)
    assert 0.4 - final.these_runs.low == pytest.approx(half, rel=1e-3)
    assert final.difference == crossed_interval(gaps_of(8, 6)) and final.verdict == "higher"
    assert final.corrected == final.difference and final.holds_corrected  # the only contrast
    assert final.improvement == 1.0
    (gold,) = [c for c in results.contrasts if (c.metric, c.kind) == ("ink", "final")]
    assert (gold.difference.mean, gold.verdict) == (
        0.0,
        "no difference shown",
    ) and gold.improvement == 0.5
    gains = {c.label: c for c in results.gains if c.metric == "exact_match"}
    assert gains["a"].difference.mean == pytest.approx(0.15) and gains["b"].difference.mean == pytest.approx(
        0.55
    )
    assert results.notes == []


def test_tables(folder: Path) -> None:
    write_tables(collect(folder), folder)
    runs, steps, contrasts = (
        list(csv.DictReader((folder / f"{name}.csv").read_text().splitlines()))
        for name in ("runs", "steps", "contrasts")
    )
    assert [(r["recipe"], r["seed"], r["images"], r["minutes"]) for r in runs] == [
        (label, seed, "16.0", "1.0") for label in "ab" for seed in "012"
    ]
    assert float(runs[3]["final/exact_match"]) == 0.7 and float(runs[3]["last/kl/k3"]) == 0.02
    assert runs[0]["last/flow/kl"] == ""
    assert [(r["step"], r["images"], r["reward/mean"]) for r in steps[:3]] == [
        *(("0", "0.0", ""), ("1", "8.0", "0.1"), ("2", "16.0", "0.2"))
    ]
    assert len(steps) == 18 and steps[0]["eval/ocr/exact_match"] == "0.2"
    (row,) = [r for r in contrasts if (r["metric"], r["kind"], r["baseline"]) == ("exact_match", "mean", "a")]
    assert float(row["difference"]) == pytest.approx(0.2) and row["verdict"] == "higher"


def test_the_page_tells_it(folder: Path) -> None:
    (folder / "environment.json").write_text(
        to_json({"command": ["/x/imagerl", "compare", HOSTILE], "cores": 2})
    )
    html = write_comparison_page(collect(folder), folder).read_text()
    page = _Page(html)
    text = " ".join(page.text.split())
    assert "2 recipes, 3 seeds each, 16 images a run" in text and "6 of 6 runs finished" in text
    assert re.search(
        r"b against a, after training: higher \(\+40\.0 points, \+[\d.]+ to \+[\d.]+, 3 seeds\)", text
    )
    assert re.search(r"Do it again imagerl compare \S+ \S+ --seeds 3 --budget images=16 .*--baseline a", text)
    assert "b against its start" in text and "gold" in text and "baseline" in text
    assert "<script>" not in html and HOSTILE in page.text.replace("'\"'\"'", "'")  # in the quoted command
    pictures = [attributes["src"] for attributes in page.all("img")]
    assert len(pictures) == 3 and all(src.startswith("data:image/png;base64,") for src in pictures)
    assert not [a for tag, a in page.tags if tag in ("link", "script") or a.get("href", "#")[0] != "#"]
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids)) and len(page.all("svg")) > 4
    assert "optim.lr" in text and "0.2" in text  # where the recipes differ


def test_the_card_says_what_is_missing_and_means_need_four_seeds(folder: Path) -> None:
    card, page = (
        ComparisonResult(folder)._repr_html_(),
        write_comparison_page(collect(folder), folder).read_text(),
    )
    assert "6 of 6 runs finished" in card and "state finished" in card and "IQM over seeds" not in page
    write_plan(folder, "a", "b", seeds=4)
    write_run(folder / "b" / "seed-3", [4, 17])
    card, page = (
        ComparisonResult(folder)._repr_html_(),
        write_comparison_page(collect(folder), folder).read_text(),
    )
    assert "7 of 8 runs finished" in card and "state finished" not in card and "IQM over seeds" in page


def test_charts_have_the_median_and_the_band(folder: Path) -> None:
    write_run(folder / "b" / "seed-3", [4, 0])
    charts = {chart.title: chart for chart in comparison_charts(collect(folder))}
    exact = {series.label: series for series in charts["exact_match"].series}
    assert exact["b"].steps == [0, 16] and exact["b"].values == [0.2, 0.725]
    assert (exact["b"].low, exact["b"].high) == ([0.2, 0.0], [0.2, 0.8])
    assert exact["a"].values == pytest.approx([0.2, 0.35]) and charts["exact_match"].percent
    assert charts["Training total"].series[0].steps[0] == 8  # nothing is known before
    assert charts["Training total"].axis == "image"


def test_many_recipes_share_no_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = [f"r{i}" for i in range(9)]
    write_plan(tmp_path, *labels, seeds=1)
    for label in labels:
        write_run(tmp_path / label / "seed-0", [4, 8])
    results = collect(tmp_path)
    exact = [chart for chart in comparison_charts(results) if chart.title == "exact_match"]
    assert [len(chart.series) for chart in exact] == [7, 3]
    assert all(chart.series[0].label == "r0" for chart in exact)
    drawn: list[Chart] = []
    monkeypatch.setattr(comparison_page, "render", lambda chart: drawn.append(chart) or "")
    page = write_comparison_page(results, tmp_path).read_text()
    assert "no difference shown (+0.0 points, too few to tell, 1 seed; it takes 3 to say something" in page
    assert drawn and "nan" not in page


def test_what_is_unfinished_or_odd_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison_page, "render", lambda chart: "")
    (folder / "b" / "seed-1" / "eval" / "comparison.json").unlink()
    changed = folder / "a" / "seed-1" / "eval" / "ocr_step_000000.json"
    changed.write_text(changed.read_text().replace('"exact_match": 0.0', '"exact_match": 1.0', 1))
    results = collect(folder)
    assert results.notes == [
        "b lacks a finished run of seed 1",
        "the evaluation before training differs from a's in: a",
    ]
    assert "b lacks a finished run of seed 1" in write_comparison_page(results, folder).read_text()
    (contrast,) = [c for c in results.contrasts if (c.metric, c.kind) == ("exact_match", "final")]
    assert contrast.seeds == [0, 2] and contrast.verdict == "no difference shown"
    write_run(folder / "b" / "seed-7", [1, 2], prompts=7)
    with pytest.raises(ImageRLError, match="evaluated on other prompts"):
        collect(folder)


def test_nothing_finished_has_a_page_too(tmp_path: Path) -> None:
    write_plan(tmp_path, "a", "b")
    results = collect(tmp_path)
    write_tables(results, tmp_path)
    assert "No run is finished yet" in write_comparison_page(results, tmp_path).read_text()
    with pytest.raises(ImageRLError, match="holds no comparison"):
        collect(tmp_path / "elsewhere")
    (tmp_path / "comparison.json").write_text("{}")
    with pytest.raises(ImageRLError, match="damaged"):
        collect(tmp_path)


def test_minutes_are_the_axis_of_a_budget_of_minutes(tmp_path: Path) -> None:
    write_plan(tmp_path, "a", unit="minutes")
    write_run(tmp_path / "a" / "seed-0", [0, 10, 20], steps=4)
    results = collect(tmp_path)
    (chart, *_) = comparison_charts(results)
    assert chart.series[0].steps == [0, 1, 2] and chart.axis == "minute"
    assert [s.mean.mean for s in results.standings if s.metric == "exact_match"] == [1.0, 0.5]


def test_sentences() -> None:
    gap = Interval(-0.031, -0.05, -0.012, 3)
    one = Contrast(
        *("b", "a", "total", "mean", [0, 1, 2], 9, gap, gap, gap, 0.01, 0.5),
        verdict="lower",
        holds_corrected=False,
    )
    assert sentence(one, rate=False) == (
        "b against a, on average over the budget: lower (−0.031, −0.050 to −0.012, 3 seeds; "
        "not with all comparisons counted)"
    )
