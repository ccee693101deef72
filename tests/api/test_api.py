"""The Python API: what one would guess works, twice in one process, and leaves the process as it was."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import imagerl
from imagerl.api import checking
from imagerl.api.cards import Plot
from imagerl.rl.run import report
from imagerl.rl.run.charts import Chart, Series
from tests.micro import micro_folder
from tests.small_run import write_recipe


def low_tokens(completions: list[list[int]], **_: Any) -> list[float]:
    return [sum(token < 8 for token in tokens) / len(tokens) for tokens in completions]


class Brightness:
    """A reward that is an object."""

    def __init__(self, most: float) -> None:
        self.most = most

    def __call__(self, images: list[Any]) -> list[float]:
        return [min(self.most, float(np.asarray(image).mean() / 255)) for image in images]


@pytest.fixture(scope="module", autouse=True)
def no_report() -> Iterator[None]:
    """Runs draw no charts for their page: cards draw their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "render", lambda chart: "")
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    micro_folder(folder / "model")
    write_recipe(folder)
    return folder


@pytest.fixture(scope="module")
def run(place: Path) -> imagerl.TrainingResult:
    """Two steps by a function and by an object."""
    recipe = imagerl.load_recipe(place / "recipe.yaml", run={"steps": 2, "output_dir": place / "first"})
    return imagerl.train(
        recipe, rewards=[low_tokens, {"name": "light", "function": Brightness(0.9), "weight": 0.1}]
    )


# ---- names -------------------------------------------------------------------------------------------------


def test_every_name_is_there_and_none_is_imported_before_its_use() -> None:
    heavy = "('torch', 'numpy', 'pydantic', 'yaml', 'typer')"
    code = f"import imagerl, sys; print([m for m in sys.modules if m in {heavy}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert sorted(imagerl.__all__) == sorted(imagerl._PLACE_OF)
    for name in imagerl.__all__:
        assert getattr(imagerl, name).__name__ == name
    assert set(imagerl.__all__) <= set(dir(imagerl))
    with pytest.raises(AttributeError, match=r"has no attribute 'trian'; it has: .*train"):
        _ = imagerl.trian


# ---- recipes -----------------------------------------------------------------------------------------------


def test_recipes_are_changed_by_values_or_words() -> None:
    words = imagerl.load_recipe("tiny_ocr_grpo", ["run.steps=5", "optim.lr=1e-4", "gold=[]"])
    values = imagerl.load_recipe("tiny_ocr_grpo", {"run.steps": 5}, optim={"lr": 1e-4}, gold=[])
    assert (
        words == values == imagerl.load_recipe(imagerl.load_recipe("tiny_ocr_grpo", gold=[]), words_of(words))
    )
    assert words.run.seed == imagerl.load_recipe("tiny_ocr_grpo").run.seed  # what is not mentioned stays
    assert imagerl.load_recipe("tiny_sft").kind == "sft"
    assert "tiny_ocr_grpo" in imagerl.list_recipes()


def words_of(recipe: Any) -> list[str]:
    return [f"run.steps={recipe.run.steps}", f"optim.lr={recipe.optim.lr}"]


def test_rewards_of_a_recipe_may_be_functions(place: Path) -> None:
    recipe = imagerl.load_recipe(
        place / "recipe.yaml",
        rewards=["colours", "my.py:f", low_tokens, {"function": Brightness(1), "weight": 2}],
    )
    assert [spec.label for spec in recipe.rewards.functions] == ["colours", "f", "low_tokens", "Brightness"]
    assert recipe.rewards.workers == 0  # of the file
    named = imagerl.load_recipe(place / "recipe.yaml", rewards={"mine": lambda images: [0.0]})
    assert [spec.label for spec in named.rewards.functions] == ["mine"]
    workers = imagerl.load_recipe(place / "recipe.yaml", rewards={"workers": 3}).rewards
    assert workers.workers == 3 and workers.functions[0].label == "low_tokens"


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        (
            lambda p: imagerl.load_recipe(p, "run.steps=5"),
            'overrides should be a list, as in ["run.steps=5"]',
        ),
        (lambda p: imagerl.load_recipe(p, [5]), 'an override should read "run.steps=5", not 5'),
        (
            lambda p: imagerl.load_recipe(p, run={"stepz": 5}),
            'unknown key "run.stepz"; did you mean "run.steps"?',
        ),
        (lambda p: imagerl.load_recipe(p, {"run.steps": "5"}), 'should be an integer, not "5"'),
        (lambda p: imagerl.load_recipe("tiny_ocr"), 'did you mean "tiny_ocr_grpo"?'),
        (lambda p: imagerl.load_recipe(p, rewards=[3]), "3 is no reward; give a function"),
        (lambda p: imagerl.load_recipe(p, rewards=[lambda images: [1.0]]), "a lambda has no name"),
        (lambda p: imagerl.train(p, resume=True, overwrite=True), "ask for only one"),
        (lambda p: imagerl.load_run(p.parent / "model"), "holds no run"),
        (lambda p: imagerl.compare([imagerl.load_recipe(p)], budget="images=8"), "name it by import_path"),
        (lambda p: imagerl.sample([], p.parent / "model"), "nothing to draw"),
        (lambda p: imagerl.evaluate("nowhere"), "model 'nowhere' is no folder"),
        (lambda p: imagerl.export(p.parent / "first", p.parent / "x", dtype="fp8"), "fp32 or bf16"),
    ],
)
def test_mistakes_are_one_line(place: Path, mistake: Callable[[Path], object], told: str) -> None:
    with pytest.raises(imagerl.ImageRLError) as caught:
        mistake(place / "recipe.yaml")
    assert told in str(caught.value) and "\n" not in str(caught.value)


# ---- training ----------------------------------------------------------------------------------------------


def settings() -> dict[str, Any]:
    """What a caller has set and wants to find again."""
    from accelerate.state import AcceleratorState, PartialState

    return {
        "threads": torch.get_num_threads(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "random": (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "environment": dict(os.environ),
        "accelerate": (dict(PartialState._shared_state), dict(AcceleratorState._shared_state)),
        "alive": {thread.name for thread in threading.enumerate()},
        "folder": os.getcwd(),
    }


def test_a_run_leaves_the_process_as_it_was_and_repeats_itself(
    place: Path, run: imagerl.TrainingResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "7")  # would change what a run computes
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # the recipe says 1
    try:
        before = settings()
        again = imagerl.train(
            place / "recipe.yaml",
            ["run.steps=2", f"run.output_dir={place / 'second'}"],
            rewards=[low_tokens, {"name": "light", "function": Brightness(0.9), "weight": 0.1}],
        )
        assert settings() == before
    finally:
        torch.set_num_threads(threads)
    ours = ("reward/mean", "reward/light/mean", "grad_norm")
    rows, repeated = ([[row.get(key) for key in ours] for row in one.metrics] for one in (run, again))
    assert len(rows) == 3 and rows == repeated


def test_functions_are_written_down_and_asked_for_again(place: Path, run: imagerl.TrainingResult) -> None:
    stored = yaml.safe_load((run.folder / "recipe.yaml").read_text())["rewards"]["functions"]
    assert stored[0]["name"] == "low_tokens" and stored[0]["function"].startswith(
        "def low_tokens(completions"
    )
    assert stored[1]["name"] == "light" and "return [min(self.most" in stored[1]["function"]
    with pytest.raises(
        imagerl.ImageRLError, match=r"'low_tokens' was a function given in Python.*give it again"
    ):
        imagerl.train(run.folder / "recipe.yaml", ["run.steps=3"], resume=True)
    light = {"name": "light", "function": Brightness(0.9), "weight": 0.1}
    other = [{"name": "low_tokens", "function": lambda completions: [0.0] * len(completions)}, light]
    with pytest.raises(imagerl.ImageRLError, match=r"was started with another rewards\.functions"):
        imagerl.train(run.recipe, rewards=other, resume=True)
    command = json.loads((run.folder / "environment.json").read_text())["command"]
    assert command == ["imagerl", "train", f"{run.folder}/recipe.yaml", "run.output_dir=NEW_FOLDER"]


def test_a_run_goes_on_with_its_functions(place: Path) -> None:
    fixed = {"run.output_dir": str(place / "longer"), "checkpoint.every": 1}
    imagerl.train(place / "recipe.yaml", {**fixed, "run.steps": 1}, rewards=low_tokens)
    longer = imagerl.train(place / "recipe.yaml", {**fixed, "run.steps": 2}, rewards=low_tokens, resume=True)
    assert [record["step"] for record in longer.metrics] == [0, 1, 2]


def test_what_a_run_says(run: imagerl.TrainingResult) -> None:
    assert run.finished and len(run.comparison) >= 2
    assert repr(run).startswith(f"{run.folder}: finished, step 2\n  held-out total: ")
    assert run.policy().sampling.flow_steps == 1
    page = run._repr_html_()
    assert "finished, step 2 of 2" in page and page.count("<img") >= 4
    with pytest.raises(imagerl.ImageRLError, match='no metric "kl/k"; it has: kl/k'):
        run.plot("kl/k")
    assert [chart.title for chart in run.plot("reward/mean", "lr").charts] == ["reward/mean", "lr"]
    assert "step 2" in repr(run.plot("reward/mean"))
    assert len(run.plot().charts) > 5


@pytest.mark.slow
def test_functions_reach_workers_and_one_that_cannot_is_told(place: Path) -> None:
    locked = threading.Lock()

    def closed(images: list[Any]) -> list[float]:
        with locked:
            return [0.0] * len(images)

    fixed = ["run.steps=1", "rewards.workers=1", f"run.output_dir={place / 'workers'}"]
    before = {thread.name for thread in threading.enumerate()}
    run = imagerl.train(place / "recipe.yaml", fixed, rewards={"mine": lambda images: [0.25] * len(images)})
    assert run.metrics[1]["reward/mine/mean"] == 0.25
    with pytest.raises(imagerl.ImageRLError, match=r"'closed' cannot be sent .* rewards\.workers=0"):
        imagerl.train(place / "recipe.yaml", fixed, rewards=closed, overwrite=True)
    assert {thread.name for thread in threading.enumerate()} == before


# ---- the rest ----------------------------------------------------------------------------------------------


def test_evaluation_by_a_function_and_against_another(
    place: Path, run: imagerl.TrainingResult, tmp_path: Path
) -> None:
    before = imagerl.evaluate(place / "model", n=6, rewards=low_tokens, gold=[])
    after = imagerl.evaluate(run, n=6, rewards=low_tokens, gold=[], against=before)
    values = [row["low_tokens"] for row in before.per_prompt]
    assert before.metrics["low_tokens"].mean == pytest.approx(np.mean(values)) and len(values) == 6
    gap = after.metrics["low_tokens"].mean - before.metrics["low_tokens"].mean
    assert after.against["low_tokens"]["difference"]["mean"] == pytest.approx(gap)
    assert "at the same prompts and random numbers" in repr(after) and f"against {place / 'model'}" in repr(
        after
    )
    stored = imagerl.evaluate(
        place / "model", n=6, rewards=low_tokens, gold=[], against=str(before.save(tmp_path / "b.json"))
    )
    assert stored.against["low_tokens"]["difference"]["mean"] == 0
    assert "Against" in after._repr_html_() and len(after.images) == 6
    with pytest.raises(imagerl.ImageRLError, match="another suite_sha256"):
        imagerl.evaluate(
            place / "model", n=6, rewards={"low_tokens": lambda images: [0.0]}, gold=[], against=before
        )


def test_a_function_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "_shipped", lambda but: [])

    def blank(images: list[Any]) -> list[float]:
        return [0.5] * len(images)

    result = imagerl.check_reward(blank, prompts=2)
    assert not result.passed and "there is nothing to learn from" in repr(result)
    assert "fails" in result._repr_html_() and result._repr_html_().count("<img") == 12
    with pytest.raises(imagerl.ImageRLError, match="'blank' fails 'values'"):
        result.require()


def test_samples_and_exports(place: Path, run: imagerl.TrainingResult, tmp_path: Path) -> None:
    drawn = imagerl.sample(["a red word", "a blue word"], run, n=2, out=tmp_path / "drawn")
    assert repr(drawn) == "4 pictures of 64x32 pixels, of 2 prompts" and drawn._repr_png_().startswith(
        b"\x89PNG"
    )
    assert len(list((tmp_path / "drawn").iterdir())) == 5
    exported = imagerl.export(run, tmp_path / "model")
    assert "proved equal in tokens and pixels" in repr(exported)
    same = imagerl.sample(["a red word", "a blue word"], exported, n=2)
    assert (same.pictures == drawn.pictures).all()
    policy = imagerl.load_policy(exported)
    rollout = imagerl.RolloutEngine(policy, imagerl.SamplingParams(flow_steps=1), seed=0)
    ((group,),) = rollout.generate([imagerl.Prompt(0, "a red word")], 2, "mine")
    assert group.images.shape == (2, 32, 64, 3)


def test_charts_stand_alone() -> None:
    """Images, not markup: a notebook that is not trusted shows them, and nothing reaches outside the card."""
    page = Plot([Chart("A & B", "a note", [Series("x", [1, 2], [0.1, 0.2])])])._repr_html_()
    assert "<script" not in page and "A &amp; B" in page
    assert re.search(r"^ *(:root|body|html) \{", page, re.MULTILINE) is None
    (uri,) = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    svg = ET.fromstring(base64.b64decode(uri))
    assert svg.tag == "{http://www.w3.org/2000/svg}svg" and "--s1: #2a62c8" in ET.tostring(svg, "unicode")
