"""Define what a judge is asked about a picture and how its answer is scored. Pure functions but for the reading."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagerl.rewards.ocr.reward import exact_match, score_text
from imagerl.rl.errors import ImageRLError, one_line
from imagerl.rl.files.reading import read_text
from imagerl.rl.files.yaml_text import MAX_RECIPE_BYTES, parse_yaml

FOLDER = Path(__file__).with_name("rubrics")
COMBINE = ("mean", "geometric", "min")
REASON = "reason"  # what a judge writes before its marks
COSTS = ("time_s", "tokens_in", "tokens_out", "cost", "cached", "retries")  # logged beside the marks
MOST_MARKS = 101


@dataclass(frozen=True, slots=True)
class Question:
    """One mark that a judge gives, a whole number from `least` to `most`."""

    name: str
    ask: str
    least: int
    most: int
    aspect: str


@dataclass(frozen=True, slots=True)
class Rubric:
    """A judge's task. With `questions` the judge gives marks; with `expect` it answers in words, which are
    compared with the expected text. `show` and `expect` may name columns of the prompt set in braces, and
    {prompt}."""

    name: str
    show: str
    instructions: str = ""
    source: bool = False  # show the picture to be edited, too
    questions: tuple[Question, ...] = ()
    combine: str = "mean"
    capped_by: str | None = None
    expect: str | None = None

    @property
    def fields(self) -> list[str]:
        """Return the columns that its texts name, {prompt} left out."""
        texts = (self.show, self.expect or "")
        found = (field for text in texts for _, field, _, _ in string.Formatter().parse(text) if field)
        return [field for field in dict.fromkeys(found) if field != "prompt"]

    @property
    def system(self) -> str:
        """Return the instructions with the form of the answer, also for judges that ignore a schema."""
        if self.expect is not None:
            return self.instructions
        asked = "\n".join(f'- "{q.name}": {q.ask} ({q.least} worst, {q.most} best)' for q in self.questions)
        form = ", ".join(
            [f'"{REASON}": "one or two sentences"', *(f'"{q.name}": <number>' for q in self.questions)]
        )
        return (
            f"{self.instructions.strip()}\n\nGive these marks, whole numbers within their bounds:\n{asked}\n\n"
            f"Answer with one JSON object and nothing else: {{{form}}}"
        )

    @property
    def schema(self) -> dict[str, Any]:
        """Return the JSON schema of the answer. Marks are enumerated: not every server knows bounds."""
        marks = {
            q.name: {"type": "integer", "enum": list(range(q.least, q.most + 1))} for q in self.questions
        }
        return {
            "type": "object",
            "properties": {REASON: {"type": "string"}, **marks},
            "required": [REASON, *marks],
            "additionalProperties": False,
        }

    def score(self, answer: str, expected: str | None = None) -> tuple[float, dict[str, float]]:
        """Return the value in [0, 1] of an answer, and its parts. Raises ValueError with what is wrong with it."""
        if expected is not None:
            return score_text(answer, expected), {"exact": exact_match(answer, expected)}
        marks = parse_marks(answer, self.questions)
        parts = {q.name: (marks[q.name] - q.least) / (q.most - q.least) for q in self.questions}
        return self.combined(parts), parts

    def combined(self, parts: Mapping[str, float]) -> float:
        """Combine marks in [0, 1]: capped, the least of each aspect, then the mean, geometric mean or least."""
        cap = parts[self.capped_by] if self.capped_by is not None else 1.0
        aspects: dict[str, float] = {}
        for question in self.questions:
            mark = min(parts[question.name], cap)
            aspects[question.aspect] = min(mark, aspects.get(question.aspect, 1.0))
        values = list(aspects.values())
        if self.combine == "min":
            return min(values)
        if self.combine == "geometric":
            return math.prod(values) ** (1 / len(values))
        return sum(values) / len(values)


def parse_marks(answer: str, questions: Sequence[Question]) -> dict[str, int]:
    """Return the marks in an answer: the last JSON object in it that has all of them, whatever stands around it.

    Raises ValueError when there is none, or a mark is no whole number within its bounds."""
    names = [question.name for question in questions]
    found = [entry for entry in _objects(answer) if all(name in entry for name in names)]
    if not found:
        raise ValueError(f"the judge gave no marks but said: {_shortened(answer)}")
    marks = {}
    for question in questions:
        mark = found[-1][question.name]
        if isinstance(mark, float) and mark.is_integer():
            mark = int(mark)
        if type(mark) is not int or not question.least <= mark <= question.most:
            raise ValueError(
                f"the judge gave {_shortened(repr(mark))} for {question.name!r}, which is no whole number from "
                f"{question.least} to {question.most}"
            )
        marks[question.name] = mark
    return marks


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Return the outermost JSON objects in a text, in order."""
    decoder, start = json.JSONDecoder(), text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            if isinstance(value, dict):
                yield value
        start = text.find("{", end)


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return f"{text[:80]}…" if len(text) > 80 else text or "nothing"


def load_rubric(rubric: str) -> Rubric:
    """Load a shipped rubric by name, or one from a YAML file. Raises ImageRLError with what is wrong in it."""
    shipped = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    path = FOLDER / f"{rubric}.yaml" if rubric in shipped else Path(rubric)
    if not path.is_file():
        raise ImageRLError(f"there is no rubric {rubric!r}; give a YAML file or one of: {', '.join(shipped)}")
    entry = parse_yaml(read_text(path, MAX_RECIPE_BYTES), f"rubric {path}")
    try:
        return parse_rubric(path.stem, entry)
    except ValueError as error:
        raise ImageRLError(f"rubric {path}: {one_line(error, 300)}") from error


def parse_rubric(name: str, entry: Any) -> Rubric:
    """Make a rubric of YAML's values. Raises ValueError with what is wrong in it."""
    if not isinstance(entry, dict):
        raise ValueError("it must be a mapping with questions, or with ask and expect")
    reads = "ask" in entry or "expect" in entry
    texts = ("ask", "expect", "instructions") if reads else ("instructions", "show")
    allowed = {*texts, "source", *(() if reads else ("questions", "combine", "capped_by"))}
    _refuse_unknown(entry, allowed, "a rubric")
    for key in texts:
        if key != "instructions" or not reads:
            _text(entry, key)
    show = entry["ask"] if reads else entry["show"]
    for text in (show, entry.get("expect", "")):
        _check_fields(text)
    source = entry.get("source", False)
    if not isinstance(source, bool):
        raise ValueError("source must be true or false")
    if reads:
        return Rubric(name, show, entry.get("instructions", ""), source, expect=entry["expect"])
    questions = _questions(entry.get("questions"))
    combine, capped_by = entry.get("combine", "mean"), entry.get("capped_by")
    if combine not in COMBINE:
        raise ValueError(f"combine must be one of: {', '.join(COMBINE)}")
    if capped_by is not None and capped_by not in [question.name for question in questions]:
        raise ValueError(f"capped_by names {capped_by!r}, which is no question")
    return Rubric(name, show, entry["instructions"], source, questions, combine, capped_by)


def _questions(entries: Any) -> tuple[Question, ...]:
    if not isinstance(entries, dict) or not entries:
        raise ValueError("questions must be a mapping with at least one question")
    questions = []
    for name, entry in entries.items():
        if not isinstance(name, str) or not name.isidentifier() or name in (REASON, *COSTS):
            raise ValueError(f"{name!r} cannot be the name of a question")
        if not isinstance(entry, dict):
            raise ValueError(f"question {name!r} must be a mapping with ask and most")
        _refuse_unknown(entry, {"ask", "least", "most", "aspect"}, f"question {name!r}")
        ask, aspect = _text(entry, "ask"), entry.get("aspect", name)
        least, most = entry.get("least", 0), entry.get("most")
        if type(least) is not int or type(most) is not int or not least < most < least + MOST_MARKS:
            raise ValueError(f"question {name!r} needs whole numbers least < most, at most 100 apart")
        questions.append(Question(name, ask.strip(), least, most, str(aspect)))
    return tuple(questions)


def _text(entry: Mapping[str, Any], key: str) -> str:
    text = entry.get(key)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{key} must be a text")
    return text


def _check_fields(text: str) -> None:
    """Allow only plain names in braces: a format string must not reach into objects."""
    try:
        fields = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{error} in {_shortened(text)!r}; write {{{{ and }}}} for braces") from error
    for _, field, spec, conversion in fields:
        if field is not None and (not field.isidentifier() or spec or conversion):
            raise ValueError(f"{{{field}}} must be the plain name of a column")


def _refuse_unknown(entry: Mapping[Any, Any], allowed: set[str], what: str) -> None:
    for key in entry:
        if key not in allowed:
            raise ValueError(f"{what} has no key {key!r}; it has: {', '.join(sorted(allowed))}")
