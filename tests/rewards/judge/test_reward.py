"""A judge behind an endpoint that answers, waits, fails, lies and talks rubbish."""

import asyncio
import base64
import io
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from PIL import Image

from imagerl.rewards.base import RewardSpec, check_reward, secrets_of
from imagerl.rewards.completions import AnswerCache, read_completion
from imagerl.rewards.judge.reward import JudgeReward
from imagerl.rewards.workers.pool import RewardWorkers
from imagerl.rl.types import ImageRLError, RewardOutput, RewardRequest
from tests.served import served

KEY = "of-the-tests"
GOOD = '{"reason": "fine", "objects": 10, "attributes": 10, "natural": 10, "artefacts": 5}'
PICTURES = [Image.new("RGB", (4, 3), (shade, 0, 0)) for shade in range(0, 250, 25)]


class Endpoint:
    """Answers as `replies` say, by the prompt that a question holds; notes what it was asked."""

    def __init__(self, replies: dict[str, Any]) -> None:
        self.replies = replies
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.now = self.most = 0

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt = body["messages"][-1]["content"][-1]["text"].removeprefix("Description: ")
        self.bodies.append(body)
        self.asked[prompt] += 1
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            reply = self.replies.get(prompt, GOOD)
            if isinstance(reply, list):
                reply = reply[min(self.asked[prompt], len(reply)) - 1]
            if callable(reply):
                return await reply()
            if isinstance(reply, web.Response):  # one cannot be sent twice
                return web.Response(status=reply.status, headers=reply.headers, body=reply.body)
            usage = {"prompt_tokens": 1000, "completion_tokens": 50}
            message = {"role": "assistant", "content": reply}
            return web.json_response({"choices": [{"message": message}], "usage": usage})
        finally:
            self.now -= 1

    @contextmanager
    def at(self, key: str | None = KEY) -> Iterator[str]:
        app = web.Application(client_max_size=2**24)
        app.router.add_post("/v1/chat/completions", self.complete)
        with served(app, key) as address:
            yield f"{address}/v1"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)


def judge(address: str, **settings: Any) -> JudgeReward:
    return JudgeReward(address, "eyes", key_env="JUDGE_KEY", **{"patience_s": 15.0, **settings})


def ask(reward: JudgeReward, *prompts: str, **columns: list[Any]) -> RewardOutput:
    return reward(prompts=list(prompts), images=PICTURES[: len(prompts)], **columns)


def later(seconds: float, status: int = 200) -> Any:
    async def answer() -> web.Response:
        await asyncio.sleep(seconds)
        return web.json_response({"choices": [{"message": {"content": GOOD}}]}, status=status)

    return answer


def test_marks_costs_and_what_is_asked() -> None:
    endpoint = Endpoint({})
    with endpoint.at() as address:
        output = ask(judge(address, price={"input": 2.0, "output": 8.0}), "a cat", "a dog")
    assert output.rewards == pytest.approx([0.5**0.5] * 2, abs=1e-12) and output.reason is None
    assert output.breakdown["artefacts"] == [0.5, 0.5]
    assert output.breakdown["tokens_in"] == [1000, 1000] and output.breakdown["tokens_out"] == [50, 50]
    assert output.breakdown["cost"] == pytest.approx([(1000 * 2 + 50 * 8) / 1e6] * 2, abs=1e-15)
    assert output.breakdown["cached"] == output.breakdown["retries"] == [0, 0]
    assert all(0 < seconds < 15 for seconds in output.breakdown["time_s"])
    body = next(b for b in endpoint.bodies if b["messages"][1]["content"][1]["text"] == "Description: a dog")
    assert body["model"] == "eyes" and body["temperature"] == 0
    assert body["response_format"]["json_schema"]["schema"]["required"][0] == "reason"
    url = body["messages"][1]["content"][0]["image_url"]["url"]
    shown = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(PICTURES[1]))


def test_a_judge_that_fails_lies_or_talks_costs_its_samples_only() -> None:
    endpoint = Endpoint(
        {
            "lies": GOOD.replace("5", "50"),
            "talks": "I like it.",
            "nothing": "",
            "null": None,
            "html": web.Response(text="<html>"),
            "no": web.json_response({"choices": [{"message": {"content": None, "refusal": "not this"}}]}),
            "cut": web.json_response({"choices": [{"message": {"content": "{"}, "finish_reason": "length"}]}),
            "bad": web.json_response({"error": {"message": "image too large"}}, status=400),
        }
    )
    prompts = [*endpoint.replies, "good"]
    said = {}
    with endpoint.at() as address:
        reward = judge(address)
        output = ask(reward, *prompts)
        for prompt in endpoint.replies:
            said[prompt] = ask(reward, prompt).reason
    assert [bool(np.isnan(value)) for value in output.rewards] == [True] * 8 + [False]
    assert "gave 50 for 'artefacts'" in said["lies"]
    assert "gave no marks but said: I like it." in said["talks"]
    assert (
        said["nothing"] == "the judge gave no marks but said: nothing"
        and "no chat completion" in said["html"]
    )
    assert said["no"] == "the judge refuses: not this" and "raise its max_tokens" in said["cut"]
    assert said["bad"] == "the judge refuses: HTTP 400: image too large"
    assert output.breakdown["tokens_in"][0] == 1000  # a lie is paid for, too
    assert endpoint.asked["lies"] == 2  # and not remembered


def test_it_counts_as_a_failure_even_when_a_whole_group_has_no_mark() -> None:
    with Endpoint({"talks": "hm"}).at() as address:
        entry = {"name": "judge", "endpoint": address, "model": "eyes", "key_env": "JUDGE_KEY"}
        scorer = RewardWorkers([entry], workers=0)
        images = np.stack([np.asarray(picture) for picture in PICTURES[:4]])
        request = RewardRequest(["talks"] * 2 + ["good"] * 2, [[0]] * 4, images, {}, 2)
        scores = scorer.collect(scorer.submit(request))
    assert np.isnan(scores.totals).tolist() == [True, True, False, False]
    assert scores.failures == {"judge": 2} and "gave no marks" in scores.reasons["judge"]


def test_retries_and_time_outs() -> None:
    endpoint = Endpoint(
        {
            "busy": [web.Response(status=429, headers={"Retry-After": "0.5"}), GOOD],
            "flaky": [web.Response(status=500), web.Response(status=503), GOOD],
            "slow": later(2),
        }
    )
    with endpoint.at() as address:
        output = ask(judge(address), "busy", "flaky")
        assert output.breakdown["retries"] == [1, 2]
        assert output.rewards == pytest.approx([0.5**0.5] * 2, abs=1e-12)
        started = time.monotonic()
        output = ask(judge(address, timeout_s=0.3, patience_s=1.0), "slow")
        assert time.monotonic() - started < 10
    assert np.isnan(output.rewards[0]) and "did not answer: no answer within 0.3 s" in output.reason


def test_questions_are_asked_side_by_side_up_to_a_limit() -> None:
    prompts = [str(number) for number in range(8)]
    endpoint = Endpoint(dict.fromkeys(prompts, later(0.4)))
    with endpoint.at() as address:
        output = ask(judge(address, concurrency=3), *prompts)
    assert np.isfinite(output.rewards).all() and 2 <= endpoint.most <= 3
    assert np.isnan(output.breakdown["tokens_in"]).all()  # this one does not count them


def test_the_same_question_is_asked_once(tmp_path: Path) -> None:
    endpoint = Endpoint({})
    with endpoint.at() as address:
        reward = judge(address, cache=str(tmp_path / "answers"), price={"input": 1, "output": 1})
        same = reward(prompts=["a", "a", "b"], images=[PICTURES[0]] * 3)
        assert endpoint.asked == {"a": 1, "b": 1}
        assert same.breakdown["cached"] == [0, 1, 0] and same.breakdown["cost"][1] == 0
        again = reward(prompts=["a"], images=[PICTURES[0].copy()])
        assert again.breakdown["cached"] == [1] and again.breakdown["tokens_in"] == [0]
        assert again.rewards == same.rewards[:1]
        assert judge(address, cache=str(tmp_path / "answers"))(prompts=["a"], images=PICTURES[:1]).breakdown[
            "cached"
        ] == [1]  # another process would find it, too
        assert endpoint.asked["a"] == 1
        reward(prompts=["a"], images=[PICTURES[1]])  # another picture
        judge(address, cache=str(tmp_path / "answers"), structured=False)(prompts=["a"], images=PICTURES[:1])
        assert endpoint.asked["a"] == 3
    assert "response_format" not in endpoint.bodies[-1]
    assert not list((tmp_path / "answers").glob("new-*"))


def test_the_cache_forgets_the_oldest() -> None:
    cache = AnswerCache(2)
    for number in range(3):
        cache.put(bytes([number]), str(number))
        assert cache.get(b"\1") == ("1" if number else None)
    assert [cache.get(bytes([number])) for number in range(3)] == [None, "1", "2"]


def test_a_wrong_key_or_model_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = web.json_response({"error": {"message": "no such model"}}, status=404)
    with Endpoint({"a": unknown}).at() as address:
        with pytest.raises(ImageRLError, match="the judge 'eyes' refuses: HTTP 404: no such model"):
            ask(judge(address), "a")
        monkeypatch.setenv("JUDGE_KEY", "another")
        with pytest.raises(ImageRLError, match="refuses the key: HTTP 401") as error:
            judge(address)
        assert "another" not in str(error.value)
        monkeypatch.delenv("JUDGE_KEY")
        with pytest.raises(ImageRLError, match="set the environment variable JUDGE_KEY to the key of"):
            judge(address)
    with pytest.raises(ImageRLError, match="cannot be reached"):
        JudgeReward(address, "eyes", patience_s=0.5)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"endpoint": "http://me:secret@host/v1"}, "without user, password and query"),
        ({"endpoint": "http://host/v1?key=secret"}, "without user, password and query"),
        ({"endpoint": "http://host/v1", "price": {"input": 1}}, r"\{input: 0.15, output: 0.6\}"),
        ({"endpoint": "http://host/v1", "concurrency": 0}, "must be positive"),
        ({"endpoint": "http://host/v1", "rubric": "txt"}, "no rubric 'txt'"),
    ],
)
def test_mistaken_settings(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ImageRLError, match=text) as error:
        JudgeReward(model="eyes", **settings)
    assert "secret" not in str(error.value)


def test_the_key_is_named_but_never_held_in_a_recipe() -> None:
    spec = RewardSpec("judge", settings={"endpoint": "http://h/v1", "model": "m", "key_env": "JUDGE_KEY"})
    assert check_reward(spec) == "judge" and secrets_of(spec) == ["JUDGE_KEY"]
    with pytest.raises(ImageRLError, match="no setting 'api_key'; it has: endpoint"):
        check_reward(RewardSpec("judge", settings={**spec.settings, "api_key": "x"}))


def test_edits_show_both_pictures() -> None:
    marks = '{"instruction": 5, "consistency": 3, "quality": 5}'
    endpoint = Endpoint({"Instruction: make it red": marks})
    with endpoint.at() as address:
        reward = judge(address, rubric="edit")
        output = ask(reward, "make it red", "make it red", reference=[PICTURES[5], None])
        with pytest.raises(ImageRLError, match="needs the column reference"):
            ask(reward, "make it red")
    assert output.rewards == [pytest.approx((1 + 0.5 + 1) / 3, abs=1e-12), None]
    content = endpoint.bodies[0]["messages"][1]["content"]
    assert [part.get("text") for part in content] == [
        "Source:", None, "Result:", None, "Instruction: make it red"
    ]  # fmt: skip
    assert content[1] != content[3]


def test_a_model_that_reads_back_in_words() -> None:
    """No schema and no instructions: a small model that answers questions is asked just the question."""
    endpoint = Endpoint({"what is written?": "RIPER"})
    with endpoint.at() as address:
        reward = judge(address, rubric="read_back", temperature=0)
        prompts = ['a sign "HOUSE"', "a sign", "x", "no text"]
        output = ask(reward, *prompts, target=[None, "river", "😀", None])
        without_column = ask(reward, 'a sign "RIVER"')
    assert output.rewards == [0.0, pytest.approx(0.8), None, None]
    assert without_column.rewards == [pytest.approx(0.8)]
    assert set(endpoint.bodies[0]) == {"model", "max_tokens", "temperature", "messages"}
    assert [message["role"] for message in endpoint.bodies[0]["messages"]] == ["user"]


def test_a_rubrics_column_must_exist(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("show: what colour is it?\nexpect: '{colour}'\n")
    with Endpoint({}).at() as address:
        reward = judge(address, rubric=str(tmp_path / "mine.yaml"))
        with pytest.raises(
            ImageRLError, match="rubric 'mine' of reward 'judge' names 'colour', which is no column"
        ):
            ask(reward, "a")
        assert ask(reward, "a", colour=[None]).rewards == [None]


def test_content_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    said = read_completion(json.dumps({"choices": [{"message": {"content": parts}}]}).encode(), 1.0, 0)
    assert said.text == "ab" and np.isnan(said.tokens_in)
