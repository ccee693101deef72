"""The command line: what the user can mend is one line on stderr, and nothing is lost over it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
from PIL import Image

from imagerl.api.training import closing_line
from imagerl.rl.evaluation.stats import Interval, compare
from tests.command import exit_code, imagerl
from tests.micro import micro_folder
from tests.small_run import REWARD_FILE, write_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    micro_folder(folder / "model")
    (folder / "empty").mkdir()
    write_recipe(folder)
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


PROMPTS = '{"prompt": "a red word"}\n{"caption": "a blue word"}\n'
MISTAKES: dict[str, tuple[list[str], str]] = {
    "misspelt key": (["run.stepz=3"], 'unknown key "run.stepz"; did you mean "run.steps"?'),
    "wrong type": (["run.steps=many"], '"run.steps" should be an integer, not "many"'),
    "unknown value": (["engine.name=jax"], "Allowed: torch, deepspeed"),
    "truncated sampling": (["rollout.top_k=5"], "top_k and top_p must be null"),
    "no override": (["run.steps"], "write dotted.key=value"),
    "impossible": (["engine.zero_stage=2"], "engine.zero_stage needs engine.name: deepspeed"),
    "no such model": (["model.path={place}/nowhere"], "model '{place}/nowhere' is no folder"),
    "no model in there": (["model.path={place}/empty"], "{place}/empty has no config.json"),
    "no prompt file": (["data.train={{path: {place}/none.jsonl}}"], 'no file "{place}/none.jsonl"'),
    "bad row": (["data.train={{path: {place}/prompts.jsonl}}"], 'prompts.jsonl, line 2: no column "prompt"'),
    "too few prompts": (["data.train.size=1", "rollout.prompts_per_step=2"], "is more than data.train.size"),
    "overlap": (["data.heldout={{name: tiny_world, split: train, size: 4}}"], "are also in data.train"),
    "no reward file": (["rewards=[{{import_path: '{place}/none.py:f'}}]"], "none.py does not exist"),
    "no such function": (
        ["rewards=[{{import_path: '{place}/reward.py:brightnes'}}]"],
        "has no brightnes; did you mean brightness?",
    ),
    "no such reward": (["rewards=[{{name: orc}}]"], "no reward is named 'orc'; did you mean ocr?"),
    "misspelt key of a reward": (["rewards.0.wieght=1"], "has no setting 'wieght'; did you mean weight?"),
    "bad import path": (["rewards=[{{import_path: reward}}]"], "should look like file.py:function"),
    "no such column": (["rewards=[{{import_path: '{place}/needs.py:needs'}}]"], "asks for 'author'"),
    "bad adapters": (["model.lora={{target_modules: [nothing]}}"], "model.lora: "),
    "no GPU": (["engine.device=cuda"], "engine.device is cuda but torch sees no GPU"),
    "both flags": (["--resume", "--overwrite"], "give only one"),
    "run folder is a file": (["run.output_dir={place}/recipe.yaml/run"], "{place}/recipe.yaml"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(place: Path, capsys: pytest.CaptureFixture[str], mistake: str) -> None:
    import torch

    if mistake == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    (place / "prompts.jsonl").write_text(PROMPTS)
    (place / "needs.py").write_text("def needs(images, author):\n    return [0.0] * len(images)\n")
    changes, message = MISTAKES[mistake]
    before = snapshot(place)
    ended = imagerl(
        capsys, "train", str(place / "recipe.yaml"), *(change.format(place=place) for change in changes)
    )
    assert ended.code == 1
    assert ended.err.startswith("imagerl: ") and ended.err.count("\n") == 1
    assert message.format(place=place) in ended.err
    assert ended.out == "" and snapshot(place) == before  # no run folder was begun


@pytest.mark.parametrize("own", ["ACTIVE", None])
def test_threads_that_wait_leave_their_core(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, own: str | None
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", own or "")
    if own is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    imagerl(capsys, "--version")
    assert os.environ["OMP_WAIT_POLICY"] == (own or "PASSIVE")


DEEDS = {
    "raise ValueError('too red')": "ValueError: too red (dead.py:2)",
    "raise SystemExit": "SystemExit (dead.py:2)",
    "raise KeyboardInterrupt": "KeyboardInterrupt (dead.py:2)",
    "return {'rewards': [10**400] * 4, 'reason': 7}": "7",
    "return [None] * len(images)": "returned None",
}


@pytest.mark.parametrize("deed", DEEDS)
def test_a_reward_that_cannot_work_ends_the_run_before_its_first_evaluation(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, deed: str
) -> None:
    (tmp_path / "dead.py").write_text(f"def dead(images):\n    {deed}\n")
    rewards = f"rewards.functions=[{{import_path: '{tmp_path}/dead.py:dead'}}]"
    ended = imagerl(capsys, "train", str(place / "recipe.yaml"), rewards, f"run.output_dir={tmp_path}/run")
    assert ended.code == 1 and ended.out == ""  # no "held-out after step 0"
    (line,) = ended.err.splitlines()
    assert line == (
        f"imagerl: reward 'dead' has no value for 4 of 4 pictures that were tried first: {DEEDS[deed]}; mend it "
        "(imagerl reward check shows more)"
    )
    assert not (tmp_path / "run" / "eval").exists()


SPOILER = """
import os, random, signal, sys, warnings
from low import low_tokens
import numpy, torch

def spoiler(completions):
    os.chdir("/")
    os.environ["OMP_NUM_THREADS"] = "7"
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)
    torch.manual_seed(1), numpy.random.seed(1), random.seed(1)
    warnings.simplefilter("error")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout = None
    return {
        "rewards": low_tokens(completions),
        "breakdown": {"a\\ud800": [10**400] * len(completions)},
        "reason": 7,
    }

torch.set_default_dtype(torch.float64)
os.chdir("/")
"""


def test_what_a_reward_leaves_changed_changes_no_weight(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the training process, with a relative output folder."""
    (tmp_path / "low.py").write_text(REWARD_FILE)
    (tmp_path / "spoiler.py").write_text(SPOILER)
    monkeypatch.chdir(tmp_path)
    weights = []
    for name in ("low_tokens", "spoiler"):
        rewards = (
            f"rewards.functions=[{{import_path: '{'low' if name == 'low_tokens' else name}.py:{name}'}}]"
        )
        settings = [rewards, f"run.output_dir={name}", "run.steps=2"]
        ended = imagerl(capsys, "train", str(place / "recipe.yaml"), *settings)
        assert ended.code == 0 and "report: " in ended.out
        weights.append((tmp_path / name / "checkpoints" / "step_000002" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    metrics = (tmp_path / "spoiler" / "metrics.jsonl").read_text()
    assert "reward/spoiler/a\N{REPLACEMENT CHARACTER}/mean" in metrics


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], 'no file "nowhere.yaml"'),
        (["sft", "{place}/recipe.yaml"], 'a recipe of kind "train"'),
        (["sample", "--model", "{place}/none", "a word"], "is no folder"),
        (["sample", "--model", "{place}/model", " "], "a prompt is empty"),
        (["sample", "--model", "{place}/model", "--out", "{place}/recipe.yaml", "a word"], "recipe.yaml"),
        (["eval", "--suite", "spelling"], "no suite is named 'spelling'"),
        (["export", "{place}/none", "{place}/out"], "none"),
        (["export", "{place}", "{place}/out"], "has no complete checkpoint"),
        (["export", "{place}/step_000002", "{place}/out"], "there is no checkpoint"),
        (["export", "{place}", "{place}/out", "--dtype", "int4"], "dtype must be fp32 or bf16"),
    ],
)
def test_mistakes_of_other_commands(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = snapshot(place)
    ended = imagerl(capsys, *(argument.format(place=place) for argument in arguments))
    assert ended.code == 1 and message in ended.err
    assert ended.err.startswith("imagerl: ") and ended.err.count("\n") == 1
    assert snapshot(place) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "trian"),
        (["train"], "RECIPE"),
        (["train", "recipe.yaml", "--reset"], "--reset"),
        (["sample", "a word", "--count", "none"], "--count"),
        (["sample", "a word", "--temperature", "0"], "0.001"),
        (["sample", "a word", "--temperature", "nan"], "--temperature"),
        (["sample", "a word", "--guidance", "1e300"], "100"),
        (["sample", "a word", "--seed", "-1"], "--seed"),
        (["compare", "a.yaml", "--budget", "images=9", "--seeds", "1000000000"], "1000"),
    ],
)
def test_usage_errors_are_one_line_too(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    ended = imagerl(capsys, *arguments)
    assert ended.code == 2 and message.lower() in ended.err.lower()
    assert ended.err.startswith("imagerl: ") and ended.err.count("\n") == 1 and ended.out == ""


@pytest.mark.parametrize("command", [(), ("train",), ("reward", "check"), ("recipes", "copy")])
def test_help_has_a_short_name(capsys: pytest.CaptureFixture[str], command: tuple[str, ...]) -> None:
    short, long = imagerl(capsys, *command, "-h"), imagerl(capsys, *command, "--help")
    assert short.code == long.code == 0
    assert short.out == long.out and "Usage: imagerl" in short.out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    ended = imagerl(capsys, "--version")
    assert (ended.code, ended.out, ended.err) == (0, f"imagerl {version('imagerl')}\n", "")


def run_module(code: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *shlex.split(code)],
        cwd=Path(__file__).parents[3],
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_warning_is_one_line_without_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # and back again
    assert exit_code(["--version"]) == 0
    assert warnings.formatwarning("it has no effect", UserWarning, "x.py", 3) == "imagerl: it has no effect\n"


def test_the_package_runs_as_a_module() -> None:
    assert run_module("-m imagerl --version").stdout == f"imagerl {version('imagerl')}\n"


def test_a_shell_completes_commands_and_options() -> None:
    def completed(words: str) -> list[str]:
        asked = {
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
            "_IMAGERL_COMPLETE": "complete_bash",
        }
        return run_module("-m imagerl", asked).stdout.split()

    assert completed("imagerl tr") == ["train"]
    assert completed("imagerl train --re") == ["--resume"]
    assert "check" in completed("imagerl reward ")


def test_help_and_completion_import_no_schema_and_nothing_heavy() -> None:
    """`imagerl --help` is to come at once."""
    heavy = "('pydantic', 'torch', 'numpy', 'yaml', 'PIL')"
    code = f"import sys, imagerl.rl.commands.cli; print([m for m in sys.modules if m in {heavy}])"
    assert run_module(f"-c {shlex.quote(code)}").stdout == "[]\n"


def test_help_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    ended = imagerl(capsys)
    assert ended.code == 0
    assert all(command in ended.out for command in ("train", "sample", "eval", "export", "compare"))


# ---- train -------------------------------------------------------------------------------------------------


def test_a_run_is_neither_overwritten_nor_resumed_as_another(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = place / "taken"
    command = ["train", str(place / "recipe.yaml"), f"run.output_dir={run}", "run.steps=1"]
    assert imagerl(capsys, *command).code == 0
    before = snapshot(run)
    again = imagerl(capsys, *command)
    assert again.code == 1 and "--resume to continue it, --overwrite to replace it" in again.err
    other = imagerl(capsys, *command, "optim.lr=0.5", "--resume")
    assert other.code == 1 and "was started with another optim.lr" in other.err
    assert other.err.count("\n") == again.err.count("\n") == 1
    lost = imagerl(capsys, *command, f"model.path={place}/none", "--overwrite")
    assert lost.code == 1
    broken = place / "broken.py"
    broken.write_text("class Broken:\n    def __init__(self):\n        raise ValueError('no')\n"
                      "    def __call__(self, images):\n        return [0.0]\n")  # fmt: skip
    lost = imagerl(capsys, *command, f"rewards=[{{import_path: '{broken}:Broken'}}]", "--overwrite")
    assert lost.code == 1 and "could not be constructed: ValueError: no" in lost.err
    assert snapshot(run) == before
    replaced = imagerl(capsys, *command, "optim.lr=0.5", "--overwrite")
    assert replaced.code == 0
    assert "lr: 0.5" in (run / "recipe.yaml").read_text()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3


def test_overwrite_deletes_runs_only(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "recipe.yaml").write_text("flour: 500 g")
    (thesis / "chapter.tex").write_text("years of work")
    ended = imagerl(
        capsys, "train", str(place / "recipe.yaml"), f"run.output_dir={thesis}", "run.steps=1", "--overwrite"
    )
    assert ended.code == 1 and "recipe.yaml, which is not known to be of a run" in ended.err
    assert ended.err.count("\n") == 1
    assert (thesis / "chapter.tex").read_text() == "years of work"


def test_rewards_of_a_list_can_be_overridden(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    data = yaml.safe_load((place / "recipe.yaml").read_text())
    data["rewards"] = [
        {"import_path": f"{place}/reward.py:low_tokens"},
        {"import_path": f"{place}/reward.py:brightness", "weight": 1.0},
    ]
    (place / "list.yaml").write_text(yaml.safe_dump(data))
    run = place / "list"
    overrides = [f"run.output_dir={run}", "run.steps=1", "rewards.workers=0", "rewards.1.weight=0.5"]
    assert imagerl(capsys, "train", str(place / "list.yaml"), *overrides).code == 0
    step = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
    assert step["reward/mean"] == pytest.approx(
        step["reward/low_tokens/mean"] + 0.5 * step["reward/brightness/mean"]
    )
    assert 0 < step["reward/brightness/mean"] < 1


def test_closing_line() -> None:
    gap = Interval(0.25, 0.125, 0.375, 200)
    entry = {"before": 0.5, "after": 0.75, "difference": gap}
    assert closing_line({"total": entry, "exact_match": entry}) == (
        "held-out exact match: 50.0 % → 75.0 % (+25.0 points, 95 % interval +12.5 to +37.5, n=200: higher)"
    )
    assert closing_line({"redness": entry}) == (
        "held-out redness: 0.500 → 0.750 (+0.250, 95 % interval +0.125 to +0.375, n=200: higher)"
    )
    assert closing_line({"exact_match": entry, "success": entry}).startswith(
        "held-out success: 50.0 % → 75.0 %"
    )
    assert "no sample" in closing_line({})
    beside = closing_line({"total": entry, "colours": entry, "exact_match": entry}, gold=["exact_match"])
    assert beside.startswith("held-out total: 0.500 → 0.750 (+0.250,")
    assert "; never rewarded, exact match: 50.0 % → 75.0 % (" in beside
    unknown = closing_line({"total": entry, "exact_match": entry, "colours": entry}, gold=["colours"])
    assert unknown.startswith("held-out exact match: 50.0 %") and "rewarded" not in unknown
    flips = [[{"index": i, "exact_match": float(i < hits)} for i in range(8)] for hits in (2, 5)]
    assert closing_line(compare(*flips)) == (
        "held-out exact match: 25.0 % → 62.5 % (+37.5 points, too few to tell, n=8: no difference shown)"
    )


# ---- sample ------------------------------------------------------------------------------------------------


def test_sample_draws_the_same_pictures_again(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def draw(name: str, *more: str) -> dict[str, bytes]:
        out = tmp_path / name
        command = ["sample", "a red word", "a blue word", "--model", str(place / "model"), "-n", "2"]
        assert imagerl(capsys, *command, "--out", str(out), *more).code == 0
        return {path.name: path.read_bytes() for path in sorted(out.iterdir())}

    pictures = draw("one")
    assert list(pictures) == ["000_00.png", "000_01.png", "001_00.png", "001_01.png", "grid.png"]
    assert Image.open(tmp_path / "one" / "000_00.png").size == (64, 32)
    assert draw("two") == pictures
    assert draw("three", "--seed", "1") != pictures
