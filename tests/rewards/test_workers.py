"""Scoring in Ray actors: same numbers as in process, and what happens when a reward dies, hangs or raises."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rewards.actors import Plan
from rewards.workers import RewardWorkers, _shards
from rl.types import ImageRLError, RewardRequest, RewardScorer

# Each prompt says what its group's samples shall do; `flag` is a file that makes "die once" remember.
SOURCE = """
import os, signal, time
from rl.types import RewardOutput

def behave(prompts, images, flag):
    values = []
    for prompt, image in zip(prompts, images):
        if prompt == "hang":
            time.sleep(600)
        if prompt == "die" or (prompt == "die once" and not os.path.exists(flag)):
            open(flag, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt == "raise":
            raise ValueError("asked to")
        odd = {"nan": float("nan"), "none": None}
        values.append(odd.get(prompt, image.getpixel((0, 0))[0] / 255))
    return RewardOutput(values, {"pid": [os.getpid()] * len(values)})

def brightness(images):
    return [sum(image.getpixel((1, 1))) for image in images]

def where(images):
    place = len(os.environ.get("WHERE", ""))
    return {"rewards": [place] * len(images), "breakdown": {"pid": [os.getpid()] * len(images)}}
"""


def request(*prompts: str, group: int = 2) -> RewardRequest:
    size = len(prompts) * group
    images = np.random.default_rng(size).integers(0, 256, (size, 4, 6, 3), dtype=np.uint8)
    texts = [prompt for prompt in prompts for _ in range(group)]
    return RewardRequest(texts, [[i] for i in range(size)], images, {}, group)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "mine.py").write_text(SOURCE)
    return folder


def specs(folder: Path) -> list[dict[str, object]]:
    behave = {"import_path": f"{folder}/mine.py:behave", "weight": 2.0, "flag": f"{folder}/flag"}
    return [behave, {"import_path": f"{folder}/mine.py:brightness", "weight": 0.25}]


@pytest.fixture(scope="module")
def workers(folder: Path) -> Iterator[RewardWorkers]:
    workers = RewardWorkers(specs(folder), workers=2, timeout_s=4.0)
    workers.wait_until_ready()
    yield workers
    workers.close()


def ask(scorer: RewardScorer, *prompts: str):
    return scorer.collect(scorer.submit(request(*prompts)))


def test_actors_say_what_this_process_says(workers: RewardWorkers, folder: Path) -> None:
    prompts = ("a", "nan", "b", "none", "c")
    local = ask(RewardWorkers(specs(folder), workers=0), *prompts)
    scores = ask(workers, *prompts)
    np.testing.assert_array_equal(scores.totals, local.totals)
    np.testing.assert_array_equal(scores.components["behave"], local.components["behave"])
    np.testing.assert_array_equal(scores.components["brightness"], local.components["brightness"])
    assert scores.failures == local.failures == {"behave": 2, "brightness": 0}
    first = request(*prompts).images[0].astype(float)
    expected = 2 * first[0, 0, 0] / 255 + 0.25 * first[1, 1].sum()
    assert scores.totals[0] == pytest.approx(expected, abs=1e-9)
    assert os.getpid() not in scores.components["behave/pid"]


def test_tickets_come_back_in_any_order(workers: RewardWorkers) -> None:
    first, second = workers.submit(request("a")), workers.submit(request("a", "b", "c"))
    assert workers.collect(second).totals.shape == (6,)
    assert workers.collect(first).totals.shape == (2,)


def test_raised_error_costs_its_samples_only(workers: RewardWorkers) -> None:
    scores = ask(workers, "raise", "a")
    assert np.isnan(scores.totals).tolist() == [True, True, False, False]
    assert scores.failures == {"behave": 2, "brightness": 0}
    assert scores.reasons["behave"].startswith("ValueError: asked to (mine.py:")


def test_actor_that_was_killed_is_replaced(workers: RewardWorkers) -> None:
    before = ask(workers, "a", "b", "c", "d")
    for pid in {int(pid) for pid in before.components["behave/pid"]}:
        os.kill(pid, signal.SIGKILL)
    after = ask(workers, "a", "b", "c", "d")
    np.testing.assert_array_equal(after.totals, before.totals)
    assert not set(after.components["behave/pid"]) & set(before.components["behave/pid"])


def test_call_whose_actor_dies_is_tried_again(workers: RewardWorkers, folder: Path) -> None:
    (folder / "flag").unlink(missing_ok=True)
    scores = ask(workers, "die once", "a")
    assert (folder / "flag").exists()
    assert np.isfinite(scores.totals).all()


def test_hanging_call_is_given_up(workers: RewardWorkers) -> None:
    started = time.monotonic()
    ticket = workers.submit(request("hang", "a"))
    assert time.monotonic() - started < 2.0  # submitting does not wait
    scores = workers.collect(ticket)
    assert np.isnan(scores.components["behave"]).tolist() == [True, True, False, False]
    assert np.isfinite(scores.components["brightness"]).all()
    assert scores.failures == {"behave": 2, "brightness": 0}
    assert scores.reasons["behave"] == "no answer within 4 s (rewards.timeout_s)"
    assert np.isfinite(ask(workers, "a", "b").totals).all()


def test_reward_that_always_dies_stops_the_run(workers: RewardWorkers, folder: Path) -> None:
    with_one = RewardWorkers(specs(folder)[:1], workers=1, max_restarts=1)
    try:
        scores = ask(with_one, "die")
        assert scores.failures == {"behave": 2}
        assert scores.reasons["behave"] == "the reward process died 2 times on this call (ActorDiedError)"
        with pytest.raises(ImageRLError, match=r"'behave' died or hung 2 times in a row.*max_restarts"):
            ask(with_one, "die")
    finally:
        with_one.close()


def test_a_runtime_env_makes_an_actor_of_its_own(workers: RewardWorkers, folder: Path) -> None:
    where = {"import_path": f"{folder}/mine.py:where", "runtime_env": {"env_vars": {"WHERE": "elsewhere"}}}
    scorer = RewardWorkers([specs(folder)[0], where], gold=[specs(folder)[1]], workers=1)
    try:
        scorer.wait_until_ready()
        scores = scorer.collect(scorer.submit(request("a", "b"), with_gold=True))
    finally:
        scorer.close()
    assert scores.components["where"].tolist() == [len("elsewhere")] * 4
    assert set(scores.components["where/pid"]).isdisjoint(scores.components["behave/pid"])
    assert np.isfinite(scores.components["brightness"]).all()
    with pytest.raises(ImageRLError, match="Ray does not accept a reward's runtime_env"):
        RewardWorkers([{**where, "runtime_env": {"pip": 5}}], workers=1)
    with pytest.raises(ImageRLError, match=r"runtime_env needs rewards\.workers of 1 or more"):
        RewardWorkers([where], workers=0)


def test_secrets_go_to_the_actors_but_not_into_their_description() -> None:
    plan = Plan({}, None, 1.0, "/", {"IMAGERL_REWARD_TOKEN": "of-the-tests"})
    assert "of-the-tests" not in repr(plan)


def test_gold_metrics_are_measured_on_request_and_never_rewarded(folder: Path) -> None:
    behave, brightness = specs(folder)
    scorer = RewardWorkers([behave], gold=[brightness], workers=0)
    without = scorer.collect(scorer.submit(request("a", "b")))
    measured = scorer.collect(scorer.submit(request("a", "b"), with_gold=True))
    np.testing.assert_array_equal(measured.totals, without.totals)
    np.testing.assert_array_equal(measured.totals, 2.0 * measured.components["behave"])
    assert set(measured.components) - set(without.components) == {"brightness"}


def test_mistakes_surface_before_anything_starts(folder: Path) -> None:
    with pytest.raises(ImageRLError, match="did you mean behave"):
        RewardWorkers([{"import_path": f"{folder}/mine.py:behav"}], workers=2)
    with pytest.raises(ImageRLError, match="asks for 'flag', which is no column"):
        RewardWorkers([{"import_path": f"{folder}/mine.py:behave"}], workers=2, columns=["target"])
    with pytest.raises(ImageRLError, match="rewards is empty"):
        RewardWorkers([], workers=2)


def test_shards_are_whole_groups_in_order() -> None:
    whole = request("a", "b", "c", "d", "e", group=3)
    shards = _shards(whole, 2)
    assert [len(shard.prompts) for shard in shards] == [6, 9]
    assert [text for shard in shards for text in shard.prompts] == whole.prompts
    np.testing.assert_array_equal(np.concatenate([shard.images for shard in shards]), whole.images)
    assert len(_shards(whole, 50)) == 5
