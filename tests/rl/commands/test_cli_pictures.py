"""`imagerl ask` and `imagerl sample --edit`, and the suites that need a model which reads pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from imagerl.models.blip3o_next.loading import save_policy
from tests.command import imagerl
from tests.micro import MODEL, micro_folder
from tools.tiny.model import new_policy
from tools.tiny.samples import captions


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    micro_folder(folder / "drawer")
    policy, config = new_policy({**MODEL, "edit": True}, captions(0, 20), 300)
    (folder / "editor").mkdir()
    save_policy(policy, folder / "editor", config)
    Image.new("RGB", (64, 32), "pink").save(folder / "fits.png")
    Image.new("LA", (50, 50), (90, 128)).save(folder / "odd.png")
    Image.new("RGB", (128, 64), "white").save(folder / "large.png")
    (folder / "broken.png").write_bytes((folder / "fits.png").read_bytes()[:60])
    return folder


def test_every_question_gets_a_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = ["what is written?", "what colour is the text?"]
    command = ["ask", str(place / "fits.png"), *questions, "--model", str(place / "editor")]
    ended = imagerl(capsys, *command, "--max-tokens", "3")
    assert ended.code == 0 and ended.out.count("\n") == 2 and ended.err == ""


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("odd.png", "the picture is 50x50 pixels; it was resized and its middle 64x32 kept"),
        ("large.png", "the picture is 128x64 pixels; it was resized to 64x32"),
        ("fits.png", None),
    ],
)
def test_a_picture_is_edited_and_what_is_done_to_it_first_is_said(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, note: str | None
) -> None:
    command = ["sample", "--edit", str(place / name), "change the text colour to red", "-n", "2"]
    ended = imagerl(capsys, *command, "--model", str(place / "editor"), "--out", str(tmp_path))
    assert ended.code == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["000_00.png", "000_01.png", "grid.png"]
    assert Image.open(tmp_path / "000_00.png").size == (64, 32)
    assert ended.err == ("" if note is None else f"{place / name}: {note}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "{place}/none.png", "what?", "--model", "{place}/editor"], 'no file "'),
        (["ask", "{place}/broken.png", "what?", "--model", "{place}/editor"], "cannot be read as a picture"),
        (["ask", "{place}/fits.png", " ", "--model", "{place}/editor"], "a question is empty"),
        (["ask", "{place}/fits.png", "what?", "--model", "{place}/drawer"], "trained to edit"),
        (["ask", "{place}/fits.png", "what?", "--model", "{place}/none"], "is no folder"),
        (["sample", "--edit", "{place}/none.png", "x", "--model", "{place}/editor"], 'no file "'),
        (["sample", "--edit", "{place}/fits.png", "x", "--model", "{place}/drawer"], "trained to edit"),
        (["eval", "--suite", "understanding", "--ceiling"], "suite 'understanding' draws none"),
        (["eval", "--suite", "ocr", "--copy"], "suite 'ocr' has none"),
        (["eval", "--suite", "edit", "--copy", "--ceiling"], "give only one"),
        (["eval", "--suite", "reading"], "there is: clip, composition, edit, ocr, understanding"),
        (["eval", "--suite", "edit", "--n", "99999", "--copy"], "has 889 prompts, not 99999"),
        (["eval", "--suite", "understanding", "--n", "3", "--model", "{place}/drawer"], "trained to edit"),
    ],
)
def test_a_mistake_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    ended = imagerl(capsys, *(argument.format(place=place) for argument in arguments))
    assert ended.code == 1 and message in ended.err
    assert ended.err.startswith("imagerl: ") and ended.err.count("\n") == 1 and ended.out == ""


def test_reading_is_evaluated(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["eval", "--suite", "understanding", "--n", "6", "--model", str(place / "editor")]
    ended = imagerl(capsys, *command, "--json", str(tmp_path / "result.json"))
    assert ended.code == 0 and "accuracy_background" in ended.out
    document = json.loads((tmp_path / "result.json").read_text())
    assert document["suite"] == "understanding" and document["n"] == 6
    assert {row["wanted"] for row in document["per_prompt"]} and document["metrics"]["accuracy"]["n"] == 6


@pytest.mark.parametrize(("flag", "success"), [("--ceiling", 1.0), ("--copy", 0.0)])
def test_perfect_edits_succeed_and_unchanged_pictures_fail(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flag: str, success: float
) -> None:
    ended = imagerl(capsys, "eval", "--suite", "edit", flag, "--n", "6", "--json", str(tmp_path / "r.json"))
    assert ended.code == 0
    metrics = json.loads((tmp_path / "r.json").read_text())["metrics"]
    for name in ("success", "success_text", "success_ink", "success_background"):
        assert metrics[name]["mean"] == success
    assert metrics["kept_error"]["mean"] == 0.0
