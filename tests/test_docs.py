"""What README.md and docs/ say can be done: tables are those of the schemas, links lead somewhere, command lines
parse, and the rewards shown score pictures. Nothing is trained."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import typer.main
from PIL import Image

from imagerl.rewards.base import LoadedReward, load_reward
from imagerl.rewards.workers.scoring import call_reward
from imagerl.rl.algorithms.advantages import group_advantages
from imagerl.rl.commands.cli import app
from imagerl.rl.compare.plan import split_arguments
from imagerl.rl.config.monitors import MonitorsConfig
from imagerl.rl.config.recipe import RecipeModel, load_yaml_recipe
from imagerl.rl.config.sft import SFTRecipe
from imagerl.rl.config.train import Recipe, load_recipe
from imagerl.rl.rollout.picture_stats import group_stats, mean_of_groups
from imagerl.rl.run.monitors import Watch
from imagerl.rl.training.flow_half import PER_ACTION as FLOW_PER_ACTION
from imagerl.rl.training.step_metrics import OTHER_SUMS, PER_ACTION, update_metrics
from imagerl.rl.types import Prompt, RewardRequest, RolloutGroup

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)|<img\b[^>]*\bsrc=\"([^\"]+)\"")


def blocks(page: Path, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


def commands(script: str, program: str) -> Iterator[list[str]]:
    """Calls of a program in a shell script, as words."""
    whole = ""
    for line in script.replace("\\\n", " ").splitlines():
        whole += line + "\n"
        try:
            words = shlex.split(whole, comments=True)
        except ValueError:  # a quotation that goes on in the next line
            continue
        whole = ""
        if words[:1] == [program]:
            yield words[1:]


def all_commands(program: str) -> list[list[str]]:
    return [words for page in PAGES for script in blocks(page, "bash") for words in commands(script, program)]


def check_command(words: Sequence[str]) -> None:
    """Parses an `imagerl` call as it would be, recipe and overrides included, without running it.

    Raises ImageRLError, or one of typer's own."""
    command, rest = typer.main.get_command(app), list(words)
    context = command.make_context("imagerl", list(rest))
    while hasattr(command, "resolve_command") and rest:  # `imagerl` itself, or a group such as `reward`
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, list(rest), parent=context)
    values = context.params
    if words[0] == "compare":
        recipes, overrides = split_arguments(values["arguments"])
        for recipe in recipes:
            found = sorted(ROOT.glob(recipe)) or [recipe]  # the shell expands stars
            for path in found:
                load_recipe(path, overrides)
    if "recipe" in values:
        schema: type[RecipeModel] = SFTRecipe if words[0] == "sft" else Recipe
        load_yaml_recipe(schema, values["recipe"], values["overrides"] or [])


def example_rewards() -> list[tuple[str, str]]:
    """(file name, source) of the Python blocks that begin with the name of their file."""
    bodies = [body for page in PAGES for body in blocks(page, "python")]
    return [(found[1], body) for body in bodies if (found := re.match(r"# (\w+\.py)\n", body))]


def test_recipe_keys_are_those_of_the_schemas() -> None:
    maker = runpy.run_path(str(ROOT / "docs" / "make_recipes.py"))
    text = maker["PAGE"].read_text(encoding="utf-8")
    assert text == maker["page"](text), "run: make docs"
    assert text.count("| `run.steps` | required | integer ≥ 1, ≤ 10,000,000 |") == 2  # of train and of sft
    assert "| `optim.betas` | `[0.9, 0.999]` | list of 2 numbers |" in text
    assert maker["page"](text.replace("| required |", "| optional |")) == text


def test_metric_keys_are_those_of_the_trainer() -> None:
    text = (ROOT / "docs" / "run-folder.md").read_text(encoding="utf-8")
    described = set(re.findall(r"`((?:advantages|policy|kl|rollout)/\w+)`", text))
    names = (*PER_ACTION, *OTHER_SUMS)
    logged = update_metrics([dict.fromkeys(names, 1.0)], on_policy=True).keys()
    logged |= {f"advantages/{name}" for name in group_advantages(torch.tensor([0.0, 1.0]), 2).metrics}
    logged |= {"kl/coef"} | {
        f"rollout/{name}" for name in ("age", "images", "resampled_groups")
    }  # of the trainer
    assert {key for key in logged if "/" in key} == described
    described = set(re.findall(r"`((?:pictures|diversity|alarm)/\w+|monitor/<gold>/\w+)`", text))
    sizes = np.zeros((2, 4, 4, 3), np.uint8), torch.zeros(2, 4)
    group = RolloutGroup(Prompt(0, ""), sizes[1], sizes[1], sizes[1].bool(), sizes[0])
    watch = Watch(MonitorsConfig(), ["<gold>"])
    logged = mean_of_groups([group_stats(group)])
    logged |= watch.after_step(1, logged)[0]
    for step in range(3):
        rows = [{"index": i, "<gold>": float(i * step), "total": float(step)} for i in range(3)]
        logged |= watch.after_evaluation(step, rows)[0]
    assert logged.keys() == described
    decoder = {"updates", "loss", "lr", "logprob_diff_mean", "logprob_diff_max", "grad_norm", "grad_part"}
    described = set(re.findall(r"`flow/(\w+)`", text))
    assert decoder | {"old_decay"} | set(FLOW_PER_ACTION.values()) == described


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [a or b for a, b in LINK.findall(page.read_text(encoding="utf-8"))]
    local = [t.partition("#")[0] for t in targets if not re.match(r"https?:|mailto:|#|data:", t)]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("words", all_commands("imagerl"), ids=lambda words: " ".join(words)[:70])
def test_commands_parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check_command(words)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("train recipes/no_such.yaml", "no file"),
        ("train recipes/tiny_ocr_grpo.yaml run.step=5", "run.steps"),
        ("sft recipes/tiny_ocr_grpo.yaml", "kind"),
        ("eval --modle tiny", "--modle"),
        ("trian recipes/tiny_ocr_grpo.yaml", "trian"),
        ("export runs/x", "target"),
        ("reward chekc my.py:f", "chekc"),
        ("compare recipes/compare/grpo.yaml --budget images=9", "seeds"),
        ("compare recipes/compare/grpo.yaml --seeds 1 --budget images=9 optim.lrr=1", "optim.lr"),
    ],
)
def test_mistaken_commands_do_not_parse(line: str, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(Exception) as caught:  # noqa: PT011 typer's own errors have no public base class
        check_command(line.split())
    assert complaint in f"{caught.value!r} {getattr(caught.value, 'message', '')} {vars(caught.value)}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {word for words in all_commands("make") for word in words if "=" not in word}
    assert "train" in named
    assert named <= targets


@pytest.mark.parametrize(("name", "source"), example_rewards(), ids=lambda text: text.partition("\n")[0])
def test_example_rewards_score_pictures(name: str, source: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(source)
    defined = re.findall(r"^(?:def|class) ([A-Za-z]\w*)", source, re.MULTILINE)
    pictures = [np.full((32, 64, 3), colour, dtype=np.uint8) for colour in ((255, 0, 0), (255, 255, 255))]
    columns = {"target": ["CAT", "472"], "ink": ["red", "blue"], "background": ["white", "pink"]}
    request = RewardRequest(
        ["a cat", "a number"], [[1, 2], [3, 4]], np.stack(pictures), columns, group_size=1
    )
    assert defined
    for function in defined:
        label, reward = load_reward(f"{file}:{function}")
        reply = call_reward(LoadedReward(label, reward), request)
        assert reply.reason is None and reply.rewards[0] is not None
        assert all(value is None or np.isfinite(value) for value in reply.rewards)


def test_reward_of_the_readme(tmp_path: Path) -> None:
    (source,) = blocks(ROOT / "README.md", "python")
    assert len(source.splitlines()) <= 10
    (tmp_path / "my_reward.py").write_text(source)
    label, redness = load_reward(f"{tmp_path}/my_reward.py:redness")
    images = [Image.new("RGB", (4, 2), colour) for colour in ("red", "white")]
    assert label == "redness"
    assert redness(prompts=["", ""], completions=[[1], [2]], images=images, target=["A", "B"]) == [1.0, 1 / 3]


def test_make_wants_the_python_of_the_locked_packages(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "requirements.lock", "requirements-last.lock", "requirements-clip.lock"):
        (tmp_path / name).touch()
    other = tmp_path / "python3.9"
    other.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit\nexit 1\n')
    other.chmod(0o755)
    ended = subprocess.run(
        ["make", "install", f"PYTHON={other}"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode != 0
    assert "is Python 3.9.2; the locked packages are for Python 3.11" in ended.stdout
    assert not (tmp_path / ".venv").exists()


def test_one_step_names_what_exists() -> None:
    """Each function that docs/one-step.md sends a reader to stands in the file that it names."""
    page = (ROOT / "docs" / "one-step.md").read_text(encoding="utf-8")
    rows = re.findall(r"\]\(\.\./([\w/]+\.py)\)((?:,? `[\w.]+`)+)", page)
    assert len(rows) > 15
    for path, names in rows:
        source = (ROOT / path).read_text(encoding="utf-8")
        for name in re.findall(r"`([\w.]+)`", names):
            defined = re.search(rf"^\s*(def|class) {name.split('.')[-1]}\b", source, re.MULTILINE)
            assert defined, f"{path} has no {name}"
