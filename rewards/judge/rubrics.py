"""Define what a judge is asked about a picture and how its answer is scored. Pure functions but for the reading."""

from __future__ import annotations

import json
import math
import re
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt, model_validator

from imagerl.rewards.ocr.reward import exact_match, score_text
from imagerl.rl.errors import ImageRLError, one_line
from imagerl.rl.files.mistakes import validated
from imagerl.rl.files.reading import read_text
from imagerl.rl.files.yaml_text import MAX_RECIPE_BYTES, parse_yaml

FOLDER = Path(__file__).with_name("rubrics")
REASON = "reason"  # what a judge writes before its marks
COSTS = ("time_s", "tokens_in", "tokens_out", "cost", "cached", "retries")  # logged beside the marks
MOST_MARKS = 101

Text = Annotated[str, Field(pattern=r"\S")]


def _plain_fields(text: str) -> str:
    """Allow only plain names in braces: a format string must not reach into objects."""
    try:
        fields = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{error} in {text[:80]!r}; write {{{{ and }}}} for braces") from error
    for _, field, spec, conversion in fields:
        if field is not None and (not field.isidentifier() or spec or conversion):
            raise ValueError(f"{{{field}}} must be the plain name of a column")
    return text


Template = Annotated[Text, AfterValidator(_plain_fields)]


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Question(_Checked):
    """One mark that a judge gives, a whole number from `least` to `most`. Marks of one `aspect`, by default its own
    name, enter by the least of them."""

    ask: Text
    most: StrictInt
    least: StrictInt = 0
    aspect: str | None = None

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if not self.least < self.most < self.least + MOST_MARKS:
            raise ValueError("a question needs whole numbers least < most, at most 100 apart")
        return self


class Rubric(_Checked):
    """A judge's task. With `questions` the judge gives marks; with `expect` it answers in words, which are compared
    with the expected text. `show` stands beside the picture; it and `expect` may name columns of the prompt set in
    braces, and {prompt}. `source`: show the picture to be edited, too. `pattern` finds the mark of the question {name}
    in the answer of a judge that was trained to write it in a form of its own; it may then be a fraction."""

    show: Template
    instructions: str = ""
    source: StrictBool = False
    questions: dict[str, Question] = Field(default_factory=dict)
    combine: Literal["mean", "geometric", "min"] = "mean"
    capped_by: str | None = None
    pattern: str | None = None
    expect: Template | None = None
    name: str = ""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if bool(self.questions) == bool(self.expect):
            raise ValueError("a rubric needs questions, or else expect")
        for name in self.questions:
            if not name.isidentifier() or name in (REASON, *COSTS):
                raise ValueError(f"{name!r} cannot be the name of a question")
        if self.pattern is not None:
            try:
                groups = re.compile(self.pattern).groups
            except re.error as error:
                raise ValueError(f"pattern is no regular expression: {error}") from error
            if groups != 1:
                raise ValueError("pattern must have one group, for the number")
        if self.capped_by is not None and self.capped_by not in self.questions:
            raise ValueError(f"capped_by names {self.capped_by!r}, which is no question")
        return self

    @property
    def fields(self) -> list[str]:
        """Return the columns that its texts name, {prompt} left out."""
        found = string.Formatter().parse(self.show + (self.expect or ""))
        return [
            name for name in dict.fromkeys(field for _, field, _, _ in found if field) if name != "prompt"
        ]

    @property
    def has_form(self) -> bool:
        """Tell whether the answer must be JSON."""
        return bool(self.questions) and self.pattern is None

    @property
    def system(self) -> str:
        """Return the instructions with the form of the answer, also for judges that ignore a schema."""
        if not self.has_form:
            return self.instructions
        asked = "\n".join(
            f'- "{name}": {q.ask.strip()} ({q.least} worst, {q.most} best)'
            for name, q in self.questions.items()
        )
        form = ", ".join(
            [f'"{REASON}": "one or two sentences"', *(f'"{n}": <number>' for n in self.questions)]
        )
        return (
            f"{self.instructions.strip()}\n\nGive these marks, whole numbers within their bounds:\n{asked}\n\n"
            f"Answer with one JSON object and nothing else: {{{form}}}"
        )

    @property
    def answer_schema(self) -> dict[str, object]:
        """Return the JSON schema of the answer. Marks are enumerated: not every server knows bounds."""
        marks = {
            name: {"type": "integer", "enum": list(range(q.least, q.most + 1))}
            for name, q in self.questions.items()
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
        marks = parse_marks(answer, self.questions, self.pattern)
        parts = {name: (marks[name] - q.least) / (q.most - q.least) for name, q in self.questions.items()}
        return self.combined(parts), parts

    def combined(self, parts: Mapping[str, float]) -> float:
        """Combine marks in [0, 1]: capped, the least of each aspect, then the mean, geometric mean or least."""
        cap = parts[self.capped_by] if self.capped_by is not None else 1.0
        aspects: dict[str, float] = {}
        for name, question in self.questions.items():
            aspect = question.aspect or name
            aspects[aspect] = min(parts[name], cap, aspects.get(aspect, 1.0))
        values = list(aspects.values())
        if self.combine == "min":
            return min(values)
        if self.combine == "geometric":
            return math.prod(values) ** (1 / len(values))
        return sum(values) / len(values)


def parse_marks(
    answer: str, questions: Mapping[str, Question], pattern: str | None = None
) -> dict[str, float]:
    """Return the marks in an answer: the last JSON object in it that has all of them, whatever stands around it; or
    what the group of `pattern` matched last, with {name} in it.

    Raises ValueError when there is none, or a mark is no number within its bounds, whole but for a pattern's."""
    if pattern is not None:
        told = {
            name: re.findall(pattern.replace("{name}", name), answer, re.IGNORECASE) for name in questions
        }
        found = [{name: _number(all_[-1]) for name, all_ in told.items()}] if all(told.values()) else []
    else:
        found = [entry for entry in _objects(answer) if all(name in entry for name in questions)]
    if not found:
        raise ValueError(f"the judge gave no marks but said: {one_line(answer, 80) or 'nothing'}")
    marks: dict[str, float] = {}
    for name, question in questions.items():
        mark = found[-1][name]
        whole = type(mark) is int or (isinstance(mark, float) and mark.is_integer())
        if (
            not (whole or (pattern and isinstance(mark, float)))
            or not question.least <= mark <= question.most
        ):
            raise ValueError(
                f"the judge gave {one_line(repr(mark), 80)} for {name!r}, which is no whole number from "
                f"{question.least} to {question.most}"
            )
        marks[name] = mark
    return marks


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


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


def load_rubric(rubric: str) -> Rubric:
    """Load a shipped rubric by name, or one from a YAML file. Raises ImageRLError with what is wrong in it."""
    shipped = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    path = FOLDER / f"{rubric}.yaml" if rubric in shipped else Path(rubric)
    if not path.is_file():
        raise ImageRLError(f"there is no rubric {rubric!r}; give a YAML file or one of: {', '.join(shipped)}")
    place = f"rubric {path}"
    found = validated(Rubric, parse_yaml(read_text(path, MAX_RECIPE_BYTES), place), place)
    return found.model_copy(update={"name": path.stem})
