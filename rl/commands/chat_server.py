"""A model of ours behind an OpenAI-compatible endpoint: one picture and one question in, its own words out.

What reads pictures is known by its signature only. Sampling is greedy, so an answer depends on its question alone."""

from __future__ import annotations

import asyncio
import base64
import io
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imagerl.rl.errors import ImageRLError, one_line

if TYPE_CHECKING:
    from aiohttp import web
    from PIL import Image

# answers(pictures, questions, max_new_tokens) -> one text each. Pictures are unpacked one by one as they are taken,
# so whoever reduces each before taking the next never holds two large ones.
Answers = Callable[[Iterable["Image.Image"], Sequence[str], int], list[str]]
MOST_BYTES = 32 * 2**20  # of a request
MOST_PIXELS = 4096 * 4096
MOST_CHARACTERS = 4000  # of a question
MOST_TOKENS = 512
FORMATS = ("PNG", "JPEG", "WEBP")


class RequestError(Exception):
    """A request that cannot be answered. The message goes to the client, with an HTTP status."""

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(one_line(text, 500))
        self.status = status


@dataclass(frozen=True, slots=True)
class ChatQuestion:
    """The question of one request."""

    picture: bytes  # a file of one of FORMATS, within MOST_PIXELS; not unpacked while it waits
    text: str
    max_new_tokens: int


def parse_chat(body: object, model: str) -> ChatQuestion:
    """Parse the question of a chat completion request: one picture as a data URL, and all texts in their order.

    Raises RequestError for what this server cannot do, and for what is no such request."""
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
        raise RequestError("the request must be a JSON object with messages")
    if body.get("model") != model:
        raise RequestError(f"no model is named {body.get('model')!r} here; there is {model!r}", 404)
    if body.get("stream") or body.get("n", 1) != 1:
        raise RequestError("stream and n are not supported: one answer comes, whole")
    form = body.get("response_format")
    if form is not None and (not isinstance(form, dict) or form.get("type") != "text"):
        raise RequestError("this model answers in its own words; ask without response_format")
    if body.get("temperature") not in (None, 0):
        raise RequestError("answers are greedy; set temperature to 0")
    most = body.get("max_completion_tokens", body.get("max_tokens", 64))
    if type(most) is not int or not 1 <= most <= MOST_TOKENS:
        raise RequestError(f"max_tokens must be a whole number from 1 to {MOST_TOKENS}")
    texts, pictures = [], []
    for part in _parts(body["messages"]):
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif part.get("type") == "image_url" and isinstance(part.get("image_url"), dict):
            pictures.append(part["image_url"].get("url"))
        else:
            raise RequestError("parts of a message must be of the types text and image_url")
    if len(pictures) != 1:
        raise RequestError(f"a question is about one picture, not {len(pictures)}")
    text = "\n".join(texts).strip()
    if not text:
        raise RequestError("there is no question")
    if len(text) > MOST_CHARACTERS:
        raise RequestError(f"the question has {len(text)} characters; at most {MOST_CHARACTERS} are taken")
    return ChatQuestion(_picture_file(pictures[0]), text, most)


def _parts(messages: Sequence[object]) -> list[dict[str, Any]]:
    """List the contents of all messages, one behind the other."""
    parts: list[dict[str, Any]] = []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ("system", "developer", "user"):
            raise RequestError("messages must have the role system or user: there is no conversation")
        content = message.get("content")
        if isinstance(content, str):
            parts.append({"type": "text", "text": content})
        elif isinstance(content, list) and all(isinstance(part, dict) for part in content):
            parts += content
        else:
            raise RequestError("the content of a message must be a text or a list of parts")
    return parts


def _picture_file(url: object) -> bytes:
    """Return the file in a data URL, its size checked. No address is fetched: who does that can be sent anywhere."""
    if not isinstance(url, str) or not url.startswith("data:image/") or ";base64," not in url[:64]:
        raise RequestError(
            "the picture must be a data URL, data:image/png;base64,...; addresses are not fetched"
        )
    try:
        data = base64.b64decode(url.partition(",")[2], validate=True)
    except ValueError as error:
        raise RequestError(f"the picture cannot be decoded: {error}") from error
    _picture(data, unpack=False)
    return data


def _picture(data: bytes, unpack: bool = True) -> Image.Image:
    """Read the picture in a file. Raises RequestError when it is too large, or broken as far as it was read."""
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)  # reads what stands before the pixels
        if picture.width * picture.height > MOST_PIXELS:
            raise RequestError(
                f"the picture has {picture.width}×{picture.height} pixels; at most {MOST_PIXELS} are taken",
                413,
            )
        if unpack:
            picture.load()
    except RequestError:
        raise
    except Exception as error:  # decoders raise whatever they like at a broken file
        raise RequestError(
            f"the picture cannot be decoded as one of {', '.join(FORMATS)}: {error}"
        ) from error
    return picture


def chat_app(
    answers: Answers,
    model: str,
    batch: int = 16,
    refuse: Callable[[str], object] = lambda text: None,
) -> web.Application:
    """Build `POST /v1/chat/completions` and `GET /v1/models`. `answers` is called by one thread with the questions that
    have come in meanwhile, at most `batch`; when it fails with several, it is called with each alone. `refuse` raises
    ImageRLError for a text that the model cannot read: its own request is answered 400, no other's."""
    from aiohttp import web

    questions: asyncio.Queue[tuple[ChatQuestion, asyncio.Future[str]]] = asyncio.Queue()
    thread = ThreadPoolExecutor(1, thread_name_prefix="reader")

    def problem(status: int, text: str) -> web.Response:
        told = {"message": text, "type": "invalid_request_error"}
        return web.json_response({"error": told}, status=status)

    async def answer(together: Sequence[tuple[ChatQuestion, asyncio.Future[str]]], most: int) -> None:
        pictures = (_picture(question.picture) for question, _ in together)
        asked = [question.text for question, _ in together]
        try:
            texts = await asyncio.get_running_loop().run_in_executor(thread, answers, pictures, asked, most)
        except Exception as error:
            if len(together) > 1:
                for entry in together:
                    await answer([entry], most)
            elif not together[0][1].done():
                together[0][1].set_exception(error)
            return
        for (_, future), text in zip(together, texts, strict=True):
            if not future.done():
                future.set_result(text)

    async def read() -> None:
        """Answer what waits, batch by batch."""
        while True:
            together = [await questions.get()]
            while len(together) < batch and not questions.empty():
                together.append(questions.get_nowait())
            for most in dict.fromkeys(question.max_new_tokens for question, _ in together):
                await answer([entry for entry in together if entry[0].max_new_tokens == most], most)

    async def reading(_: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(read())
        yield
        task.cancel()
        thread.shutdown(wait=False)

    async def models(_: web.Request) -> web.Response:
        entry = {"id": model, "object": "model", "owned_by": "imagerl"}
        return web.json_response({"object": "list", "data": [entry]})

    async def complete(request: web.Request) -> web.Response:
        try:
            try:
                body = await request.json()
            except (ValueError, RecursionError) as error:
                raise RequestError(f"the request is not JSON: {error}") from error
            question = parse_chat(body, model)
            refuse(question.text)
            future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            questions.put_nowait((question, future))
            return web.json_response(_completion(model, await future))
        except RequestError as error:
            return problem(error.status, str(error))
        except ImageRLError as error:
            return problem(400, str(error))

    app = web.Application(client_max_size=MOST_BYTES)
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/chat/completions", complete)
    app.cleanup_ctx.append(reading)
    return app


def _completion(model: str, text: str) -> dict[str, object]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
    }
