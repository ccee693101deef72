"""A reward in another interpreter: one without any of our packages, and what happens when it dies or hangs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import urllib3
from PIL import Image

from imagerl.rewards.base import RewardSpec, check_reward, load_spec
from imagerl.rewards.boundary.interpreter import CHILD, InterpreterReward
from imagerl.rewards.boundary.wire import pack_request
from imagerl.rewards.pictures import to_png
from imagerl.rewards.workers.pool import RewardWorkers
from imagerl.rl.types import ImageRLError, RewardRequest

PICTURE = Image.new("RGB", (2, 2), (255, 0, 0))

BARE = """
import os, sys

def width(images, target, scale=1):
    print("a print must not get between the frames")
    assert not any(name.split(".")[0] in ("numpy", "torch", "rl", "rewards") for name in sys.modules)
    return [None if t is None else scale * int.from_bytes(image[16:20], "big") for image, t in zip(images, target)]

class Where:
    def __init__(self, times=1):
        self.times = times
    def __call__(self, images, **columns):
        return {"rewards": [self.times] * len(images), "breakdown": {"pid": [os.getpid()] * len(images)}}
"""

SOURCE = """
import os, signal, time

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
    return {"rewards": values, "breakdown": {"green": [image.getpixel((1, 0))[1] for image in images]}}

class ImageRLError(Exception):
    pass

def broken(images):
    raise ImageRLError("mend me")
"""


def request(*prompts: str, group: int = 2, **columns: list[object]) -> RewardRequest:
    size = len(prompts) * group
    images = np.random.default_rng(size).integers(0, 256, (size, 4, 6, 3), dtype=np.uint8)
    texts = [prompt for prompt in prompts for _ in range(group)]
    return RewardRequest(texts, [[i] for i in range(size)], images, columns, group)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two reward files, and an interpreter without packages."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "bare.py").write_text(BARE)
    (folder / "mine.py").write_text(SOURCE)
    (folder / "dies.py").write_text("import os\nos._exit(3)\n")
    (folder / "torn.py").write_text("import paddle_is_not_here\ndef f(images): ...\n")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    return folder


def bare(folder: Path, name: str, **settings: object) -> RewardSpec:
    return RewardSpec(f"{folder}/bare.py:{name}", settings=settings, python=f"{folder}/env/bin/python")


def ask(scorer: RewardWorkers, *prompts: str, **columns: list[object]):
    return scorer.collect(scorer.submit(request(*prompts, **columns)))


def test_an_interpreter_without_packages_scores(folder: Path) -> None:
    entry = {"import_path": f"{folder}/bare.py:width", "python": f"{folder}/env/bin/python", "scale": 3}
    scorer = RewardWorkers([entry], workers=0, columns=["target"])
    scores = ask(scorer, "a", "b", target=["x", "y", None, None])
    np.testing.assert_array_equal(scores.components["width"], [18, 18, np.nan, np.nan])
    assert scores.reasons["width"] == "returned None"


def test_a_class_and_a_column_that_cannot_be_sent(folder: Path) -> None:
    label, reward = load_spec(bare(folder, "Where", times=4))
    output = reward(prompts=["a"], completions=[[1]], images=[PICTURE])
    assert label == "Where" and list(output.rewards) == [4.0]
    with pytest.raises(ImageRLError, match="column 'odd' cannot be sent"):
        reward(prompts=["a"], completions=[[1]], images=[PICTURE], odd=[object()])


def test_it_says_what_this_process_says(folder: Path) -> None:
    """Same numbers, failures and reasons, with an interpreter that has Pillow."""
    entry = {"import_path": f"{folder}/mine.py:behave", "flag": f"{folder}/flag"}
    prompts = ("a", "nan", "b", "none", "raise", "c")
    here = ask(RewardWorkers([entry], workers=0), *prompts)
    there = ask(RewardWorkers([{**entry, "python": sys.executable}], workers=0), *prompts)
    np.testing.assert_array_equal(there.totals, here.totals)
    for name in ("behave", "behave/green"):
        np.testing.assert_array_equal(there.components[name], here.components[name])
    assert there.failures == here.failures == {"behave": 6}  # a "none" has no other reward either
    assert "asked to (mine.py:" in here.reasons["behave"] and "asked to (mine.py:" in there.reasons["behave"]


def test_a_process_that_was_killed_is_replaced(folder: Path) -> None:
    scorer = RewardWorkers([{"import_path": f"{folder}/bare.py:Where", "python": f"{folder}/env/bin/python"}],
                           workers=0)  # fmt: skip
    before = int(ask(scorer, "a").components["Where/pid"][0])
    assert before != os.getpid()
    os.kill(before, signal.SIGKILL)
    after = ask(scorer, "a")
    assert np.isfinite(after.totals).all() and after.components["Where/pid"][0] != before


def test_death_and_time_out_cost_their_call_only(folder: Path) -> None:
    settings = {"flag": f"{folder}/once"}
    reward = InterpreterReward(sys.executable, f"{folder}/mine.py:behave", settings, patience_s=2.0)

    def score(prompt: str):
        return reward(prompts=[prompt], completions=[[0]], images=[PICTURE])

    assert score("die once").rewards == [1.0]
    dead = score("die")
    assert np.isnan(dead.rewards[0]) and dead.reason == "its process died 2 times on this call: exit code -9"
    started = time.monotonic()
    late = score("hang")
    assert np.isnan(late.rewards[0]) and late.reason == "no answer within 2 s"
    assert time.monotonic() - started < 10
    assert score("a").rewards == [1.0]


def test_the_process_ends_with_its_reward(folder: Path) -> None:
    reward = load_spec(bare(folder, "Where"))[1]
    output = reward(prompts=["a"], completions=[[1]], images=[PICTURE])
    pid = int(output.breakdown["pid"][0])
    os.kill(pid, 0)
    del reward
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_it_listens_to_its_owner_alone_and_does_not_outlive_it(folder: Path) -> None:
    """Even with the reward at work: a killed scoring process cannot say goodbye."""
    wanted = {
        "target": f"{folder}/mine.py:behave",
        "settings": {"flag": ""},
        "columns": None,
        "token": "word",
    }
    child = subprocess.Popen([sys.executable, str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(json.dumps(wanted).encode() + b"\n")
        child.stdin.flush()
        told = json.loads(child.stdout.readline())
        assert told["parameters"] == ["prompts", "images", "flag"]
        address = f"http://127.0.0.1:{told['port']}/"
        for given in ({}, {"Authorization": "Bearer other"}, {"Authorization": "word"}):
            refused = urllib3.request("POST", address, body=b"x", headers=given, retries=False)
            assert refused.status == 401 and "token" in refused.json()["error"]
        body, right = pack_request(["hang"], [[0]], [PICTURE], {}, to_png), {"Authorization": "Bearer word"}
        with pytest.raises(urllib3.exceptions.HTTPError):
            urllib3.request("POST", address, body=body, headers=right, retries=False, timeout=0.5)
        child.stdin.close()
        assert child.wait(timeout=20) == 0
    finally:
        child.kill()
        child.stdout.close()


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("bare.py:wide", "has no wide; did you mean width"),
        (
            "torn.py:f",
            "importing .*torn.py failed: ModuleNotFoundError: No module named 'paddle_is_not_here'",
        ),
        ("dies.py:f", "does not start: exit code 3"),
        ("nowhere.py:f", "does not exist; correct its import_path"),
    ],
)
def test_what_must_be_mended_is_one_line(folder: Path, target: str, text: str) -> None:
    with pytest.raises(ImageRLError, match=text):
        load_spec(RewardSpec(f"{folder}/{target}", python=f"{folder}/env/bin/python"))


def test_settings_columns_and_interpreter_are_checked(folder: Path) -> None:
    with pytest.raises(ImageRLError, match="has no setting 'scal'; did you mean scale"):
        load_spec(bare(folder, "width", scal=2))
    with pytest.raises(ImageRLError, match="asks for 'target', which is no column of the prompt set"):
        load_spec(bare(folder, "width"), columns=["ink"])
    with pytest.raises(ImageRLError, match="no-python is no program; give the path of a Python interpreter"):
        check_reward(RewardSpec(f"{folder}/bare.py:width", python=f"{folder}/no-python"))
    reward = load_spec(RewardSpec(f"{folder}/mine.py:broken", python=sys.executable))[1]
    with pytest.raises(ImageRLError, match="mend me"):
        reward(prompts=["a"], completions=[[1]], images=[PICTURE])
