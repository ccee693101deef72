"""GenEval's rule on hand-made findings."""

from typing import Any

import pytest

from imagerl.rewards.composition.rule import (
    Found,
    faults,
    overlap,
    relations,
    specification,
    without_overlaps,
)
from imagerl.rl.types import ImageRLError

MIDDLE = (40, 40, 60, 60)


def verdict(
    found: dict[str, list[Found]], include: list[Any], exclude: list[Any] | None = None
) -> list[str | None]:
    return list(
        faults(
            found, specification(include, exclude), lambda objects, _: [one.colour or "" for one in objects]
        )
    )


@pytest.mark.parametrize(
    ("box", "told"),
    [
        ((0, 40, 20, 60), {"left of"}),
        ((80, 40, 100, 60), {"right of"}),
        ((40, 0, 60, 20), {"above"}),
        ((40, 80, 60, 100), {"below"}),
        ((0, 0, 20, 20), {"left of", "above"}),
        ((42, 42, 62, 62), set()),  # 2 apart, of 0.1 · (20 + 20) = 4
        ((45, 40, 65, 60), set()),  # 5 apart: 1 beyond, a fifth of the way
        ((49, 40, 69, 60), {"right of"}),  # 9 apart: 5 beyond, more than half
        ((80, 60, 100, 80), {"right of"}),  # (40, 20): (36, 16) beyond, of 44.7: 0.80 and 0.36
    ],
)
def test_relations_to_a_box_in_the_middle(box: tuple[float, ...], told: set[str]) -> None:
    assert relations(box, MIDDLE) == told
    mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relations(MIDDLE, box) == {mirrored[name] for name in told}


def test_counts_are_at_least_and_excludes_are_below() -> None:
    two = {"bench": [Found(MIDDLE), Found(MIDDLE)]}
    assert verdict(two, [{"class": "bench", "count": 1}]) == [None]
    assert verdict(two, [{"class": "bench", "count": 3}]) == ["missing"]
    assert verdict(two, [{"class": "bench", "count": 2}], [{"class": "bench", "count": 3}]) == [None, None]
    assert verdict(two, [{"class": "bench", "count": 1}], [{"class": "bench", "count": 2}]) == [
        None,
        "too many",
    ]
    assert verdict({}, [{"class": "cow"}]) == ["missing"]


def test_colours_are_those_of_the_most_confident() -> None:
    cups = {"cup": [Found(MIDDLE, 0.4, "red"), Found(MIDDLE, 0.9, "blue")]}
    assert verdict(cups, [{"class": "cup", "count": 1, "color": "blue"}]) == [None]
    assert verdict(cups, [{"class": "cup", "count": 1, "color": "red"}]) == ["colour"]
    assert verdict(cups, [{"class": "cup", "count": 2, "color": "red"}]) == ["colour"]


def test_positions_are_to_an_earlier_entry_that_is_as_asked() -> None:
    include = [{"class": "cow", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]
    left, right = Found((0, 40, 20, 60)), Found((80, 40, 99, 60))
    assert verdict({"cow": [Found(MIDDLE)], "dog": [left]}, include) == [None, None]
    assert verdict({"cow": [Found(MIDDLE)], "dog": [right]}, include) == [None, "position"]
    assert verdict({"dog": [left]}, include) == ["missing", "position"]
    coloured = [{**include[0], "color": "red"}, include[1]]
    assert verdict({"cow": [Found(MIDDLE, 1.0, "blue")], "dog": [left]}, coloured) == ["colour", "position"]
    each = [{"class": "cow", "count": 2}, include[1]]
    assert verdict({"cow": [Found(MIDDLE), right], "dog": [left]}, each) == [None, None]
    assert verdict({"cow": [right, Found((0, 40, 19, 60))], "dog": [left]}, each) == [None, "position"]


def test_overlap_counts_pixels_as_geneval_does() -> None:
    """Each of the larger boxes is 3 x 3 pixels, corners included."""
    assert overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(6 / (9 + 9 - 6))
    assert overlap((0, 0, 2, 2), (2, 2, 4, 4)) == pytest.approx(1 / 17)
    assert overlap((0, 0, 2, 2), (2.5, 0, 4.5, 2)) == pytest.approx(1.5 / 16.5)
    assert overlap((0, 0, 2, 2), (3, 0, 5, 2)) == 0.0
    assert overlap((1, 1, 1, 1), (1, 1, 1, 1)) == 1.0


def test_overlapping_boxes_are_one_object() -> None:
    sure, near, far = Found((0, 0, 10, 10), 0.9), Found((1, 0, 11, 10), 0.5), Found((8, 8, 18, 18), 0.4)
    assert without_overlaps([far, near, sure], 0.5) == [sure, far]
    assert without_overlaps([far, near, sure], 1.0) == [sure, near, far]


@pytest.mark.parametrize(
    ("include", "exclude", "complaint"),
    [
        ("bench", None, "column include must hold a list of entries, not bench"),
        ([], None, "a list with at least one entry"),
        (["bench"], None, "entries with a class"),
        ([{"class": "bench", "count": 0}], None, "a count of 1 or more"),
        ([{"class": "bench", "count": True}], None, "a count of 1 or more"),
        ([{"class": "bench", "position": ["left of", 0]}], None, "number of an earlier entry"),
        (
            [{"class": "a"}, {"class": "b", "position": ["behind", 0]}],
            None,
            "left of, right of, above, below",
        ),
        ([{"class": "a"}, {"class": "b", "position": "left of"}], None, "left of, right of, above, below"),
        ([{"class": "a"}], {"class": "a"}, "column exclude must hold a list of entries"),
    ],
)
def test_what_is_not_the_format_is_one_line(include: Any, exclude: Any, complaint: str) -> None:
    with pytest.raises(ImageRLError) as caught:
        specification(include, exclude)
    assert complaint in str(caught.value) and len(str(caught.value).splitlines()) == 1
