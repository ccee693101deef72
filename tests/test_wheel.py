"""What `pip install imagerl` gives: one package, which folders of the user's own cannot get in the way of."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RAISES = "raise RuntimeError('a folder of the user was taken for ours')\n"
# The user's own package may be imported by the user's own reward, and by nobody else.
OWN_REWARDS = "import sys\nif not getattr(sys, 'asked_by_my_reward', False):\n    " + RAISES
MY_REWARD = """
import sys

sys.asked_by_my_reward = True
from rewards.mine import worth


def low_tokens(completions, **_):
    return [worth(tokens) for tokens in completions]
"""
OVERRIDES = (
    "rewards=[{import_path: my_reward.py:low_tokens}]",
    *(
        "rewards.workers=0",
        "gold=[]",
        "run.steps=2",
        "run.sample_prompts=2",
        "eval.size=2",
        "engine.threads=1",
    ),
    *("rollout.prompts_per_step=1", "rollout.group_size=2", "checkpoint.every=0"),
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds, as in site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):  # not from the checkout itself: building leaves files there
        if name.startswith("tests/") or not os.path.lexists(ROOT / name):
            continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (source / name).symlink_to(os.readlink(ROOT / name))
        else:
            os.link(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A researcher's project whose folders are called like ours."""
    for name, text in (("models", RAISES), ("rl", RAISES), ("rewards", OWN_REWARDS)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    mine = "def worth(tokens):\n    return sum(token < 800 for token in tokens) / len(tokens)\n"
    (tmp_path / "rewards" / "mine.py").write_text(mine)
    (tmp_path / "my_reward.py").write_text(MY_REWARD)
    return tmp_path


def run(installed: Path, project: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = (sys.executable, *command)
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_one_package(installed: Path) -> None:
    names = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert names == {"imagerl"}
    assert (installed / "imagerl" / "recipes" / "prompts" / "ocr_signs_train.jsonl").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [(), ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1")]
)
def test_trains_in_a_project_with_folders_called_like_ours(
    installed: Path, project: Path, launcher: tuple[str, ...]
) -> None:
    """Outside any checkout, with a recipe by its name and a reward that imports the user's own `rewards.mine`."""
    run(installed, project, *launcher, "-m", "imagerl", "train", "tiny_ocr_grpo", *OVERRIDES)
    assert (project / "runs" / "tiny_ocr_grpo" / "report.html").is_file()


@pytest.mark.slow
def test_recipes_are_listed_and_copied(installed: Path, project: Path) -> None:
    listed = run(installed, project, "-m", "imagerl", "recipes")
    assert "tiny_ocr_grpo" in listed and "compare/grpo" in listed
    run(installed, project, "-m", "imagerl", "recipes", "copy", "compare/grpo")
    assert (project / "grpo.yaml").is_file()
    assert "extends" not in (project / "grpo.yaml").read_text()
