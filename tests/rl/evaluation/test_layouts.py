"""What the official scorers would find: each is played here by its own way of reading a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imagerl.rl.errors import ImageRLError
from imagerl.rl.evaluation.layouts import draw, entries_of, samples_of
from imagerl.rl.types import Prompt, RolloutGroup
from tests.command import exit_code
from tests.micro import micro_folder

SIDE = 8
RECORDS = [
    '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}',
    '{"tag": "counting", "include": [{"class": "cow", "count": 2}], "exclude": [{"class": "cow", "count": 3}], '
    '"prompt": "a photo of two cows"}',
    '{"prompt": "a photo of a café",  "tag": "colors", "include": []}',
]


class Painter:
    """Plain pictures, each sample of each prompt in a colour of its own; remembers what it drew."""

    def __init__(self, height: int = SIDE) -> None:
        self.height = height
        self.asked: list[Prompt] = []
        self.occasions: set[int | str] = set()

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        occasion: int | str,
        decode_chunk: int | None = None,
        sample_chunk: int | None = None,
    ) -> Iterator[list[RolloutGroup]]:
        self.asked += prompts
        self.occasions.add(occasion)
        nothing = torch.zeros(group_size, 0)
        for prompt in prompts:
            pictures = [plain(prompt.index, sample, self.height) for sample in range(group_size)]
            yield [RolloutGroup(prompt, nothing.long(), nothing, nothing.bool(), np.stack(pictures))]


def plain(index: int, sample: int, height: int = SIDE) -> np.ndarray:
    return np.full((height, SIDE, 3), (40 * index + 10 * sample, sample, index), np.uint8)


def drawn(layout: str, prompts: Path, folder: Path, painter: Painter, **options: Any) -> list[int]:
    sources, facts = options.pop("sources", None), options.pop("facts", {"model": "painter"})
    samples = samples_of(layout, options.pop("samples", None))
    entries = entries_of(layout, prompts, sources)
    return list(draw(layout, entries, painter, folder, samples, 8, facts))


@pytest.fixture
def geneval(tmp_path: Path) -> Path:
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("\n".join(RECORDS) + "\n")
    return file


@pytest.fixture
def dpg(tmp_path: Path) -> Path:
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name, text in (("partiprompts9", "A long caption.\n"), ("COCOval2014000000000139", "Another.")):
        (folder / f"{name}.txt").write_text(text)
    return folder


@pytest.fixture
def imgedit(tmp_path: Path) -> Path:
    for name in ("animal/1.jpg", "style/2.jpg"):
        (tmp_path / "originals" / name).parent.mkdir(parents=True)
        Image.new("RGB", (16, 12), "red").save(tmp_path / "originals" / name)
    file = tmp_path / "basic_edit.json"
    edits = {
        "1082": {"id": "animal/1.jpg", "prompt": "Darken the fur.", "edit_type": "adjust"},
        "673": {"id": "style/2.jpg", "prompt": "Make it ukiyo-e.", "edit_type": "style"},
    }
    file.write_text(json.dumps(edits))
    return file


def test_geneval_finds_every_line_and_its_pictures(geneval: Path, tmp_path: Path) -> None:
    """Its scorer takes folders whose names are digits, one JSON document of metadata, and pictures `digits.png`."""
    painter = Painter()
    assert drawn("geneval", geneval, tmp_path / "out", painter) == [0, 2, 3]
    found = sorted(folder for folder in (tmp_path / "out").iterdir() if folder.name.isdigit())
    assert [folder.name for folder in found] == ["00000", "00001", "00002"]
    for index, folder in enumerate(found):
        with open(folder / "metadata.jsonl", encoding="utf-8") as file:
            assert json.load(file) == json.loads(RECORDS[index])
        assert (folder / "metadata.jsonl").read_text() == RECORDS[index] + "\n"  # unchanged
        names = sorted(path.name for path in (folder / "samples").iterdir())
        assert names == ["0000.png", "0001.png", "0002.png", "0003.png"]
        assert all(re.match(r"\d+\.png", name) for name in names)
        for sample, name in enumerate(names):
            np.testing.assert_array_equal(
                np.asarray(Image.open(folder / "samples" / name)), plain(index, sample)
            )
    assert [prompt.text for prompt in painter.asked] == [json.loads(record)["prompt"] for record in RECORDS]


def test_dpg_cuts_out_the_four_pictures(dpg: Path, tmp_path: Path) -> None:
    """Its scorer lists the folder, takes names up to the dot as ids, and cuts squares of the given resolution."""
    painter = Painter()
    drawn("dpg", dpg, tmp_path / "out", painter)
    assert {path.name.split(".")[0] for path in (tmp_path / "out").iterdir()} == {
        "COCOval2014000000000139",
        "partiprompts9",
    }
    assert [prompt.text for prompt in painter.asked] == ["Another.", "A long caption."]
    grid = Image.open(tmp_path / "out" / "partiprompts9.png")
    assert grid.size == (2 * SIDE, 2 * SIDE)
    for sample, (left, top) in enumerate([(0, 0), (SIDE, 0), (0, SIDE), (SIDE, SIDE)]):
        cut = grid.crop((left, top, left + SIDE, top + SIDE))
        np.testing.assert_array_equal(np.asarray(cut), plain(1, sample))


def test_dpg_with_one_picture_each(dpg: Path, tmp_path: Path) -> None:
    drawn("dpg", dpg, tmp_path / "out", Painter(), samples=1)
    assert Image.open(tmp_path / "out" / "partiprompts9.png").size == (SIDE, SIDE)
    with pytest.raises(ImageRLError, match="takes 4 or 1 pictures of a prompt, not 2"):
        drawn("dpg", dpg, tmp_path / "two", Painter(), samples=2)


def test_dpg_needs_squares(dpg: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageRLError, match="cuts out squares, but the model draws 8x4 pixels"):
        drawn("dpg", dpg, tmp_path / "out", Painter(height=4))


def test_imgedit_finds_a_picture_by_each_key(imgedit: Path, tmp_path: Path) -> None:
    painter = Painter()
    drawn("imgedit", imgedit, tmp_path / "out", painter, sources=tmp_path / "originals")
    edits = json.loads(imgedit.read_text())
    for index, key in enumerate(edits):
        picture = np.asarray(Image.open(tmp_path / "out" / f"{key}.png"))
        np.testing.assert_array_equal(picture, plain(index, 0))
    assert [prompt.text for prompt in painter.asked] == ["Darken the fur.", "Make it ukiyo-e."]
    assert all(prompt.reference is not None and prompt.reference.size == (16, 12) for prompt in painter.asked)


@pytest.mark.parametrize("layout", ["geneval", "dpg"])
def test_what_is_there_is_not_drawn_again(
    layout: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The last file of an entry is missing, as after a kill: only that entry comes again, on the same draws."""
    prompts, out = request.getfixturevalue(layout), tmp_path / "out"
    drawn(layout, prompts, out, Painter())
    files = sorted(path for path in out.rglob("*") if path.is_file())
    before = {path: path.read_bytes() for path in files}
    files[-1].unlink()
    painter = Painter()
    count = len(entries_of(layout, prompts, None))
    assert drawn(layout, prompts, out, painter) == [count - 1, count]
    assert [prompt.index for prompt in painter.asked] == [count - 1]
    assert {path: path.read_bytes() for path in files} == before
    assert painter.occasions == {f"benchmark {layout}"}


def test_another_model_does_not_go_on_in_the_folder(geneval: Path, tmp_path: Path) -> None:
    drawn("geneval", geneval, tmp_path / "out", Painter(), facts={"seed": 0, "model": "a"})
    assert json.loads((tmp_path / "out.json").read_text()) == {"seed": 0, "model": "a"}
    with pytest.raises(ImageRLError, match="was begun with another seed"):
        drawn("geneval", geneval, tmp_path / "out", Painter(), facts={"seed": 1, "model": "a"})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ImageRLError, match="is not empty"):
        drawn("geneval", geneval, tmp_path / "full", Painter())


@pytest.mark.parametrize(
    ("layout", "name", "content", "message"),
    [
        ("geneval", "m.jsonl", "{]", "line 1: not JSON"),
        ("geneval", "m.jsonl", '{"prompt": "a"}', "line 1: should have tag, include, prompt"),
        ("geneval", "m.jsonl", '{"tag": "x", "include": [], "prompt": " "}', "'prompt' should be a text"),
        ("geneval", "m.jsonl", "\n", "holds no prompts"),
        ("geneval", "none.jsonl", None, "no file"),
        ("dpg", "none", None, "is no folder"),
        ("dpg", "p/a.txt", " \n", "a.txt is empty"),
        ("imgedit", "e.json", "[]", "should map keys to edits"),
        ("imgedit", "e.json", '{"1": {"prompt": "x"}}', "key 1: should have id, prompt"),
        ("imgedit", "e.json", '{"1": {"id": "no.jpg", "prompt": "x"}}', "there is no picture"),
        ("imgedit", "e.json", '{"../1": {"id": "ok.jpg", "prompt": "x"}}', "cannot be the name of a picture"),
        ("drawbench", "e.json", "", "there is no layout 'drawbench'; choose one of geneval, dpg, imgedit"),
    ],
)
def test_files_that_are_not_the_benchmarks(
    tmp_path: Path, layout: str, name: str, content: str | None, message: str
) -> None:
    file = tmp_path / name
    if content is not None:
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
    Image.new("RGB", (4, 4)).save(tmp_path / "ok.jpg")
    with pytest.raises(ImageRLError, match=re.escape(message)):
        entries_of(
            layout, file.parent if name.startswith("p/") else file, tmp_path if layout == "imgedit" else None
        )


def test_a_damaged_source_is_named(imgedit: Path, tmp_path: Path) -> None:
    (tmp_path / "originals" / "style" / "2.jpg").write_bytes(b"\xff\xd8 no picture")
    with pytest.raises(ImageRLError, match=r"673: .*2\.jpg cannot be read as a picture"):
        drawn("imgedit", imgedit, tmp_path / "out", Painter(), sources=tmp_path / "originals")


def test_from_the_command_line(
    geneval: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = str(micro_folder(tmp_path / "model")), tmp_path / "out"
    command = ["eval", "--layout", "geneval", "--model", model, "--pictures", str(out), "--samples", "2"]
    assert exit_code([*command, "--prompts", str(geneval)]) == 0
    assert len(list(out.glob("*/samples/*.png"))) == 6
    assert f"{out}: 3 prompts, 2 pictures each" in capsys.readouterr().out
    facts = json.loads((tmp_path / "out.json").read_text())
    assert facts["layout"] == "geneval" and len(facts["model_sha256"]) == 64 and facts["flow_steps"] == 3
    geneval.write_text("\n".join(RECORDS).replace("two cows", "two oxen"))
    assert exit_code([*command, "--prompts", str(geneval)]) == 1
    assert "was begun with another prompts_sha256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout", "geneval", "--pictures", "x"], "--layout needs --prompts"),
        (["--layout", "geneval", "--prompts", "x", "--json", "y"], "cannot be combined with --json"),
        (["--layout", "imgedit", "--prompts", "x", "--pictures", "y"], "give --sources"),
        (["--layout", "dpg", "--prompts", "x", "--pictures", "y", "--sources", "z"], "dpg has none"),
        (["--prompts", "x"], "--prompts goes with --layout"),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert exit_code(["eval", *arguments]) == 1
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_longtext_finds_four_pictures_of_every_prompt_by_its_number(tmp_path: Path) -> None:
    file = tmp_path / "text_prompts.jsonl"
    lines = [
        {"prompt_id": n, "prompt": f"poster {n}", "text": ["SALE"], "category": "poster"} for n in (7, 12)
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert drawn("longtext", file, tmp_path / "out", Painter()) == [0, 2]
    found: dict[int, list[int]] = {}
    for path in sorted((tmp_path / "out").glob("*.png")):  # as its evaluation script reads them
        found.setdefault(int(path.name.split("_")[0]), []).append(int(np.asarray(Image.open(path))[0, 0, 1]))
    assert found == {7: [0, 1, 2, 3], 12: [0, 1, 2, 3]}
    assert (tmp_path / "out" / "0007_1.png").is_file() and (tmp_path / "out" / "0012_4.png").is_file()
    file.write_text("\n".join(json.dumps(lines[0]) for _ in range(2)))
    with pytest.raises(ImageRLError, match="line 2: prompt_id 7 is no number of its own"):
        entries_of("longtext", file, None)
