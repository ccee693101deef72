"""What an answer under a rubric is worth, worked out by hand, and what is refused."""

import math
from pathlib import Path

import pytest

from imagerl.rewards.judge.rubrics import FOLDER, Question, Rubric, load_rubric, parse_marks
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.mistakes import validated

TWO = {"a": Question(ask="?", most=10), "b": Question(ask="?", most=5, least=1)}


@pytest.mark.parametrize(
    "answer",
    [
        '{"reason": "so {b}", "a": 7, "b": 2}',
        'Well.\n```json\n{"a": 7, "b": 2.0, "c": "more"}\n```\nThat is all.',
        '<think>perhaps {"a": 1, "b": 1} or {"a": 9}</think> {"a": 7, "b": 2}',
        'broken { first {"a": 7, "b": 2}',
    ],
)
def test_marks_are_found_whatever_stands_around_them(answer: str) -> None:
    assert parse_marks(answer, TWO) == {"a": 7, "b": 2}


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("", "no marks but said: nothing"),
        ("7 of 10", "no marks but said: 7 of 10"),
        ('{"a": 7}', "no marks"),
        ('[{"a": 7}]', "no marks"),
        ("[" * 5000 + "{" * 5000, "no marks"),
        ('{"a": 11, "b": 2}', "gave 11 for 'a', which is no whole number from 0 to 10"),
        ('{"a": -1, "b": 2}', "gave -1 for 'a'"),
        ('{"a": 7, "b": 0}', "gave 0 for 'b', which is no whole number from 1 to 5"),
        ('{"a": 7.5, "b": 2}', r"gave 7\.5 for 'a'"),
        ('{"a": "7", "b": 2}', "gave '7' for 'a'"),
        ('{"a": true, "b": 2}', "gave True for 'a'"),
        ('{"a": null, "b": 2}', "gave None for 'a'"),
        ('{"a": NaN, "b": 2}', "gave nan for 'a'"),
        ('{"a": Infinity, "b": 2}', "gave inf for 'a'"),
    ],
)
def test_rubbish_and_lies_are_refused(answer: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        parse_marks(answer, TWO)


def test_viescores_combination() -> None:
    """The least of each aspect, then the geometric mean (arXiv 2312.14867)."""
    value, parts = load_rubric("alignment").score(
        '{"objects": 8, "attributes": 5, "natural": 9, "artefacts": 2}'
    )
    assert value == pytest.approx(math.sqrt(0.5 * 0.2), abs=1e-12)
    assert parts == {"objects": 0.8, "attributes": 0.5, "natural": 0.9, "artefacts": 0.2}


def test_no_mark_of_an_edit_counts_for_more_than_that_it_was_made() -> None:
    """Copying the source earns nothing however consistent it is (ImgEdit, arXiv 2505.20275)."""
    rubric = load_rubric("edit")
    assert rubric.score('{"instruction": 1, "consistency": 5, "quality": 5}')[0] == 0.0
    value, parts = rubric.score('{"instruction": 4, "consistency": 5, "quality": 2}')
    assert value == pytest.approx((0.75 + 0.75 + 0.25) / 3, abs=1e-12)
    assert parts == {"instruction": 0.75, "consistency": 1.0, "quality": 0.25}


def test_the_text_rubric() -> None:
    value, _ = load_rubric("text").score('{"spelling": 5, "legibility": 10, "extra": 4}')
    assert value == pytest.approx((0.5 * 0.5 * 0.4) ** (1 / 3), abs=1e-12)


def test_reading_back() -> None:
    rubric = load_rubric("read_back")
    assert (rubric.show, rubric.fields) == ("what is written?", ["target"])
    assert rubric.score("river ", "RIVER") == (1.0, {"exact": 1.0})
    assert rubric.score("RIVER X", "RIVER") == (1.0, {"exact": 0.0})
    assert rubric.score("RIPER", "RIVER")[0] == pytest.approx(0.8, abs=1e-12)


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_shipped_rubrics_say_their_form(name: str) -> None:
    rubric = load_rubric(name)
    assert set(rubric.fields) <= {"target"} and rubric.source == (name == "edit")
    for question, asked in rubric.questions.items() if rubric.has_form else ():
        assert f'"{question}": <number>' in rubric.system
        assert rubric.answer_schema["properties"][question]["enum"][-1] == asked.most
        assert rubric.answer_schema["required"] == ["reason", *rubric.questions]


QUESTION = {"a": {"ask": "?", "most": 5}}
WHOLE = {"instructions": "i", "show": "{prompt}", "questions": QUESTION}


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ([], "should be a"),
        ({**WHOLE, "weight": 1}, '"weight" is no setting'),
        ({**WHOLE, "show": ""}, '"show" should'),
        ({**WHOLE, "show": "{prompt.__class__}"}, "must be the plain name of a column"),
        ({**WHOLE, "show": "{0}"}, "must be the plain name of a column"),
        ({**WHOLE, "show": "{prompt!r}"}, "must be the plain name of a column"),
        ({**WHOLE, "show": "{"}, "write {{ and }} for braces"),
        ({**WHOLE, "questions": {}}, "needs questions, or else expect"),
        ({**WHOLE, "questions": {"reason": QUESTION["a"]}}, "cannot be the name"),
        ({**WHOLE, "questions": {"cost": QUESTION["a"]}}, "cannot be the name"),
        ({**WHOLE, "questions": {"a": {"ask": "?"}}}, '"questions.a.most" is missing'),
        ({**WHOLE, "questions": {"a": {"ask": "?", "most": 0}}}, "whole numbers least < most"),
        ({**WHOLE, "questions": {"a": {"ask": "?", "most": 5, "max": 1}}}, '"questions.a.max" is no setting'),
        ({**WHOLE, "combine": "sum"}, "\"combine\" should be 'mean', 'geometric' or 'min'"),
        ({**WHOLE, "capped_by": "b"}, "which is no question"),
        ({**WHOLE, "source": 1}, '"source" should be true or false'),
        ({"show": "?"}, "needs questions, or else expect"),
        ({"show": "?", "expect": "{target}", "questions": QUESTION}, "needs questions, or else expect"),
    ],
)
def test_mistakes_in_a_rubric_are_named(entry: object, text: str) -> None:
    with pytest.raises(ImageRLError, match=text):
        validated(Rubric, entry, "rubric")


def test_files(tmp_path: Path) -> None:
    with pytest.raises(ImageRLError, match="no rubric 'txt'; give a YAML file or one of: alignment, edit"):
        load_rubric("txt")
    (tmp_path / "mine.yaml").write_text("show: who?\nexpect: '{name}'\n")
    rubric = load_rubric(str(tmp_path / "mine.yaml"))
    assert (rubric.name, rubric.fields) == ("mine", ["name"])
    (tmp_path / "mine.yaml").write_text("show: [")
    with pytest.raises(
        ImageRLError, match=r"rubric .*mine\.yaml, line 1, column 8: expected the node content"
    ):
        load_rubric(str(tmp_path / "mine.yaml"))
