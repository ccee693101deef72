"""Hundreds of spoilt recipes: each is refused in one line, or what is accepted makes sense. Seeded."""

from __future__ import annotations

import copy
import math
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from imagerl.rewards.judge.rubrics import FOLDER as RUBRICS
from imagerl.rewards.judge.rubrics import load_rubric
from imagerl.rl.config.recipe import RecipeModel, load_yaml_recipe, read_recipe
from imagerl.rl.config.train import Recipe
from imagerl.rl.errors import ImageRLError
from imagerl.rl.evaluation.suites import SuiteFile
from imagerl.rl.files.mistakes import iter_fields
from tests.test_recipes import SCHEMAS

FOLDER = Path(__file__).parents[3] / "recipes"
FOLDERS = (FOLDER, FOLDER / "compare", FOLDER.parent / "tools" / "tiny")
SHIPPED = sorted(path for folder in FOLDERS for path in folder.glob("*.yaml"))
SUITE = {
    "prompts": {"name": "tiny_world", "split": "heldout", "size": 8},
    "rewards": [{"name": "ocr", "mode": "recognise", "weight": 2.0}],
    "gold": [{"name": "colours"}],
}
PER_SEED = 130  # recipes; five seeds

STRANGE: list[Any] = [
    None, True, False, "", " ", "\n", "~", "/", "..", "no", "ppo", "1e-6", "ä" * 3000, "\u202e", "😀", [], {}, [[]],
    [None], {"": None}, {"a": {"b": {"c": 1}}}, 0, -1, 1, 2, 3, 10**6, 10**9, 10**18, 10**30, 0.0, -0.0, 0.5, -0.5,
    1e-300, 1e-9, 1e9, 1e18, 1e300, -1e300, math.inf, -math.inf, math.nan,
]  # fmt: skip
WORDS = (
    "steps",
    "seed",
    "weight",
    "name",
    "lr",
    "gruop_size",
    "é",
    "a b",
    "__class__",
    "model_config",
    "0",
    "x" * 5000,
)
SNIPPETS = (
    "!!timestamp foo", "!!int foo", "!!python/object:os.system {}", "!!binary =", "!!set {a}", "!foo bar", "&a [*a]",
    "*nowhere", "&a {<<: *a}", "[" * 5000, "{a: " * 5000, "- " * 5000, "? " * 500, "'",
    '"\\ud800"', '"\\0"', '"\\x1b[2J"', "\t",
    "%YAML 9.9", "--- 1\n--- 2", "9" * 5000, "1e999", "-.inf", ".nan", "1_000", "0x10", "\u2028",
    "|\n  a", "@", "`",
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value within plain data."""
    yield path
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, entry in entries:
        yield from places(entry, (*path, key))


def holder_of(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        data = data[key]
    return data


def spoil_data(data: dict[str, Any], rng: random.Random) -> None:
    """One change of a type, a magnitude or a key, or a deletion."""
    path = rng.choice([path for path in places(data) if path])
    holder, key = holder_of(data, path), path[-1]
    how = rng.randrange(5)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder[key], int | float):
        holder[key] = holder[key] * rng.choice([-1, 0, 1e-300, 1e-9, 0.5, 2, 1e6, 10**12, 1e300])
    elif how == 2 and isinstance(holder, dict):
        holder[rng.choice([rng.choice(WORDS), key[:-1], key + "s"])] = copy.deepcopy(holder[key])
    elif how == 3:
        other = rng.choice([path for path in places(data) if path])
        holder[key] = copy.deepcopy(holder_of(data, other)[other[-1]])
    else:
        holder[key] = copy.deepcopy(rng.choice(STRANGE))


def bomb(depth: int, width: int) -> str:
    """Aliases of aliases: width ** depth values in a few hundred letters."""
    lines = ["b0: &b0 [1]"]
    lines += [f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * width)}]" for n in range(1, depth)]
    return "\n".join(lines) + "\n"


def spoil_text(text: str, rng: random.Random) -> str:
    """One change to the file itself, which may no longer be YAML."""
    how, at = rng.randrange(7), rng.randrange(max(1, len(text)))
    if how == 0:
        return text[:at] + rng.choice(SNIPPETS) + text[at:]
    if how == 1:
        lines = text.splitlines()
        line = rng.randrange(len(lines))
        lines[line] = lines[line].partition(":")[0] + ": " + rng.choice(SNIPPETS)
        return "\n".join(lines)
    if how == 2:
        return text[:at]
    if how == 3:
        return bomb(rng.randrange(2, 30), rng.randrange(2, 12)) + text
    if how == 4:
        return (
            text[:at]
            + chr(rng.choice([0, 7, 9, 27, 0x85, 0xA0, 0x2028, 0xFEFF, 0xFFFE, 0x1F600]))
            + text[at:]
        )
    if how == 5:
        return f"{text}\n{text}"
    return text.replace("\n", rng.choice(["\r", "\r\n", "\n\n ", " "]), rng.randrange(1, 9))


def spoilt_override(data: dict[str, Any], rng: random.Random) -> str:
    path = rng.choice([path for path in places(data) if path])
    key = ".".join(map(str, (*path[: rng.randrange(len(path))], rng.choice([path[-1], *WORDS]))))
    key = rng.choice([key, key, key, key + "." + "9" * 30, "a." * 3000 + "b", "\x1b[2J" + key, ".", ""])
    return f"{key}{rng.choice(['=', '=', '=', '==', ''])}{rng.choice([*map(str, STRANGE), *SNIPPETS])}"


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    """Turns a hang into a failure."""

    def hangs(*_: object) -> None:
        raise AssertionError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refusal(read: Callable[[], Any]) -> tuple[Any, str]:
    """What is read, or the one line of its refusal."""
    with no_longer_than(20):
        try:
            return read(), ""
        except ImageRLError as error:
            message = str(error)
            assert message.isprintable() and 10 < len(message) < 1000, message
            return None, message


def require_sense(recipe: RecipeModel, folder: Path) -> None:
    """What every accepted recipe is: written and read back equal, of bounded numbers and work, and able to learn."""
    text = recipe.to_yaml()
    assert len(text) < 2_000_000
    again = folder / "again.yaml"
    again.write_text(text, encoding="utf-8")
    assert load_yaml_recipe(type(recipe), again) == recipe
    values = recipe.model_dump()
    for way in places(values):
        value = holder_of(values, way)[way[-1]] if way else None
        if isinstance(value, int | float):  # a user's own reward may be told infinity
            assert value == 0 or abs(value) == math.inf or 1e-30 <= abs(value) <= 1e30, way
    place = getattr(getattr(recipe, "run", None), "output_dir", "runs/suite")
    assert place.strip() and place[0] != "~" and os.path.abspath(place) != "/"
    if isinstance(recipe, Recipe):
        rollout = recipe.rollout
        assert rollout.prompts_per_step * rollout.group_size * rollout.decodes <= 2**20
        assert recipe.optim.lr >= 1e-12 and recipe.run.steps >= 1
        weights = [spec.weight for spec in recipe.rewards.functions]
        flat = [
            one for weight in weights for one in (weight.values() if isinstance(weight, dict) else [weight])
        ]
        assert any(1e-6 <= abs(one) <= 1e6 for one in flat)
        labels = [spec.label for spec in (*recipe.rewards.functions, *recipe.gold)]
        assert len(set(labels)) == len(labels)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_spoilt_recipes_are_refused_in_a_line_or_make_sense(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    refused = []
    for number in range(PER_SEED):
        path = rng.choice(SHIPPED)
        data = read_recipe(path) if number % 10 else copy.deepcopy(SUITE)
        schema = SCHEMAS[data.get("kind", "train")] if number % 10 else SuiteFile
        overrides: list[str] = []
        spoilt = copy.deepcopy(data)
        for _ in range(rng.choice([0, 1, 1, 2, 4])):
            spoil_data(spoilt, rng)
        text = yaml.safe_dump(spoilt, allow_unicode=True, sort_keys=False)
        if rng.random() < 0.3:
            text = spoil_text(text, rng)
        if rng.random() < 0.3:
            overrides = [spoilt_override(data, rng) for _ in range(rng.randrange(1, 4))]
        file = tmp_path / "recipe.yaml"
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        recipe, message = refusal(lambda s=schema, f=file, o=overrides: load_yaml_recipe(s, f, o))
        if recipe is None:
            refused.append(message)
        else:
            require_sense(recipe, tmp_path)
    assert PER_SEED * 0.5 < len(refused) < PER_SEED * 0.98  # neither all nor nothing


@pytest.mark.slow
def test_spoilt_rubrics_are_refused_in_a_line_or_make_sense(tmp_path: Path) -> None:
    rng = random.Random(7)
    for _ in range(100):
        data = yaml.safe_load(rng.choice(sorted(RUBRICS.glob("*.yaml"))).read_text())
        for _ in range(rng.choice([1, 1, 2])):
            spoil_data(data, rng)
        text = yaml.safe_dump(data, allow_unicode=True, sort_keys=False)
        file = tmp_path / "rubric.yaml"
        file.write_bytes(
            (spoil_text(text, rng) if rng.random() < 0.3 else text).encode("utf-8", "surrogatepass")
        )
        rubric, _ = refusal(lambda f=file: load_rubric(str(f)))
        if rubric is not None:
            assert rubric.show.strip() and (rubric.questions or rubric.expect)
            assert all(0 < q.most - q.least <= 100 for q in rubric.questions.values())


@pytest.mark.parametrize("schema", [*SCHEMAS.values(), SuiteFile], ids=lambda schema: schema.__name__)
def test_every_number_of_a_recipe_is_bounded_on_both_sides(schema: type[RecipeModel]) -> None:
    for key, info in iter_fields(schema):
        text = repr(info)
        if info.annotation in (int, float) or "Annotated[int" in text or "Annotated[float" in text:
            assert ("Ge(" in text or "Gt(" in text) and ("Le(" in text or "Lt(" in text), key
