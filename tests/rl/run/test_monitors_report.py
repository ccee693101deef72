from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from imagerl.rl.config.monitors import MonitorsConfig
from imagerl.rl.files.metrics import MetricsLog
from imagerl.rl.run import report as report_module
from imagerl.rl.run.monitors import Watch
from imagerl.rl.run.monitors_report import alarms, monitor_charts, watched_names
from imagerl.rl.run.report import write_report
from imagerl.rl.run.svg import render
from tests.rl.run.test_monitors import flat, hits, picture_metrics, rows


def run(stop_at: int = 8) -> tuple[list[dict[str, Any]], list[str]]:
    """Records of a run that games its reward from step 4 on and loses variety from step 6 on, and its alarms."""
    watch, records, said = Watch(MonitorsConfig(window=3), ["gold"]), [], []
    for step in range(stop_at + 1):
        if step:
            drawn = picture_metrics(0.4 if step < 6 else 0.05)
            found, new = watch.after_step(step, drawn)
            trained = {"reward/mean": 0.1 * step, "kl/k3": 0.01 * step, "loss": 0.0}
            records.append({"step": step, **trained, **drawn, **found, "pictures/saturation": 0.5})
            said += new
        if step % 2 == 0:
            gold = hits(20 if step < 4 else 5)
            total = flat(0.1 * step)
            found, new = watch.after_evaluation(step, rows(gold, total))
            means = {"eval/ocr/gold": sum(gold) / len(gold), "eval/ocr/total": sum(total) / len(total)}
            records.append({"step": step, **means, **found})
            said += new
    return records, said


def test_the_page_repeats_the_alarms_of_the_log() -> None:
    records, said = run()
    assert [line.partition(": ")[0] for line in said] == ["step 4", "step 8"]
    assert alarms(records, window=3) == said
    assert alarms(run(2)[0], window=3) == []


def test_curves() -> None:
    charts = {chart.title: chart for chart in monitor_charts(run()[0], "ocr")}
    assert watched_names(run()[0]) == ["gold"]
    reward, gold = charts["Total and gold"].series
    assert reward.steps == [0, 2, 4, 6, 8] and gold.values == [0.5, 0.5, 0.125, 0.125, 0.125]
    training, against = charts["Total against KL"].series
    assert training.steps == pytest.approx([0.01 * s for s in range(1, 9)])
    assert training.values == pytest.approx([0.1 * s for s in range(1, 9)])
    assert against.steps == pytest.approx([0, 0.02, 0.04, 0.06, 0.08])
    assert [s.label for s in charts["Variety within groups"].series] == ["tokens", "pixels"]
    assert [s.label for s in charts["Look of the pictures"].series] == ["saturation", "blank"]
    assert charts["Correlation of total and gold"].series[0].steps == [4, 6]  # then gold stands still
    svg = render(charts["Total against KL"])
    assert "KL to the reference" in svg and "at KL to the reference, nats per token 0.01" in svg


def test_a_run_without_monitors_has_no_such_curves() -> None:
    records = [{"step": 1, "reward/mean": 0.5}, {"step": 1, "eval/ocr/exact_match": 0.5}]
    assert not any(chart.series for chart in monitor_charts(records, "ocr"))
    assert alarms(records) == []


@pytest.mark.parametrize("steps", [2, 8])
def test_the_box(tmp_path: Path, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "render", lambda chart: "<svg></svg>")
    records, said = run(steps)
    with MetricsLog(tmp_path) as log:
        for record in records:
            log.log(record["step"], {k: v for k, v in record.items() if k != "step"})
    (tmp_path / "recipe.yaml").write_text("monitors: {window: 3}\neval: {suite: ocr}\nrun: {steps: 8}\n")
    page = write_report(tmp_path).read_text()
    assert ('role="alert"' in page) is bool(said)
    for line in said:
        assert f"<li>S{line[1:]}.</li>" in page
