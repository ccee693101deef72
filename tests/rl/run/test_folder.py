"""Whose a run folder is: its lock, its record, what may be deleted with it, and what is never written into it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from imagerl.rl.config.recipe import validate_recipe
from imagerl.rl.config.rewards import HIDDEN, refuse_hidden
from imagerl.rl.config.train import Recipe, load_recipe
from imagerl.rl.engine.checkpoint import save_checkpoint
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.writing import process_place, temporary_name
from imagerl.rl.run.folder import LOCK, RunFolder, told_changes
from tests.small_run import recipe_data

WRITTEN = (
    *("metrics.jsonl", "report.html", "samples/step_000002.png", "eval/ocr_step_000000.json"),
    *("eval/comparison.json", "tb/events.out.tfevents.1.host.2.3", "peak/step_000002/manifest.json"),
)
THEIRS = (
    *("notes.txt", "samples/mine.png", "eval/mine_step_000000.json", "checkpoints/best/model.safetensors"),
    *("model/model.safetensors", "tb/read.me", "checkpoints/step_000002/notes.txt", ".hidden"),
)


def recipe(folder: Path, *overrides: str) -> Recipe:
    return validate_recipe(Recipe, recipe_data(folder, *overrides), "test")


def fill(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def make_run(folder: RunFolder, settings: Recipe) -> None:
    """What a run of two steps leaves."""
    folder.begin(settings, ["imagerl", "train"])
    fill(folder.path, WRITTEN)
    tensors = {"model": {"w": torch.zeros(2)}}
    save_checkpoint(folder.checkpoints, 2, tensors, {"recipe": settings.model_dump(mode="json")})


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# ---- deleting ----------------------------------------------------------------------------------------------


def test_overwriting_removes_a_run_and_nothing_else(tmp_path: Path) -> None:
    folder, settings = RunFolder(tmp_path / "run"), recipe(tmp_path)
    make_run(folder, settings)
    fill(folder.path, THEIRS)
    folder.refuse_loss(settings, overwrite=True)
    folder.begin(settings, ["imagerl", "train", "--overwrite"], overwrite=True)
    assert names(folder.path) == {*THEIRS, "recipe.yaml", "environment.json"}
    assert all((folder.path / name).read_text() == name for name in THEIRS)
    assert not (folder.path / "peak").exists()
    assert "--overwrite" in json.loads((folder.path / "environment.json").read_text())["command"]


@pytest.mark.parametrize(
    "record", [None, "{", "[]", '{"files": ["../../thesis/*", "/etc/*"]}', '{"files": 3}']
)
def test_what_no_record_says_a_run_made_is_not_overwritten(tmp_path: Path, record: str | None) -> None:
    """A folder with a recipe and a model, in which no run ever was."""
    folder, settings = RunFolder(tmp_path / "run"), recipe(tmp_path)
    fill(folder.path, ("recipe.yaml", "model/model.safetensors", "samples/mine.png"))
    fill(tmp_path, ("thesis/chapter.tex",))
    if record is not None:
        (folder.path / "environment.json").write_text(record)
    before = names(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(ImageRLError, match=r"already holds a run|is not known to be of a run"):
            folder.refuse_loss(settings, overwrite)
    folder._remove_run()  # were it asked to all the same
    assert names(tmp_path) >= before - {"run/environment.json"}


def test_a_new_run_does_not_write_over_what_it_finds(tmp_path: Path) -> None:
    folder, settings = RunFolder(tmp_path / "run"), recipe(tmp_path)
    fill(folder.path, ("notes.txt",))
    folder.refuse_loss(settings, overwrite=False)
    fill(folder.path, ("report.html",))
    with pytest.raises(ImageRLError, match=r"holds report\.html, which is not known to be of a run"):
        folder.refuse_loss(settings, overwrite=False)


def test_folders_that_people_and_models_live_in_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    fill(tmp_path, ("home/.bashrc", "work/here/notes.txt", "store/run/model/config.json"))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work / "here")
    (tmp_path / "link").symlink_to(home)
    settings = recipe(tmp_path, f"model.path={tmp_path / 'store' / 'run' / 'model'}")
    for place, what in (
        *((".", "working directory"), ("..", "working directory"), ("/", "working directory")),
        *((str(home), "home directory"), (str(tmp_path / "link"), "home directory")),
        *((str(tmp_path / "store" / "run"), "model"), (str(tmp_path / "store/run/model"), "model")),
    ):
        for overwrite in (False, True):
            with pytest.raises(ImageRLError, match=f"holds (the|your) {what}"):
                RunFolder(place).refuse_loss(settings, overwrite)
    RunFolder("mine").refuse_loss(settings, overwrite=False)


def test_a_link_to_a_folder_is_that_folder(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    folder, settings = RunFolder(tmp_path / "run"), recipe(tmp_path)
    folder.lock()
    make_run(folder, settings)
    folder.refuse_loss(settings, overwrite=True)
    folder.begin(settings, ["imagerl"], overwrite=True)
    folder.release()
    assert (tmp_path / "run").is_symlink()
    assert names(tmp_path / "disk") == {"recipe.yaml", "environment.json"}
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ImageRLError, match="cannot write"):
        RunFolder(tmp_path / "gone").lock()


# ---- what a continuation may change ------------------------------------------------------------------------


def test_how_numbers_are_computed_may_change_and_what_is_computed_may_not(tmp_path: Path) -> None:
    folder, settings = RunFolder(tmp_path / "run"), recipe(tmp_path)
    make_run(folder, settings)
    other = (
        "engine.name=deepspeed",
        "engine.micro_batch_size=2",
        "rollout.sample_chunk=1",
        "eval.batch_size=1",
    )
    changed = recipe(tmp_path, *other, "run.steps=9", "checkpoint.grace_s=0")
    checkpoint = folder.resumable(changed)
    assert checkpoint is not None
    checkpoint.state["processes"] = 2
    assert told_changes(checkpoint, changed, 1) == (
        'going on from step 2 with run.steps 9 (was 4), rollout.sample_chunk 1 (was null), engine.name "deepspeed" '
        '(was "torch"), engine.zero_stage 1 (was null), engine.micro_batch_size 2 (was 8), eval.batch_size 1 (was '
        "64), checkpoint.grace_s 0.0 (was 25.0), the number of processes 1 (was 2)"
    )
    assert told_changes(checkpoint, settings, 2) == ""
    for key, value in (("engine.precision", "bf16"), ("rollout.group_size", 2)):
        with pytest.raises(ImageRLError, match=f"started with another {key}"):
            folder.resumable(recipe(tmp_path, f"{key}={value}"))


def test_weights_alone_are_no_run_to_go_on_with(tmp_path: Path) -> None:
    folder, settings = RunFolder(tmp_path / "run"), recipe(tmp_path, "checkpoint.weights_only=true")
    make_run(folder, settings)
    with pytest.raises(ImageRLError, match="holds weights only"):
        folder.resumable(settings)


# ---- the lock ----------------------------------------------------------------------------------------------


def test_a_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "runs" / "a"), RunFolder(tmp_path / "runs" / "a")
    first.lock()
    with pytest.raises(ImageRLError, match=f"in use by process {os.getpid()} on {process_place()}"):
        second.lock()
    second.release()
    assert (first.path / LOCK).exists()
    first.release()
    first.release()
    assert list(tmp_path.iterdir()) == []  # it was never written to
    second.lock()
    second.release()


def test_locking_clears_away_what_killed_runs_left_half_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    places = ("report.html", "samples/step_000002.png", "eval/comparison.json", "peak/step_000002")
    left = [tmp_path / name for name in places]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        temporary_name(path).touch()
    elsewhere = tmp_path / "eval" / ".comparison.json.tmp-1@far-away.0"
    elsewhere.touch()
    folder.lock()
    folder.release()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [elsewhere]


@pytest.mark.parametrize("place", ["file/run", "file"])
def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("in the way")
    folder = RunFolder(tmp_path / place)
    with pytest.raises(ImageRLError, match="cannot write"):
        folder.lock()
    folder.release()
    assert (tmp_path / "file").read_text() == "in the way"


# ---- continuing --------------------------------------------------------------------------------------------


def test_a_run_continues_from_a_checkpoint_of_its_own_recipe_only(tmp_path: Path) -> None:
    """Two runs that shared a folder left the recipe of one and the checkpoints of the other."""
    folder, settings = RunFolder(tmp_path / "run"), recipe(tmp_path)
    make_run(folder, settings)
    checkpoint = folder.resumable(settings)
    assert checkpoint is not None and checkpoint.step == 2
    other = recipe(tmp_path, "run.seed=1")
    (folder.path / "recipe.yaml").write_text(other.to_yaml())
    with pytest.raises(
        ImageRLError, match=r"a checkpoint, step_000002, that was started with another run\.seed"
    ):
        folder.resumable(other)
    with pytest.raises(ImageRLError, match=r"was started with another run\.seed"):
        folder.resumable(settings)


def test_there_must_be_a_run_to_continue(tmp_path: Path) -> None:
    with pytest.raises(ImageRLError, match=r"no run in .*; leave --resume out"):
        RunFolder(tmp_path / "nowhere").resumable(recipe(tmp_path))
    assert list(tmp_path.iterdir()) == []


# ---- secrets -----------------------------------------------------------------------------------------------


def test_secrets_of_rewards_are_written_nowhere(tmp_path: Path) -> None:
    rewards = "rewards=[{import_path: a.py:f, runtime_env: {env_vars: {KEY: s3cret, PORT: '1'}, pip: [x]}}]"
    settings = recipe(tmp_path, rewards)
    folder = RunFolder(tmp_path / "run")
    folder.begin(
        settings, ["imagerl", "train", "r.yaml", rewards, "rewards.0.runtime_env.env_vars.KEY=s3cret"]
    )
    save_checkpoint(folder.checkpoints, 2, {}, {"recipe": settings.model_dump(mode="json")})
    texts = {path.name: path.read_text() for path in folder.path.rglob("*") if path.is_file()}
    assert {"recipe.yaml", "environment.json", "state.json"} <= texts.keys()
    assert not [name for name, text in texts.items() if "s3cret" in text]
    assert "KEY" in texts["recipe.yaml"] and "pip" in texts["state.json"]

    assert settings.model_dump()["rewards"]["functions"][0]["runtime_env"]["env_vars"]["KEY"] == "s3cret"
    refuse_hidden(settings.rewards.functions)
    checkpoint = folder.resumable(settings)  # also with a new key
    assert checkpoint is not None and checkpoint.step == 2
    assert folder.resumable(recipe(tmp_path, rewards.replace("s3cret", "renewed"))) is not None
    with pytest.raises(ImageRLError, match=r"another rewards\.functions"):
        folder.resumable(recipe(tmp_path, rewards.replace("KEY", "TOKEN")))
    again = load_recipe(folder.path / "recipe.yaml")
    assert again.rewards.functions[0].runtime_env == {
        "env_vars": {"KEY": HIDDEN, "PORT": HIDDEN}, "pip": ["x"]
    }  # fmt: skip
    with pytest.raises(ImageRLError, match=r'lacks the value of env_vars\.KEY of reward "f"'):
        refuse_hidden(again.rewards.functions)
