"""What is left of Ray when a run ends, or is killed: nothing. And what Ray prints meanwhile: nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import imagerl.rl.engine.reaper

ROOT = Path(__file__).parents[3]
# It writes there itself, as a driver of Ray does, starts the reaper and hands over what the test wants to know.
OWNER = """
import subprocess, sys
folder, reaper = sys.argv[1:]
own = open(folder + "/driver.log", "w")
sleeping = ["sleep", "600"]
writer = subprocess.Popen(sleeping, stderr=open(folder + "/agent.log", "w"), start_new_session=True)
reader = subprocess.Popen(sleeping, stdin=open(folder + "/agent.log"), start_new_session=True)
joined = subprocess.Popen(sleeping, stderr=open(folder + "/other.log", "w"), start_new_session=True)
watch = subprocess.Popen([sys.executable, "-I", "-S", reaper, folder], stdin=subprocess.PIPE)
watch.stdin.write(str(joined.pid).encode())
watch.stdin.flush()
print(writer.pid, reader.pid, joined.pid, flush=True)
if sys.stdin.readline() == "close\\n":
    watch.communicate()
    print("closed", writer.wait(), flush=True)
    sys.stdin.readline()
"""


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("killed", [False, True])
def test_writers_into_the_folder_end_with_their_owner(tmp_path: Path, killed: bool) -> None:
    folder = tmp_path / "ray"
    folder.mkdir()
    command = [sys.executable, "-c", OWNER, str(folder), imagerl.rl.engine.reaper.__file__]
    owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdin is not None and owner.stdout is not None
    writer, reader, joined = map(int, owner.stdout.readline().split())
    try:
        assert running(writer) and running(reader)
        if killed:
            owner.kill()
            wait_until(lambda: not folder.exists())
            wait_until(lambda: not running(writer))
        else:
            owner.stdin.write("close\n")
            owner.stdin.flush()
            assert owner.stdout.readline() == f"closed {-signal.SIGKILL}\n"
            assert owner.poll() is None and not folder.exists()  # it has only closed its Ray
        assert running(reader)  # somebody who looks into a log
        assert running(joined)  # another process of the run
    finally:
        for process in (reader, joined):
            os.kill(process, signal.SIGKILL)
        owner.kill()
        owner.communicate()


REWARDS = """
import os, signal

def well(images):
    return [0.5] * len(images)

def dies(images):
    os.kill(os.getpid(), signal.SIGKILL)
"""
DRIVER = """
import os, sys
import numpy as np
from imagerl.rewards.workers.pool import RewardWorkers
from imagerl.rl.types import RewardRequest
workers = RewardWorkers([{"import_path": f"{sys.argv[1]}:{sys.argv[2]}"}], workers=1)
workers.wait_until_ready()
import ray
print(os.path.dirname(ray._private.worker._global_node.get_temp_dir_path()), flush=True)
if sys.stdin.readline() == "score\\n":
    request = RewardRequest(["a"] * 2, [[1]] * 2, np.zeros((2, 8, 8, 3), np.uint8), {}, 2)
    print(workers.collect(workers.submit(request)).reasons, flush=True)
    workers.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_nothing_is_left_of_ray_and_it_prints_nothing(tmp_path: Path, killed: bool) -> None:
    (tmp_path / "own.py").write_text(REWARDS)
    reward = "well" if killed else "dies"
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path / "own.py"), reward],
        **{"cwd": ROOT, "text": True, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE},
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert driver.stdin is not None and driver.stdout is not None
    folder = Path(driver.stdout.readline().strip())
    assert folder.is_dir() and folder.stat().st_mode & 0o077 == 0
    started = list(imagerl.rl.engine.reaper.writers(str(folder)))
    assert len(started) > 3  # GCS, raylet, their helpers, the actor
    if killed:
        driver.kill()
    output = driver.communicate(None if killed else "score\n", timeout=600)[0]
    if not killed:
        assert driver.returncode == 0 and output.startswith(
            "{'dies': 'the reward process died 2 times on this call"
        )
        assert output.count("\n") == 1
    wait_until(lambda: not folder.exists() and not any(map(running, started)), 30)
