"""Whatever users' code does or returns: the same table of bad rewards in this process, in a Ray actor, in another
interpreter and behind HTTP."""

import contextlib
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from imagerl.rewards.base import load_reward
from imagerl.rewards.boundary.guard import users_code
from imagerl.rewards.workers.pool import RewardWorkers
from imagerl.rewards.workers.server import reward_app
from imagerl.rl.types import ImageRLError, RewardRequest, RewardScores
from tests.rewards.boundary.bad_rewards import CASES, GOOD
from tests.served import served

FILE = Path(__file__).with_name("bad_rewards.py")
WAYS = ("here", "ray", "interpreter", "http")


def ask(scorer: RewardWorkers, prompt: str) -> RewardScores:
    request = RewardRequest([prompt] * 4, [[0]] * 4, np.zeros((4, 2, 2, 3), np.uint8), {}, 2)
    return scorer.collect(scorer.submit(request))


@pytest.fixture(scope="module")
def scorers() -> Iterator[Callable[[str], RewardWorkers]]:
    """One scorer for each way, kept for the whole table."""
    made: dict[str, RewardWorkers] = {}
    with contextlib.ExitStack() as stack:

        def scorer(way: str) -> RewardWorkers:
            if way not in made:
                entry: dict[str, object] = {"import_path": f"{FILE}:act"}
                if way == "interpreter":
                    entry["python"] = sys.executable
                if way == "http":
                    os.environ["TOKEN_OF_THE_TABLE"] = "of-the-tests"
                    app = reward_app("act", load_reward(f"{FILE}:act")[1], ["prompts", "images"])
                    address = stack.enter_context(served(app))
                    entry = {"url": f"{address}/act", "token_env": "TOKEN_OF_THE_TABLE"}
                made[way] = RewardWorkers([entry], workers=1 if way == "ray" else 0)
                stack.callback(made[way].close)
                made[way].wait_until_ready()
            return made[way]

        yield scorer
    os.environ.pop("TOKEN_OF_THE_TABLE", None)


def surroundings() -> dict[str, object]:
    """What of this process a run depends on."""
    return {
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "random": random.getstate(),
        "numpy": [np.random.get_state()[1].tolist(), np.geterr()],
        "torch": [
            torch.get_rng_state().tolist(),
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.is_grad_enabled(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
        ],
        "warnings": list(warnings.filters),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)],
        "timer": signal.getitimer(signal.ITIMER_REAL),
        "python": [sys.getrecursionlimit(), sys.stdout, sys.stderr],
    }


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_a_bad_reward_costs_its_samples_and_says_why(
    scorers: Callable[[str], RewardWorkers], way: str, name: str
) -> None:
    _, lost, reason, parts = CASES[name]
    scorer = scorers(way)
    before = surroundings()
    scores = ask(scorer, name)
    assert surroundings() == before
    np.testing.assert_array_equal(scores.totals, [GOOD] * (4 - lost) + [np.nan] * lost)
    assert scores.failures == {"act": lost}
    assert set(scores.components) == {"act", *(f"act/{part}" for part in parts)}
    said = scores.reasons.get("act", "")
    assert said.startswith(reason) and bool(said) == bool(lost)
    assert said.isprintable() and len(said) <= 400 and "Traceback" not in said
    if way != "here":
        assert said == ask(scorers("here"), name).reasons.get("act", "")


@pytest.mark.parametrize("way", WAYS)
def test_what_the_user_must_mend_ends_the_run_in_one_line(
    scorers: Callable[[str], RewardWorkers], way: str
) -> None:
    with pytest.raises(ImageRLError, match="mend me �xxx") as error:
        ask(scorers(way), "mend")
    assert str(error.value).isprintable() and len(str(error.value)) < 1200


def test_users_code_finds_what_it_set_and_nobody_else_does() -> None:
    with users_code():
        torch.set_default_dtype(torch.float64)
        random.seed(5)
    assert torch.get_default_dtype() is torch.float32
    expected = random.Random(5).random()
    with users_code():
        assert torch.get_default_dtype() is torch.float64 and random.random() == expected
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # not set by users' code, so it follows ours
    with users_code():
        assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)


def test_a_real_interruption_is_not_the_rewards_fault() -> None:
    """Ctrl-C while a reward scores in this process."""

    def interrupted() -> None:
        with users_code():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    started_with = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background shell
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, started_with)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import sys; sys.exit(3)", "importing .* failed: SystemExit: 3 (mine.py:1)"),
        ("raise KeyboardInterrupt", "importing .* failed: KeyboardInterrupt (mine.py:1)"),
        (
            "import sys\nclass f:\n  def __init__(self): sys.exit()\n  def __call__(self, images): pass",
            "could not be constructed: SystemExit",
        ),
        (
            "class E(Exception):\n  def __str__(self): return 1 / 0\nraise E",
            "failed: E: <E without a text> (mine.py:3)",
        ),
        (
            "class F:\n  __signature__ = 3\n  def __call__(self, images): pass\nf = F()",
            "has no readable signature; wrap it in a def",
        ),
    ],
)
def test_what_goes_wrong_before_scoring_is_one_line(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(ImageRLError) as error:
        load_reward(f"{tmp_path}/mine.py:f")
    start, _, end = message.partition(" .* ")
    assert start in str(error.value) and end in str(error.value)
