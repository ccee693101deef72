"""One pool for all processes of a run, and GPUs that rewards reserve, by Ray's fake resources."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import ray

from imagerl.rewards.workers.pool import RewardWorkers
from imagerl.rewards.workers.shared import SharedRewards
from imagerl.rl.engine import cluster
from imagerl.rl.types import ImageRLError, RewardRequest
from tests.small_run import REWARD_FILE

T = TypeVar("T")
SEES = """
def gpus(images):
    import os
    seen = [int(number) for number in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if number]
    count = [float(len(seen))] * len(images)
    which = [float(seen[0]) if seen else None] * len(images)
    return {"rewards": count, "breakdown": {"which": which, "process": [os.getpid()] * len(images)}}

def others(images):
    return gpus(images)

class Broken:
    def __init__(self):
        raise ValueError("broken on purpose")
    def __call__(self, images):
        return [0.0] * len(images)
"""


class Alone:
    """A run of one process."""

    is_main = True

    def on_main(self, action: Callable[[], T]) -> T:
        return action()

    def gather_objects(self, value: int) -> list[int]:
        return [value]


def request(groups: int) -> RewardRequest:
    images = np.random.default_rng(groups).integers(0, 256, (2 * groups, 4, 6, 3), dtype=np.uint8)
    return RewardRequest(["a"] * 2 * groups, [[i] for i in range(2 * groups)], images, {}, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cluster that believes to have two GPUs."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "mine.py").write_text(REWARD_FILE + SEES)
    with pytest.MonkeyPatch.context() as patch:
        init = ray.init
        patch.setattr(ray, "init", lambda **options: init(**options, num_gpus=2))
        assert cluster.start_ray(2)
    yield folder
    cluster.stop_ray()


@pytest.mark.slow
def test_rewards_get_the_gpus_that_they_reserve(folder: Path) -> None:
    def spec(name: str, gpus: float) -> dict[str, Any]:
        return {"import_path": f"{folder}/mine.py:{name}", "num_gpus": gpus}

    with pytest.raises(ImageRLError, match=r"the rewards reserve 3 GPUs and Ray has 2 .*; lower num_gpus"):
        RewardWorkers([spec("gpus", 1), spec("others", 0.5)], workers=2)
    with pytest.raises(ImageRLError, match=r"num_gpus needs rewards\.workers of 1 or more"):
        RewardWorkers([spec("gpus", 1)], workers=0)
    scorer = RewardWorkers([spec("gpus", 1), spec("others", 1), spec("brightness", 0)], workers=1)
    try:
        scores = scorer.collect(scorer.submit(request(2)))
    finally:
        scorer.close()
    parts = scores.components
    assert parts["gpus"].tolist() == parts["others"].tolist() == [1] * 4
    assert {*parts["gpus/which"], *parts["others/which"]} == {0, 1}
    assert parts["gpus/process"][0] != parts["others/process"][0]
    assert np.isfinite(parts["brightness"]).all()


@pytest.mark.slow
def test_a_pool_scores_for_others_and_its_end_is_one_line(folder: Path) -> None:
    specs = [{"import_path": f"{folder}/mine.py:{name}"} for name in ("brightness", "low_tokens")]
    common = {"timeout_s": 60.0, "max_restarts": 3, "columns": ()}
    bad = [{"import_path": f"{folder}/mine.py:Broken"}]
    broken = SharedRewards(Alone(), bad, gold=[], workers=1, **common)  # type: ignore[arg-type]
    with pytest.raises(ImageRLError, match="broken on purpose"):
        broken.wait_until_ready()
    broken.close()
    pool = SharedRewards(Alone(), specs, gold=[], workers=2, **common)  # type: ignore[arg-type]
    local = RewardWorkers(specs, workers=0)
    try:
        pool.wait_until_ready()
        tickets = [pool.submit(request(groups)) for groups in (1, 3, 2)]
        for groups, ticket in ((2, tickets[2]), (1, tickets[0]), (3, tickets[1])):
            expected = local.collect(local.submit(request(groups)))
            np.testing.assert_array_equal(pool.collect(ticket).totals, expected.totals)
        os.kill(ray.get(pool._pool.__ray_call__.remote(lambda actor: os.getpid())), signal.SIGKILL)
        with pytest.raises(
            ImageRLError, match=r"to the reward workers ended \(\w+\), perhaps .*--resume"
        ) as end:
            pool.collect(pool.submit(request(1)))
        assert "\n" not in str(end.value)
    finally:
        pool.close()


def test_training_keeps_the_first_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def left(visible: str, processes: int) -> str | None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        return cluster.free_gpus().get("CUDA_VISIBLE_DEVICES")

    assert left("0,1,2,3,4,5,6,7", 6) == "6,7" and left("4,7", 1) == "7"
    assert left("0", 1) is None and left("", 1) is None  # shared, or there are none
