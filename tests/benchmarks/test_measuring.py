from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from benchmarks.__main__ import bench
from benchmarks.measuring import bench_rollout, bench_step, interleaved, operator_shares, show, table
from benchmarks.rewards import bench_rewards
from imagerl.rl.commands.cli import main
from imagerl.rl.data.tiny.world import prompt_set
from imagerl.rl.errors import ImageRLError
from imagerl.rl.rollout.engine import RolloutEngine
from imagerl.rl.types import SamplingParams
from tests.micro import micro_folder, micro_policy
from tests.small_run import write_recipe


def test_the_rollout_benchmark_measures_every_part() -> None:
    policy, _ = micro_policy()
    rollout = RolloutEngine(policy, SamplingParams(flow_steps=2), 0, nullcontext)
    report = bench_rollout(rollout, prompt_set("train", 2), group_size=2, repeats=1)
    parts = {"sample", "flow", "vae", "random", "other"}
    assert {f"share/{part}" for part in parts} | {f"time/{part}_s" for part in parts} <= report.keys()
    assert sum(report[f"share/{part}"] for part in parts) == pytest.approx(1)
    ratio = report["time/generate_s"] / report["time/sample_s"]
    assert report["ratio/over_generate"] == pytest.approx(ratio)
    assert report["ratio/over_generate_and_scoring"] > ratio
    assert report["sampled_tokens_per_s"] == pytest.approx(4 * 8 / report["time/sample_s"])
    assert report["images_per_s"] == pytest.approx(report["rollout_tokens_per_s"] / 8)
    assert report["peak_memory_mb"] > 50
    operators = {name: value for name, value in report.items() if name.startswith("share/op/")}
    assert len(operators) == 9 and sum(operators.values()) == pytest.approx(1)


def test_transformers_draws_as_many_tokens_as_we_do(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, _ = micro_policy()
    lengths = []
    plain = policy.trainable.lm.generate

    def watched(**arguments: object) -> object:
        out = plain(**arguments)
        lengths.append(tuple(out.shape))
        return out

    monkeypatch.setattr(policy.trainable.lm, "generate", watched)
    rollout = RolloutEngine(policy, SamplingParams(flow_steps=1), 0, nullcontext)
    prompts = prompt_set("train", 2)
    bench_rollout(rollout, prompts, group_size=3, repeats=2)
    longest = policy.encode_prompts([prompt.text for prompt in prompts])[0].shape[1]
    assert lengths == [(6, longest + policy.num_actions)] * 3  # once to warm up


def test_tasks_take_turns_after_a_warm_up() -> None:
    order: list[str] = []
    synchronised: list[int] = []
    tasks = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = interleaved(tasks, 2, lambda: synchronised.append(1))
    assert order == ["a", "b"] * 3 and len(synchronised) == 12
    assert set(seconds) == {"a", "b"} and min(seconds.values()) >= 0


def test_operators_are_named() -> None:
    import torch

    a = torch.randn(256, 256)
    shares = operator_shares(lambda: [a @ a for _ in range(20)], count=2)
    assert max(shares, key=lambda name: shares[name]) == "share/op/mm" and len(shares) == 3


def test_the_step_benchmark_reads_a_run(tmp_path: Path) -> None:
    def step(number: int, seconds: float) -> dict[str, float]:
        return {
            "step": number,
            "images_per_s": 96 / seconds,
            "time/step_s": seconds,
            "time/rollout_s": seconds / 2,
            "time/update_s": seconds / 4,
            "time/reward_wait_s": seconds / 8,
            "share/rollout": 0.5,
            "share/update": 0.25,
            "share/reward_wait": 0.125,
            "share/other": 0.125,
        }

    rows = [{"step": 0, "eval/ocr/reward": 0.5}, step(1, 100.0), step(2, 4.0), step(3, 2.0), step(4, 3.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = bench_step(tmp_path, 6144)
    assert report["time/step_s"] == 3.0 and report["images_per_s"] == 32
    assert report["train_tokens_per_s"] == 6144 / 0.75 and report["step_tokens_per_s"] == 2048
    assert report["share/reward_wait"] == 0.125 and report["share/reference"] == 0.0
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    with pytest.raises(ImageRLError, match="fewer than 2"):
        bench_step(tmp_path, 6144)


def test_a_report_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show({"images_per_s": 2.5}, tmp_path / "bench.json")
    assert capsys.readouterr().out == "images_per_s        2.5\n"
    assert json.loads((tmp_path / "bench.json").read_text()) == {"images_per_s": 2.5}


def test_the_table_is_aligned() -> None:
    lines = table({"ratio/x": 3.456, "share/long_name": 0.0421, "images_per_s": 12345.0}).splitlines()
    assert lines == [
        "ratio/x              3.46x",
        "share/long_name      4.2 %",
        "images_per_s     1.234e+04",
    ]


@pytest.mark.parametrize(("workers", "exposed"), [(1, 0.1), (2, 0.2), (0, 1.0)])
def test_rewards_by_themselves_and_what_a_step_waits(
    monkeypatch: pytest.MonkeyPatch, workers: int, exposed: float
) -> None:
    """96 pictures take 2 s and 0.5 s; of these 2.5 s, or 1.25 s by two workers, a step waits 0.25 s."""
    monkeypatch.setattr("benchmarks.rewards.interleaved", lambda *_: {"ocr": 2.0, "colours": 0.5})
    step = {"time/reward_wait_s": 0.25, "time/step_s": 5.0, "share/reward_wait": 0.05}
    report = bench_rewards({}, 96, 3, workers, step)
    assert (report["images_per_s/ocr"], report["images_per_s/colours"]) == (48, 192)
    assert report["images_per_s/all"] == pytest.approx(38.4)
    assert report["share/scoring/ocr"] == pytest.approx(0.8)
    assert report["share/exposed"] == pytest.approx(exposed)
    assert report["share/reward_wait"] == (0.05 if workers else 0.5)


def test_the_rewards_of_a_recipe_are_measured(tmp_path: Path) -> None:
    micro_folder(tmp_path / "model")
    recipe = write_recipe(tmp_path, "data.heldout.size=4")
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "rewards",
                str(recipe),
                "--steps",
                "2",
                "--repeats",
                "1",
                "--json",
                f"{tmp_path}/b.json",
            ],
            bench,
        )
    assert ended.value.code == 0
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["images_per_s/low_tokens"] == report["images_per_s/all"] > 0
    assert report["share/exposed"] == 1.0 and 0 < report["share/reward_wait"] < 1
    assert not (tmp_path / "run").exists()
