"""A model of ours behind an OpenAI-compatible endpoint, and as the judge of its own pictures."""

import base64
import io
import struct
import threading
import time
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import urllib3
from PIL import Image

from imagerl.rewards.judge.reward import JudgeReward
from imagerl.rl.commands.chat_server import RequestError, chat_app, parse_chat
from imagerl.rl.commands.cli import main
from imagerl.rl.data.tiny.world import prompt_set, truth
from imagerl.rl.errors import ImageRLError
from tests.command import exit_code
from tests.served import served

HEADERS = {"Authorization": "Bearer of-the-tests"}


def data_url(picture: Image.Image, kind: str = "PNG") -> str:
    file = io.BytesIO()
    picture.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def blank_png(width: int, height: int) -> str:
    """A data URL of a PNG file that announces a size and has no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return f"data:image/png;base64,{base64.b64encode(file + struct.pack('>I', 0) + b'IDAT').decode()}"


RED = Image.new("RGB", (64, 32), "red")
PICTURE = {"type": "image_url", "image_url": {"url": data_url(RED)}}
QUESTION = {"type": "text", "text": "what is written?"}


def chat(*parts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    content = list(parts or (PICTURE, QUESTION))
    return {"model": "micro", "messages": [{"role": "user", "content": content}], **changes}


def test_a_question_is_one_picture_and_all_texts() -> None:
    body = chat(QUESTION, PICTURE, {"type": "text", "text": "in capitals"}, max_tokens=7)
    body["messages"].insert(0, {"role": "system", "content": "be brief"})
    question = parse_chat(body, "micro")
    assert question.text == "be brief\nwhat is written?\nin capitals" and question.max_new_tokens == 7
    assert Image.open(io.BytesIO(question.picture)).size == (64, 32)
    assert parse_chat(chat(max_completion_tokens=9, max_tokens=7), "micro").max_new_tokens == 9


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ([], "must be a JSON object"),
        ({"model": "micro"}, "with messages"),
        (chat(model="gpt"), "no model is named 'gpt' here; there is 'micro'"),
        (chat(stream=True), "stream and n are not supported"),
        (chat(response_format={"type": "json_schema"}), "ask without response_format"),
        (chat(temperature=0.7), "set temperature to 0"),
        (chat(max_tokens=0), "max_tokens must be"),
        (chat(max_tokens=True), "max_tokens must be"),
        (chat(QUESTION), "about one picture, not 0"),
        (chat(PICTURE, PICTURE, QUESTION), "about one picture, not 2"),
        (chat(PICTURE), "there is no question"),
        (chat({"type": "input_audio"}), "of the types text and image_url"),
        ({"model": "micro", "messages": [{"role": "assistant", "content": "x"}]}, "there is no conversation"),
        ({"model": "micro", "messages": [{"role": "user", "content": 5}]}, "a text or a list of parts"),
        (
            chat({"type": "image_url", "image_url": {"url": "http://169.254.169.254/x.png"}}, QUESTION),
            "addresses are not fetched",
        ),
        (
            chat({"type": "image_url", "image_url": {"url": "data:image/png;base64,!!!"}}, QUESTION),
            "cannot be decoded",
        ),
        (
            chat({"type": "image_url", "image_url": {"url": data_url(RED)[:50]}}, QUESTION),
            "cannot be decoded",
        ),
        (chat(PICTURE, {"type": "text", "text": "why? " * 801}), "has 4004 characters; at most 4000"),
        (
            chat({"type": "image_url", "image_url": {"url": blank_png(4097, 4096)}}, QUESTION),
            "has 4097×4096 pixels",
        ),
        (
            chat({"type": "image_url", "image_url": {"url": data_url(RED, "GIF")}}, QUESTION),
            "cannot be decoded",
        ),
    ],
)
def test_what_cannot_be_answered_is_said(body: Any, text: str) -> None:
    with pytest.raises(RequestError, match=text):
        parse_chat(body, "micro")


def test_questions_that_wait_are_answered_together() -> None:
    batches: list[tuple[int, int]] = []
    busy, go = threading.Event(), threading.Event()

    def answers(pictures: Sequence[Any], questions: Sequence[str], most: int) -> list[str]:
        batches.append((len(questions), most))
        busy.set()
        assert go.wait(20)
        return [question.upper() for question in questions]

    with served(chat_app(answers, "micro", batch=4)) as address, ThreadPoolExecutor(8) as threads:
        url = f"{address}/v1/chat/completions"

        def ask(text: str, most: int = 7) -> str:
            body = chat(PICTURE, {"type": "text", "text": text}, max_tokens=most)
            answer = urllib3.request("POST", url, json=body, headers=HEADERS, retries=False, timeout=30)
            assert answer.status == 200
            return str(answer.json()["choices"][0]["message"]["content"])

        first = threads.submit(ask, "first")
        assert busy.wait(20)
        rest = [threads.submit(ask, f"q{number}") for number in range(5)]
        other = threads.submit(ask, "longer", 9)
        time.sleep(1.0)  # in which they come in
        go.set()
        assert [first.result(), *(answer.result() for answer in rest), other.result()] == [
            "FIRST", "Q0", "Q1", "Q2", "Q3", "Q4", "LONGER"
        ]  # fmt: skip
    assert batches[0] == (1, 7) and sum(size for size, _ in batches) == 7
    assert max(size for size, _ in batches) > 1 and (1, 9) in batches


def test_errors_reach_the_client() -> None:
    def answers(*_: Any) -> list[str]:
        raise ImageRLError("this model has no image tokenizer")

    with served(chat_app(answers, "micro")) as address:
        url = f"{address}/v1/chat/completions"
        answer = urllib3.request("POST", url, json=chat(), headers=HEADERS, retries=False)
        assert answer.status == 400 and "no image tokenizer" in answer.json()["error"]["message"]
        answer = urllib3.request("POST", url, body=b"{", headers=HEADERS, retries=False)
        assert answer.status == 400 and "not JSON" in answer.json()["error"]["message"]
        assert urllib3.request("POST", url, json=chat(), retries=False).status == 401
        listed = urllib3.request("GET", f"{address}/v1/models", headers=HEADERS, retries=False).json()
        assert [entry["id"] for entry in listed["data"]] == ["micro"]


def test_pictures_are_unpacked_one_by_one_when_their_turn_comes() -> None:
    """A picture that is broken, or a question that the model refuses, costs the others nothing."""
    unpacked: list[tuple[int, int]] = []
    busy, go = threading.Event(), threading.Event()

    def answers(pictures: Iterable[Image.Image], questions: Sequence[str], _: int) -> list[str]:
        busy.set()
        assert go.wait(20)
        for picture in pictures:
            unpacked.append(picture.size)
        if "refused" in questions:
            raise ImageRLError("the question is longer than the model's positions")
        return [question.upper() for question in questions]

    broken = base64.b64encode(base64.b64decode(data_url(RED).partition(",")[2])[:60]).decode()
    with served(chat_app(answers, "micro", batch=8)) as address, ThreadPoolExecutor(4) as threads:
        url = f"{address}/v1/chat/completions"

        def ask(text: str, picture: str) -> tuple[int, str]:
            shown = {"type": "image_url", "image_url": {"url": picture}}
            body = chat(shown, {"type": "text", "text": text})
            answer = urllib3.request("POST", url, json=body, headers=HEADERS, retries=False, timeout=60)
            told = answer.json()
            said = told["error"]["message"] if "error" in told else told["choices"][0]["message"]["content"]
            return answer.status, said

        first = threads.submit(ask, "first", data_url(RED))
        assert busy.wait(20)
        given = [
            ("good", data_url(RED)),
            ("bad", f"data:image/png;base64,{broken}"),
            ("refused", data_url(RED)),
        ]
        rest = [threads.submit(ask, *entry) for entry in given]
        time.sleep(1.0)  # in which they come in
        assert unpacked == []
        go.set()
        assert first.result() == (200, "FIRST")
        good, bad, refused = (answer.result() for answer in rest)
    assert good == (200, "GOOD")
    assert bad[0] == 400 and "cannot be decoded" in bad[1]
    assert refused == (400, "the question is longer than the model's positions")


def test_a_model_that_cannot_answer_is_not_served(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("IMAGERL_SERVE_TOKEN", "of-the-tests")
    monkeypatch.setattr("imagerl.rl.commands.serving.run_app", lambda *_: pytest.fail("it was served"))
    with pytest.raises(SystemExit) as leaving:
        main(["serve", "--model", "tiny"])
    said = capsys.readouterr().err
    assert leaving.value.code == 1 and said.count("\n") == 1
    assert "tiny cannot answer questions about pictures (" in said and "such as tiny_edit" in said


def test_a_judge_that_is_called_by_a_wrong_name_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        served(chat_app(lambda *_: [], "micro"), token=None) as address,
        pytest.raises(SystemExit) as leaving,
    ):
        main(["reward", "check", "judge", f"endpoint={address}/v1", "model=mikro", "--prompts=2"])
    assert leaving.value.code == 1
    assert "HTTP 404: no model is named 'mikro' here; there is 'micro'" in capsys.readouterr().err


def test_the_shipped_model_reads_back_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a picture through HTTP to the model that `imagerl serve` loads, and back to the judge."""
    monkeypatch.setenv("IMAGERL_SERVE_TOKEN", "of-the-tests")
    ready: list[Any] = []
    monkeypatch.setattr("imagerl.rl.commands.serving.run_app", lambda *given: ready.append(given))
    assert exit_code(["serve"]) == 0
    app, host, port, token, *_ = ready[0]
    assert (host, port, token) == ("127.0.0.1", 0, "of-the-tests")
    prompts = prompt_set("heldout", 8)
    pictures = [truth(prompt) for prompt in prompts]
    targets = [prompt.columns["target"] for prompt in prompts]
    with served(app) as address:
        judge = JudgeReward(
            f"{address}/v1", "tiny_edit", rubric="read_back", key_env="IMAGERL_SERVE_TOKEN", max_tokens=16
        )
        right = judge(prompts=[""] * 8, images=pictures, target=targets)
        wrong = judge(prompts=[""] * 8, images=pictures, target=targets[1:] + targets[:1])
    assert np.mean(right.rewards) > 0.9 and np.mean(right.breakdown["exact"]) >= 0.75
    assert (
        np.mean(wrong.rewards) < 0.4 and wrong.breakdown["cached"] == [1.0] * 8
    )  # one question, another target
