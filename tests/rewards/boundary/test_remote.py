"""A reward behind HTTP: same numbers as here, and what a dead, slow, lying or strict server costs."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import urllib3
from aiohttp import web

from imagerl.rewards.base import RewardSpec, check_reward, load_reward, secrets_of
from imagerl.rewards.boundary.remote import RemoteReward, batches
from imagerl.rewards.workers.pool import RewardWorkers
from imagerl.rewards.workers.scoring import to_pil_images
from imagerl.rewards.workers.server import reward_app
from imagerl.rl.types import ImageRLError, RewardOutput, RewardRequest
from tests.served import served

TOKEN = "of-the-tests"

BEHAVE = """
import os, time

def behave(prompts, images, flag=""):
    if "slow" in prompts and not os.path.exists(flag):
        open(flag, "w").close()
        time.sleep(600)
    return {"rewards": [image.getpixel((0, 0))[0] / 255 for image in images]}
"""


def behave(prompts: list[str], images: list[Any], target: list[Any], **_: Any) -> RewardOutput:
    if "raise" in prompts:
        raise ValueError("asked to")
    if "mend" in prompts:
        raise ImageRLError("mend me")
    if "slow" in prompts:
        time.sleep(0.6)
    odd = {"nan": float("nan"), "none": None}
    values = [odd.get(p, image.getpixel((0, 0))[0] / 255) for p, image in zip(prompts, images, strict=True)]
    return RewardOutput(values, {"width": [float(target[i]) for i in range(len(images))]})


def request(*prompts: str, group: int = 2) -> RewardRequest:
    size = len(prompts) * group
    images = np.random.default_rng(size).integers(0, 256, (size, 4, 6, 3), dtype=np.uint8)
    texts = [prompt for prompt in prompts for _ in range(group)]
    return RewardRequest(texts, [[i] for i in range(size)], images, {"target": list(range(size))}, group)


def ask(scorer: RewardWorkers, *prompts: str):
    return scorer.collect(scorer.submit(request(*prompts)))


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGERL_REWARD_TOKEN", TOKEN)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server as users start it. It has a process of its own: while users' code runs, what a process has set is
    theirs, and a call that the client gave up runs on into the next test."""
    server, url = _start_server(f"{__file__}:behave", "--max-mib=1", "--max-pixels=100")
    yield url
    server.kill()
    server.wait()


def test_it_says_what_this_process_says(address: str, tmp_path: Path) -> None:
    prompts = ("a", "nan", "b", "none", "raise", "c")
    scores = ask(RewardWorkers([{"url": address, "batch": 3, "weight": 2.0}], workers=0), *prompts)
    first = request(*prompts).images[:, 0, 0, 0] / 255
    expected = np.where([p in ("nan", "none", "raise") for p in request(*prompts).prompts], np.nan, first)
    np.testing.assert_array_equal(scores.components["behave"], expected)
    np.testing.assert_array_equal(scores.totals, 2 * expected)
    assert scores.failures == {"behave": 6}
    assert "asked to (test_remote.py:" in scores.reasons["behave"]
    width = np.where([p == "raise" for p in request(*prompts).prompts], np.nan, np.arange(12.0))
    np.testing.assert_array_equal(scores.components["behave/width"], width)
    assert set(scores.components) == {"behave", "behave/width"}  # nothing was tried twice


def test_batches_are_cut_between_prompts_only() -> None:
    assert list(batches(list("aabbcc"), 4)) == [slice(0, 4), slice(4, 6)]
    assert list(batches(list("aabbcc"), 3)) == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert list(batches(list("aaaabb"), 2)) == [slice(0, 4), slice(4, 6)]
    assert list(batches(list("abc"), 64)) == [slice(0, 3)]
    assert list(batches([], 64)) == []


def test_a_reward_that_must_be_mended_stops_the_run(address: str) -> None:
    reward = load_reward(address)[1]
    with pytest.raises(ImageRLError, match=r"^reward http.*/behave: mend me$"):
        reward(prompts=["mend"], completions=[[0]], images=to_pil_images(request("a").images[:1]), target=[1])
    with pytest.raises(ImageRLError, match="asks for 'target', which is no column"):
        reward(prompts=["a"], completions=[[0]], images=to_pil_images(request("a").images[:1]))


def test_oversized_pictures_are_failures_with_a_reason(address: str) -> None:
    large = to_pil_images(np.zeros((1, 20, 10, 3), dtype=np.uint8))
    output = load_reward(address)[1](prompts=["a"], completions=[[0]], images=large, target=[1])
    assert np.isnan(output.rewards[0])
    assert "HTTP 413: picture 0 has 10×20 pixels; at most 100 are taken" in output.reason


@pytest.mark.parametrize("wrong", ["another-token", None])
def test_a_wrong_token_ends_the_command(
    address: str, wrong: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wrong is None:
        monkeypatch.delenv("IMAGERL_REWARD_TOKEN")
    else:
        monkeypatch.setenv("IMAGERL_REWARD_TOKEN", wrong)
    with pytest.raises(ImageRLError) as error:
        RewardWorkers([{"url": address}], workers=0)
    said = (
        "HTTP 401: the token is missing or wrong" if wrong else "set the environment variable IMAGERL_REWARD"
    )
    assert said in str(error.value) and "another" not in str(error.value)


def test_the_server_refuses_what_is_no_request(address: str) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    for body, status, text in [
        (b"\x80\x04\x95 a pickle", 400, "not a line of JSON"),
        (b"", 400, "not a line of JSON"),
        (b'{"version": 1}\n', 400, "'prompts' is missing"),
    ]:
        answer = urllib3.request("POST", address, body=body, headers=headers, retries=False)
        assert answer.status == status and text in answer.json()["error"]
    for given in ({}, {"Authorization": "Bearer "}, {"Authorization": TOKEN}):
        answer = urllib3.request("POST", address, body=b"x", headers=given, retries=False)
        assert answer.status == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
    elsewhere = urllib3.request("GET", address + "/x", headers=headers, retries=False)
    assert elsewhere.status == 404


def test_a_client_that_leaves_in_the_middle_is_no_error(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = address.removeprefix("http://").removesuffix("/behave").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"POST /behave HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
            "Content-Length: 5000000\r\n\r\nhalf".encode()
        )
        time.sleep(0.5)  # the server is reading
    time.sleep(0.5)
    assert np.isfinite(ask(RewardWorkers([{"url": address}], workers=0), "a").totals).all()
    assert [record for record in caplog.records if record.name.startswith("aiohttp")] == []


def test_a_busy_server_asks_to_come_again() -> None:
    with served(reward_app("behave", behave, []), waiting=1) as address:
        reward = RemoteReward(f"{address}/behave", patience_s=10)
        images = to_pil_images(request("a").images[:1])

        def score(prompt: str) -> RewardOutput:
            return reward(prompts=[prompt], completions=[[0]], images=images, target=[1])

        with ThreadPoolExecutor(2) as threads:
            outputs = list(threads.map(score, ["slow", "slow"]))
        assert all(np.isfinite(output.rewards[0]) for output in outputs)
        assert sum(output.breakdown.get("retries", [0])[0] for output in outputs) >= 1


def test_a_slow_server_is_given_up(address: str) -> None:
    reward = RemoteReward(address, timeout_s=0.1, patience_s=0.5)
    started = time.monotonic()
    output = reward(
        prompts=["slow"], completions=[[0]], images=to_pil_images(request("a").images[:1]), target=[1]
    )
    assert time.monotonic() - started < 5
    assert np.isnan(output.rewards[0]) and "(tried" in output.reason


@pytest.mark.parametrize("rubbish", [b"<html>hello</html>", b'{"rewards": [1, 2]}', b'{"rewards": ["1"]}'])
def test_a_server_that_lies_costs_its_samples(rubbish: bytes) -> None:
    async def describe(_: web.Request) -> web.Response:
        return web.json_response({"parameters": ["images"]})

    async def score(_: web.Request) -> web.Response:
        return web.Response(body=rubbish)

    app = web.Application()
    app.router.add_get("/liar", describe)
    app.router.add_post("/liar", score)
    with served(app) as address:
        output = load_reward(f"{address}/liar")[1](
            prompts=["a"], completions=[[0]], images=to_pil_images(request("a").images[:1])
        )
    assert np.isnan(output.rewards[0]) and "the answer is no reply" in output.reason


def test_what_is_no_reward_is_said_at_the_start(address: str) -> None:
    with served(web.Application()) as empty, pytest.raises(ImageRLError, match="HTTP 404"):
        load_reward(f"{empty}/behave")
    with pytest.raises(ImageRLError, match=r"cannot be reached: .*refused.*imagerl reward serve"):
        load_reward(f"http://127.0.0.1:{_free_port()}/behave", patience_s=0.5)
    for wrong in ("http://me:secret@host/ocr", "http://host/ocr?token=1", "http://host:1/", "http://host"):
        with pytest.raises(ImageRLError, match="must be http") as error:
            check_reward(RewardSpec(wrong))
        assert "secret" not in str(error.value)
    with pytest.raises(ImageRLError, match="no setting 'token'; did you mean token_env"):
        check_reward(RewardSpec(address, settings={"token": "x"}))
    assert secrets_of(RewardSpec(address)) == ["IMAGERL_REWARD_TOKEN"]
    assert secrets_of(RewardSpec(address, settings={"token_env": "MINE"})) == ["MINE"]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _start_server(*words: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "imagerl", "reward", "serve", *words],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "IMAGERL_REWARD_TOKEN": TOKEN},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    serving, _, url = process.stdout.readline().strip().partition(" ")
    assert serving == "serving"
    return process, url


def test_killing_the_server_costs_retries_not_the_run(tmp_path: Path) -> None:
    """It is killed under a call and started again at once: that call is answered. Then it is killed for good: the
    samples count as failures, the process that asks goes on."""
    file, flag, port = tmp_path / "mine.py", tmp_path / "flag", _free_port()
    file.write_text(BEHAVE)
    server, url = _start_server(f"{file}:behave", f"flag={flag}", f"--port={port}")
    try:
        scorer = RewardWorkers([{"url": url}], workers=0, timeout_s=200)
        impatient = RewardWorkers([{"url": url}], workers=0, timeout_s=2)
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(ask, scorer, "slow", "a")
            while not flag.exists():
                time.sleep(0.05)
            server.kill()
            server.wait()
            with served(reward_app("behave", behave, [], []), port=port):
                scores = answer.result(timeout=100)
    finally:
        server.kill()
        server.wait()
    np.testing.assert_array_equal(scores.totals, request("slow", "a").images[:, 0, 0, 0] / 255)
    assert (scores.components["behave/retries"] >= 1).all()
    lost = ask(impatient, "a", "b")
    assert np.isnan(lost.totals).all() and lost.failures == {"behave": 4}
    assert "refused" in lost.reasons["behave"] and "tried" in lost.reasons["behave"]


def test_description(address: str) -> None:
    answer = urllib3.request("GET", address, headers={"Authorization": f"Bearer {TOKEN}"}, retries=False)
    told = json.loads(answer.data)
    assert told["name"] == "behave" and told["parameters"] == ["prompts", "images", "target"]
    assert told["limits"]["pixels"] == 100
