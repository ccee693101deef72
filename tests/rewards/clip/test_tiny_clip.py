"""The small CLIP that ships: what it is, and what it tells apart."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from imagerl.rewards.base import LoadedReward, load_reward
from imagerl.rewards.check.checks import check
from imagerl.rewards.clip.models import load_clip
from imagerl.rl.config.recipe import load_yaml_recipe
from imagerl.rl.data.tiny.pictures import check_edits, check_pictures
from tests.command import exit_code
from tests.rewards.clip_folders import need_open_clip
from tools.tiny.clip import PARTS, measure
from tools.tiny.config import ClipRecipe

FOLDER = Path(str(files("rewards"))) / "tiny_clip"
RECIPE = Path(__file__).parents[3] / "tools" / "tiny" / "tiny_clip.yaml"


def test_it_is_small_and_its_recipe_is_the_one_that_ships() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 10e6
    record = json.loads((FOLDER / "training.json").read_text())
    ours, theirs = load_yaml_recipe(ClipRecipe, RECIPE).model_dump(mode="json"), record["recipe"]
    ours["run"]["output_dir"] = theirs["run"]["output_dir"]
    assert ours == theirs
    assert record["minutes"]["processor"] <= 10


def test_open_clip_itself_loads_it() -> None:
    open_clip = need_open_clip()
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{FOLDER}")
    picture = check_pictures(2)[0]
    wanted = picture.prompt.text
    captions = [wanted, wanted.replace(picture.prompt.columns["target"], "WRONG"), "a sign"]
    with torch.no_grad():
        pixels = preprocess(picture.image)[None]
        tokens = open_clip.get_tokenizer(f"local-dir:{FOLDER}")(captions)
        logits, _ = model.eval().get_logits(pixels, tokens)
    assert logits[0].argmax() == 0


def test_it_measures_as_its_record_says() -> None:
    """On fewer pictures, so within the record's interval and a little more."""
    need_open_clip()
    record = json.loads((FOLDER / "training.json").read_text())["measured"]
    model = load_clip("tiny_clip")
    told = measure(model.encode_pictures, model.encode_captions, 192, seed=1)
    for name, interval in told.items():
        assert interval.low <= record[name]["high"] and interval.high >= record[name]["low"], name
    assert told["caption_of_64"].mean > 0.85
    assert min(told[f"picture/{part}"].mean for part in PARTS) > 0.65


@pytest.mark.parametrize(
    ("target", "settings", "make"),
    [
        ("clip", {"model": "tiny_clip"}, check_pictures),
        ("clip_direction", {"model": "tiny_clip"}, check_edits),
        ("composition", {"detector": "tiny_world"}, check_pictures),
    ],
)
def test_the_rewards_pass_the_check(target: str, settings: dict[str, Any], make: Any) -> None:
    if target != "composition":
        need_open_clip()
    report = check(LoadedReward(*load_reward(target, **settings)), make(4))
    assert not report.failed


@pytest.mark.parametrize("suite", ["clip", "composition"])
def test_its_suites_have_a_ceiling(suite: str, capsys: pytest.CaptureFixture[str]) -> None:
    if suite == "clip":
        need_open_clip()
    assert exit_code(["eval", "--suite", suite, "--ceiling", "--n", "12"]) == 0
    reward = next(line for line in capsys.readouterr().out.splitlines() if line.split()[0] == suite)
    assert float(reward.split()[1]) > (0.5 if suite == "clip" else 0.999)
