from __future__ import annotations

import math

import pytest

from benchmarks.__main__ import bench
from benchmarks.algorithms import EXTRAS, bench_algorithms
from imagerl.rl.commands.cli import main
from imagerl.rl.config.algorithm_table import ALGORITHMS


def test_every_algorithm_is_compared_with_grpo() -> None:
    report = bench_algorithms(samples=4, actions=3, group_size=2, vocabulary=5, repeats=1)
    others = [name for name in ALGORITHMS if name != "grpo"] + [f"grpo + {extra}" for extra in EXTRAS]
    wanted = {f"ratio/{name}/{part}" for name in others for part in ("update", "loss", "advantages")}
    assert {name for name in report if name.startswith("ratio/")} == wanted
    assert all(math.isfinite(value) and value > 0 for value in report.values())
    assert report["share/grpo/loss"] == report["time/grpo/loss_s"] / report["time/grpo/update_s"]


def test_groups_must_be_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["algorithms", "--samples", "5", "--group-size", "2"], bench)
    assert "--group-size 2 must divide --samples 5" in capsys.readouterr().err
