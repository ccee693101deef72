"""Loading rewards by name and path, and TRL's calling convention."""

import inspect
from pathlib import Path
from typing import get_type_hints

import pytest
from PIL import Image

from imagerl.rewards.base import (
    REWARDS,
    RewardSpec,
    as_trl_reward,
    check_reward,
    load_reward,
    load_rewards,
    load_spec,
)
from imagerl.rewards.boundary.guard import error_line
from imagerl.rewards.boundary.targets import ENTRY_KEYS, import_target
from imagerl.rl.config.rewards import RewardSpec as RecipeEntry
from imagerl.rl.types import ImageRLError, RewardOutput

FIVE_LINES = """
def redness(images, scale=1.0):
    pixels = [image.resize((1, 1)).getpixel((0, 0)) for image in images]
    return [scale * red / (red + green + blue + 1) for red, green, blue in pixels]
"""
RED, BLUE = Image.new("RGB", (8, 4), (254, 0, 0)), Image.new("RGB", (8, 4), (0, 0, 254))
SAMPLES = {
    "prompts": ["a", "b"],
    "completions": [[1], [2]],
    "completion_ids": [[1], [2]],
    "images": [RED, BLUE],
}


def write(folder: Path, text: str, name: str = "mine.py") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_users_function_from_a_file(tmp_path: Path) -> None:
    label, redness = load_reward(f"{write(tmp_path, FIVE_LINES)}:redness", scale=2.0)
    assert label == "redness"
    # 254 / 255 of the red picture and 0 of the blue one; the column it does not accept is left out.
    assert redness(**SAMPLES, target=["x", "y"]) == [2.0 * 254 / 255, 0.0]


def test_path_is_relative_to_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, FIVE_LINES)
    monkeypatch.chdir(tmp_path)
    spec = RewardSpec.from_mapping(
        {"import_path": "mine.py:redness", "name": None, "weight": 0.5, "scale": 3}
    )
    assert spec == RewardSpec("mine.py:redness", 0.5, {"scale": 3})
    assert spec.absolute().target == f"{tmp_path}/mine.py:redness"
    assert check_reward(spec) == "redness"


def test_users_class_module_and_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "GAIN = 3.0", "neighbour_of_mine.py")
    path = write(
        tmp_path,
        "from neighbour_of_mine import GAIN\n"
        "class Length:\n"
        "    def __init__(self, offset): self.offset = offset\n"
        "    def __call__(self, prompts, **kwargs): return [GAIN * len(p) + self.offset for p in prompts]\n",
    )
    label, length = load_reward(f"{path}:Length", offset=1)
    assert (label, length(**SAMPLES)) == ("Length", [4.0, 4.0])
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "def zero(prompts): return [0.0 for _ in prompts]", "module_of_mine.py")
    assert load_reward("module_of_mine:zero")[1](**SAMPLES) == [0.0, 0.0]


def test_repeated_rewards_get_distinct_labels(tmp_path: Path) -> None:
    spec = RewardSpec(f"{write(tmp_path, FIVE_LINES)}:redness")
    assert [reward.label for reward in load_rewards([spec, spec])] == ["redness", "redness_2"]


@pytest.mark.parametrize(
    ("target", "source", "settings", "message"),
    [
        ("ocrr", "", {}, "did you mean ocr?"),
        ("ocr", "", {"min_confidense": 0.1}, "did you mean min_confidence?"),
        ("absent.py:f", "", {}, "absent.py does not exist"),
        ("mine.py", FIVE_LINES, {}, "must read file.py:name"),
        ("mine.py:rednes", FIVE_LINES, {}, "did you mean redness?"),
        ("mine.py:redness", FIVE_LINES, {"scal": 1}, "did you mean scale?"),
        ("mine.py:f", "def f(:\n  pass", {}, "syntax error in"),
        (
            "mine.py:f",
            "import not_installed_anywhere",
            {},
            "No module named 'not_installed_anywhere' (mine.py:1)",
        ),
        ("mine.py:f", "1 / 0", {}, "ZeroDivisionError"),
        ("not_a_package.here:f", "", {}, "importing not_a_package.here failed"),
        ("mine.py:f", "f = 3", {}, "is not a function"),
        ("mine.py:F", "class F: pass", {}, "is not a function or a class with __call__"),
        ("mine.py:f", "def f(images, /): return []", {}, "must take keywords"),
        ("mine.py:f", "async def f(images): return []", {}, "is async"),
        (
            "mine.py:F",
            "class F:\n  def __init__(self, path): pass\n  def __call__(self, **k): pass",
            {},
            "needs the setting 'path'",
        ),
        (
            "mine.py:F",
            "class F:\n  def __init__(self): open('/nowhere')\n  def __call__(self, **k): pass",
            {},
            "could not be constructed: FileNotFoundError",
        ),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    source: str,
    settings: dict[str, object],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if source:
        write(tmp_path, source)
    with pytest.raises(ImageRLError) as caught:
        load_reward(target, **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_asking_for_a_column_that_the_prompt_set_lacks(tmp_path: Path) -> None:
    path = write(tmp_path, "def f(images, mood, strength): return [0.0 for _ in images]")
    spec = RewardSpec(f"{path}:f", settings={"strength": 2})
    assert check_reward(spec, ["mood"]) == "f"
    with pytest.raises(ImageRLError, match=r"asks for 'mood'.*it gets: prompts.*target"):
        check_reward(spec, ["target"])


RESEMBLING = ("weight_ink", "height", "rate", "weights", "names", "date", "gates", "pythons", "urls")


@pytest.mark.parametrize("name", RESEMBLING)
def test_settings_may_resemble_the_keys_of_an_entry(tmp_path: Path, name: str) -> None:
    """Whether a reward has a setting is asked of its signature; the recipe reader does not know it."""
    entry = {"import_path": f"{write(tmp_path, f'def f(images, {name}): return [{name}]')}:f", name: 2.0}
    assert RecipeEntry.model_validate(entry).kwargs == {name: 2.0}
    spec = RewardSpec.from_mapping(RecipeEntry.model_validate(entry).model_dump())
    assert load_spec(spec)[1](**SAMPLES) == [2.0]
    source = f"class F:\n  def __init__(self, {name}): pass\n  def __call__(self, images): pass"
    assert check_reward(RewardSpec(f"{write(tmp_path, source, 'c.py')}:F", settings={name: 1})) == "F"


@pytest.mark.parametrize("signature", ["images", "images, scale=1", "images, **settings"])
def test_a_misspelt_key_is_no_setting(tmp_path: Path, signature: str) -> None:
    spec = RewardSpec(f"{write(tmp_path, f'def f({signature}): pass')}:f", settings={"wieght": 0.3})
    with pytest.raises(ImageRLError, match=r"has no setting 'wieght'; did you mean weight\?"):
        check_reward(spec)
    with pytest.raises(ImageRLError, match=r"did you mean weight\?"):
        check_reward(RewardSpec("colours", settings={"wieght": 0.3}))
    assert set(ENTRY_KEYS) == set(RecipeEntry.model_fields) - {"function"}  # that one is given in Python


def test_a_file_is_imported_once(tmp_path: Path) -> None:
    text = f"open({str(tmp_path / 'count')!r}, 'a').write('x')\n{FIVE_LINES}"
    spec = RewardSpec(f"{write(tmp_path, text)}:redness")
    check_reward(spec, ["target"])
    assert load_spec(spec)[1](**SAMPLES)[1] == 0.0
    assert (tmp_path / "count").read_text() == "x"
    write(tmp_path, text + "# changed")
    check_reward(spec)
    assert (tmp_path / "count").read_text() == "xx"


@pytest.mark.parametrize("entry", [{"weight": 1.0}, {"name": "ocr", "import_path": "mine.py:f"}])
def test_entry_names_exactly_one_reward(entry: dict[str, object]) -> None:
    with pytest.raises(ImageRLError, match="exactly one of name, import_path and url"):
        RewardSpec.from_mapping(entry)


def test_our_rewards_in_trls_trainer() -> None:
    """The keywords, the list and the name that TRL 1.16's GRPOTrainer wants of a reward function."""

    def both_halves(*, prompts: list[str], images: list[Image.Image], **_: object) -> RewardOutput:
        return RewardOutput([float(len(p)) if p else None for p in prompts], {"part": [0.0] * len(images)})

    reward = as_trl_reward(both_halves)
    chat = [{"role": "user", "content": "four"}]
    values = reward(
        prompts=[chat, ""],
        completions=["", ""],
        completion_ids=[[1], [2]],
        images=[[RED], BLUE],
        target=["x", "y"],
        trainer_state=object(),
        log_extra=print,
        log_metric=print,
    )
    assert values == [4.0, None]
    assert reward.__name__ == "both_halves"
    assert as_trl_reward(load_reward("colours")[1]).__name__ == "colours"


def test_bare_trl_reward_works_here(tmp_path: Path) -> None:
    path = write(
        tmp_path, "def f(prompts, completions, **kwargs): return [len(c) for c in kwargs['completion_ids']]"
    )
    assert load_reward(f"{path}:f")[1](**SAMPLES) == [1, 1]


@pytest.mark.parametrize(
    ("target", "settings", "message"),
    [
        ("ocr", {"mode": 5}, "reward 'ocr': \"mode\" cannot be 5; Allowed: full, recognise"),
        ("ocr", {"mode": "ful"}, 'did you mean "full"?'),
        ("ocr", {"threads": "many"}, '"threads" should be an integer, not "many"'),
        ("ocr", {"threads": 10**9}, '"threads" should be less than or equal to 1024, not 1000000000'),
        ("edit", {"min_confidence": True}, '"min_confidence" should be a number, not true'),
        ("clip", {"model": 3}, '"model" should be a string'),
        (
            "clip",
            {"model": "tiny_clip", "batch_size": 0},
            '"batch_size" should be greater than or equal to 1, not 0',
        ),
        (
            "composition",
            {"detector": "tiny_world", "threshold": 7.0},
            '"threshold" should be less than or equal to 1',
        ),
        (
            "judge",
            {"endpoint": "http://h:1/v1", "model": "m", "price": {"input": "a"}},
            '"price" should be a number',
        ),
        ("edit_consistency", {"factors": "kept"}, '"factors" should be a list, not "kept"'),
        ("http://h:1/clip", {"batch": 2.5}, "reward 'clip': \"batch\" should be an integer, not 2.5"),
    ],
)
def test_a_setting_of_ours_of_the_wrong_type_is_refused(
    target: str, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ImageRLError) as caught:
        check_reward(RewardSpec(target, settings=settings))
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", REWARDS)
def test_all_settings_of_ours_have_types_that_can_be_checked(name: str) -> None:
    found = import_target(REWARDS[name])
    if "__init__" in vars(found):
        hints = get_type_hints(found.__init__, include_extras=True)
        assert set(inspect.signature(found).parameters) <= set(hints)


def test_the_place_of_an_error_is_in_the_users_file(tmp_path: Path) -> None:
    code = "import json, os\n\n\ndef f(how):\n    return os.environ['ABSENT'] if how else json.loads('{')\n"
    function = import_target(f"{write(tmp_path, code)}:f")
    for how, error in ((True, KeyError), (False, ValueError)):  # raised in <frozen os> and in json/decoder.py
        with pytest.raises(error) as caught:
            function(how)
        assert error_line(caught.value).endswith("(mine.py:5)")
