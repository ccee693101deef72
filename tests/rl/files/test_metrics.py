import io
import json
import math
import os

import numpy as np
import pytest
import torch
from rich.console import Console

from imagerl.rl.errors import ImageRLError
from imagerl.rl.files import metrics as metrics_module
from imagerl.rl.files.metrics import (
    METRICS_FILE,
    MetricsLog,
    Progress,
    fixed,
    is_timing,
    progress_line,
    read_metrics,
    to_json,
)
from imagerl.rl.training.step_metrics import PhaseTimer


def _log(run_dir, steps, resume_step=None):
    with MetricsLog(run_dir, resume_step) as log:
        for step in steps:
            log.log(step, {"reward/mean": step / 3, "kl/k3": 1e-7 * step})


def test_lines_are_valid_json_with_exact_floats(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.log(
            3,
            {
                "a": 0.1 + 0.2,
                "b": np.float32(0.1),
                "c": torch.tensor(2),
                "d": math.nan,
                "e": np.float64("inf"),
                "f": np.True_,
                "g": None,
            },
        )
        line = (tmp_path / METRICS_FILE).read_text()  # before close: nothing waits in a buffer
    assert line.endswith("\n") and "NaN" not in line and "Infinity" not in line
    expected = {"step": 3, "a": 0.1 + 0.2, "b": float(np.float32(0.1)), "c": 2}
    assert json.loads(line) == expected | {"d": None, "e": None, "f": True, "g": None}


def test_every_line_is_synced(tmp_path, monkeypatch):
    log, synced = MetricsLog(tmp_path), []
    monkeypatch.setattr(metrics_module.os, "fsync", lambda fd: synced.append(log.path.stat().st_size))
    log.log(1, {"a": 1})
    log.log(2, {"a": 1})
    log.close()
    assert len(synced) == 2 and 0 < synced[0] < synced[1]


@pytest.mark.parametrize("value", ["text", torch.zeros(2), [1.0]])
def test_only_numbers_are_metrics(tmp_path, value):
    with MetricsLog(tmp_path) as log, pytest.raises(TypeError, match="metric bad must be"):
        log.log(1, {"bad": value})
    assert (tmp_path / METRICS_FILE).read_bytes() == b""


@pytest.mark.parametrize("torn", [b"", b'{"step": 8, "rew', b'{"step": 8, "reward/mean": 1.0}'])
def test_resume_equals_a_run_that_never_stopped(tmp_path, torn):
    _log(tmp_path / "whole", range(1, 11))
    _log(tmp_path / "killed", range(1, 8))
    path = tmp_path / "killed" / METRICS_FILE
    path.write_bytes(path.read_bytes() + torn)
    _log(tmp_path / "killed", range(6, 11), resume_step=5)
    assert path.read_bytes() == (tmp_path / "whole" / METRICS_FILE).read_bytes()


def test_resume_before_the_first_checkpoint_drops_all(tmp_path):
    _log(tmp_path, [0, 1, 2])
    _log(tmp_path, [0, 1], resume_step=-1)
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1]


def test_a_new_run_never_overwrites_another(tmp_path):
    _log(tmp_path, [1])
    with pytest.raises(ImageRLError, match="--resume"):
        MetricsLog(tmp_path)
    assert len(read_metrics(tmp_path)) == 1


def test_damage_in_the_middle_is_named(tmp_path):
    _log(tmp_path, [1])
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('\0\0\n{"step": 2}\n')
    with pytest.raises(ImageRLError, match="line 2"):
        MetricsLog(tmp_path, resume_step=2)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_line(tmp_path):
    with MetricsLog(tmp_path) as log:
        log._file.close()
        log._file = io.FileIO("/dev/full", "ab")
        with pytest.raises(ImageRLError, match=r"disk full.*--resume"):
            log.log(1, {"a": 1})


def test_numbers_of_any_size_stay_short():
    assert [fixed(v) for v in (0.1234, -2.0, 1e300, -1e9)] == ["0.123", "-2.000", "1e+300", "-1e+09"]
    assert fixed(0.5, 1, sign=True) == "+0.5"


def test_timing_keys():
    assert all(map(is_timing, ["time/rollout_s", "share/other", "images_per_s"]))
    assert not any(map(is_timing, ["reward/mean", "step", "kl/k3", "policy/ratio_mean", "eval/ocr/reward"]))


def test_to_json_cleans_nested_values():
    text = to_json({"a": [np.float64("nan"), (1, np.int64(2))], 3: {"b": -math.inf}})
    assert json.loads(text) == {"a": [None, [1, 2]], "3": {"b": None}}


def test_phase_timer_adds_up():
    now = [100.0]
    syncs = []
    timer = PhaseTimer(synchronise=lambda: syncs.append(now[0]), clock=lambda: now[0])

    def phase(name, seconds):
        with timer(name):
            now[0] += seconds

    phase("rollout", 3.0)
    phase("update", 1.0)
    phase("rollout", 2.0)
    now[0] += 2.0
    assert timer.metrics() == {
        "time/rollout_s": 5.0,
        "time/update_s": 1.0,
        "time/step_s": 8.0,
        "share/rollout": 0.625,
        "share/update": 0.125,
        "share/other": 0.25,
    }
    assert len(syncs) == 6
    now[0] += 50.0  # an evaluation between two steps belongs to neither
    timer.start()
    phase("update", 4.0)
    assert timer.metrics()["share/update"] == 1.0


def test_phase_timer_counts_a_phase_that_fails():
    now = [0.0]
    timer = PhaseTimer(clock=lambda: now[0])

    def fail():
        with timer("rewards"):
            now[0] += 1.0
            raise RuntimeError("broken reward")

    with pytest.raises(RuntimeError, match="broken reward"):
        fail()
    assert timer.metrics()["time/rewards_s"] == 1.0


def test_progress_line():
    values = {"reward/mean": 0.4234, "kl/k3": 0.00119, "reward/ocr/exact_match/mean": 0.406}
    assert (
        progress_line(7, 200, values, 192) == "step   7/200  total 0.423  KL 0.0012  exact 41 %  3m12s left"
    )
    assert progress_line(7, 9, {"reward/mean": None}, 3725.2) == "step 7/9  1h02m left"


def test_progress_is_a_few_plain_lines_without_a_terminal():
    out = io.StringIO()
    with Progress(30, console=Console(file=out, width=20)) as progress:
        for step in range(1, 31):
            progress.update(step, {"reward/mean": 0.5})
        progress.note("saved [a/b]")
    lines = out.getvalue().splitlines()
    assert [line.split("/")[0] for line in lines[:-1]] == ["step  1", "step 10", "step 20", "step 30"]
    assert lines[-1] == "saved [a/b]" and "\x1b" not in out.getvalue()


def test_progress_is_live_on_a_terminal():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with Progress(4, start_step=1, console=console) as progress:
        progress.update(2, {"reward/mean": 0.5})
    assert "step 2/4" in out.getvalue() and "total 0.500" in out.getvalue() and "\x1b[" in out.getvalue()


@pytest.mark.parametrize(
    "line",
    [
        "[1]",
        '{"step": "1"}',
        '{"step": -1}',
        '{"step": 1, "kl/k3": [1]}',
        '{"step": 1, "a": 1e999}',
        "[" * 9999,
    ],
)
def test_a_line_that_no_run_wrote_is_named(tmp_path, line):
    (tmp_path / METRICS_FILE).write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ImageRLError, match="line 2 is damaged; delete that line"):
        read_metrics(tmp_path)
