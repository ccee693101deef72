"""Scoring in Ray actors: same numbers as in process, and what happens when a reward dies, hangs or raises."""

import os
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray

from imagerl.rewards.boundary.wire import Reply
from imagerl.rewards.workers.actors import Call, Plan, RewardThread
from imagerl.rewards.workers.pool import RewardWorkers, _shards
from imagerl.rl.types import ImageRLError, RewardRequest, RewardScorer

# Each prompt says what its group's samples shall do; `flag` is a file that makes "die once" remember.
SOURCE = """
import os, signal, time
from imagerl.rl.types import RewardOutput

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
    assert scores.reasons["behave"] == "no answer within 4 s, rewards.timeout_s"
    assert np.isfinite(ask(workers, "a", "b").totals).all()


@pytest.mark.slow
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


def ray_errors() -> list[type[Exception]]:
    """Every way in which Ray says that a call is lost."""
    kinds = [ray.exceptions.RayError]
    for kind in kinds:
        kinds += [
            sub for sub in kind.__subclasses__() if sub.__module__ == "ray.exceptions" and sub not in kinds
        ]
    told_otherwise = (ray.exceptions.GetTimeoutError, ray.exceptions.RuntimeEnvSetupError)
    return [kind for kind in kinds if kind not in told_otherwise]


class ActorOf:
    """An actor whose calls end one after the other as given: an exception, or an answer."""

    def __init__(self, *outcomes: object) -> None:
        self.outcomes = iter(outcomes)
        self.load = SimpleNamespace(remote=lambda place: None)
        self.score = SimpleNamespace(remote=lambda reward, request: next(self.outcomes))


def worker_of(monkeypatch: pytest.MonkeyPatch, max_restarts: int, *outcomes: object) -> RewardThread:
    """A worker whose actors, each new one too, answer with the next outcome."""

    def get(answer: object) -> object:
        if isinstance(answer, Exception):
            raise answer
        return answer

    actor = ActorOf(*outcomes)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", lambda answers, **_: (answers, []))
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    return RewardThread(queue.SimpleQueue(), lambda: actor, {0: "a", 1: "b"}, 4.0, max_restarts)


VALUES = Reply([1.0, 1.0], {}, None)


@pytest.mark.parametrize("kind", ray_errors())
def test_every_failure_of_ray_is_retried_counted_and_ends_the_run_by_our_rule(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = kind.__new__(kind)
    call = Call(0, "a", None, 2)
    assert worker_of(monkeypatch, 3, lost, VALUES).answer(call) is VALUES
    dying = worker_of(monkeypatch, 3, lost, lost, lost, lost, VALUES)
    for _ in range(2):
        values = dying.answer(call)
        assert np.isnan(values.rewards).all() and (values.reason or "").isprintable()
        assert (values.reason or "").startswith("the reward process died 2 times on this call (")
    with pytest.raises(
        ImageRLError, match=r"process of reward 'a' died or hung 4 times in a row.*max_restarts"
    ):
        dying.answer(call)


def test_the_reward_under_which_the_process_died_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = ray.exceptions.ActorDiedError()
    worker = worker_of(monkeypatch, 1, lost, lost)
    assert "died 2 times" in str(worker.answer(Call(0, "a", None, 2)).reason)
    with pytest.raises(ImageRLError, match="process of reward 'a' died or hung 2 times in a row"):
        worker.answer(Call(1, "b", None, 2))


def test_a_process_that_runs_out_of_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = ray.exceptions.OutOfMemoryError(
        "Task was killed due to the node running low on memory.\nMemory ..."
    )
    values = worker_of(monkeypatch, 3, lost, lost).answer(Call(0, "a", None, 2))
    assert values.reason == (
        "the reward process died 2 times on this call (killed for want of memory: use fewer rewards.workers)"
    )


def test_a_process_that_dies_while_it_starts_names_its_reward(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SOURCE + MORTAL)
    entries = [{"import_path": f"{tmp_path}/mine.py:{name}"} for name in ("brightness", "Mortal")]
    scorer = RewardWorkers(entries, workers=1)
    try:
        with pytest.raises(
            ImageRLError, match=r"process of reward 'Mortal' did not start \(ActorDiedError\)"
        ):
            scorer.wait_until_ready()
    finally:
        scorer.close()


MORTAL = """
class Mortal:
    def __init__(self):
        os._exit(1)
    def __call__(self, images):
        return [0.0] * len(images)
"""

# Kills the raylet that it started, as the kernel does for want of memory, and goes on.
HEADLESS = """
import os, signal, sys, time
import numpy as np
from ray._private import worker
from imagerl.rewards.workers.pool import RewardWorkers
from imagerl.rl.types import ImageRLError, RewardRequest

request = RewardRequest(["a"] * 2, [[0]] * 2, np.zeros((2, 4, 4, 3), np.uint8), {}, 2)
scorer = RewardWorkers([{"import_path": sys.argv[1]}], workers=1)
assert np.isfinite(scorer.collect(scorer.submit(request)).totals).all()
(raylet,) = worker._global_node.all_processes["raylet"]
raylet.process.kill()
while raylet.process.poll() is None:
    time.sleep(0.01)
try:
    scorer.collect(scorer.submit(request))
except ImageRLError as error:
    print(error)
scorer.close()
"""


@pytest.mark.slow
def test_a_killed_raylet_is_told_in_one_line(folder: Path) -> None:
    """Ray's library ends the process without a word when it is used after that."""
    command = [sys.executable, "-c", HEADLESS, f"{folder}/mine.py:brightness"]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[3]
    )
    assert ended.returncode == 0, ended.stderr
    assert "Ray ended: its raylet was killed or crashed, perhaps for want of memory; continue" in ended.stdout


@pytest.mark.slow
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


def test_a_dead_judge_is_told_in_the_process_that_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What an actor says of it while it tries is not seen."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(
        "imagerl.rewards.workers.pool.start_ray", lambda _: pytest.fail("Ray was started for nothing")
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    judge = {"name": "judge", "endpoint": endpoint, "model": "m"}
    with pytest.raises(ImageRLError, match=r"the judge at .* cannot be reached: Connection refused \(tried"):
        RewardWorkers([judge], workers=1, timeout_s=4)
    assert [text for text in caplog.messages if "Connection refused; trying again for up to" in text]
