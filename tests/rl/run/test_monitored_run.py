"""A run whose reward and gold metric pull against each other, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from imagerl.rl.files.metrics import read_metrics
from tests.command import call
from tests.micro import micro_folder
from tests.small_run import write_recipe

GOLD = '''
def high_tokens(completions, **_):
    """What low_tokens of reward.py takes away."""
    return [sum(token >= 8 for token in tokens) / len(tokens) for tokens in completions]
'''


def test_a_run_ends_when_its_reward_is_gamed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    micro_folder(tmp_path / "model")
    (tmp_path / "gold.py").write_text(GOLD)
    recipe = write_recipe(
        tmp_path,
        *("run.steps=40", "run.sample_every=0", "optim.lr=0.03", "rollout.group_size=8"),
        *("data.heldout.size=32", "eval.size=32", "eval.every=2", "checkpoint.every=0"),
        f"gold=[{{import_path: {tmp_path / 'gold.py'}:high_tokens}}]",
        "monitors={stop: true, level: 0.95}",
    )
    run = tmp_path / "run"
    assert call("train", str(recipe)) == 0
    output = capsys.readouterr().out
    assert "ALARM step" in output and "the reward is being gamed: since step" in output
    records = read_metrics(run)
    (alarm,) = [r for r in records if r.get("alarm/hacking")]
    end = alarm["step"]
    assert end < 40 and end == records[-1]["step"]
    assert alarm["monitor/high_tokens/since_peak"] == pytest.approx(
        alarm["eval/ocr/high_tokens"]
        - max(r["eval/ocr/high_tokens"] for r in records if "eval/ocr/high_tokens" in r)
    )
    assert f"ended after step {end} by monitors.stop" in output
    assert json.loads((run / "eval" / "comparison.json").read_text())["after_step"] == end
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step_{end:06d}"]
    peak = int(alarm["monitor/high_tokens/peak_step"])
    kept = [p.name for p in (run / "peak").iterdir()] if (run / "peak").exists() else []
    assert kept == ([f"step_{peak:06d}"] if peak else [])
    page = (run / "report.html").read_text()
    assert 'role="alert"' in page and f"finished, step {end} of {end}" in page

    assert call("train", str(recipe), "--resume") == 0  # there is nothing left to do
    assert read_metrics(run) == records
    assert call("train", str(recipe), "--resume", "monitors.stop=false", f"run.steps={end + 1}") == 0
    assert read_metrics(run)[-1]["step"] == end + 1


def test_a_watched_metric_must_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    micro_folder(tmp_path / "model")
    recipe = write_recipe(tmp_path, "monitors.watch=[exact_match]")
    assert call("train", str(recipe)) == 1
    message = capsys.readouterr().err
    assert 'monitors.watch: evaluations have no "exact_match"; they have low_tokens' in message
