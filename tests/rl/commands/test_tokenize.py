"""`imagerl tokenize`: a picture's tokens as a grid and as a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from imagerl.models.blip3o_next.ta_tok import TATokenizer
from imagerl.models.common.pictures import prepare_picture
from imagerl.rl.commands.cli import main
from tests.micro import micro_folder
from tests.models.helpers import load_policy, stir


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenize")
    micro_folder(folder / "model")
    Image.linear_gradient("L").resize((128, 64)).save(folder / "picture.png")
    whole = (folder / "picture.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["tokenize", *arguments])
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


def grid(printed: str) -> list[list[int]]:
    return [[int(word) for word in line.split()] for line in printed.splitlines()]


def test_shows_the_tokens_and_writes_them(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "tokens.json"
    picture, model = str(place / "picture.png"), str(place / "model")
    code, printed, told = run(capsys, picture, "--model", model, "--json", str(out))
    assert not code and not told
    tokenizer = load_policy(model)[0].image_tokenizer
    assert tokenizer is not None
    tokens = tokenizer.encode(prepare_picture(picture, (32, 64))[None]).view(2, 4).tolist()
    assert grid(printed) == tokens
    assert json.loads(out.read_text()) == {
        "picture": picture,
        "model": model,
        "scale": 1,
        "codes": 16,
        "tokens": tokens,
    }


def test_another_aspect_is_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (50, 50)).save(place / "square.png")
    code, printed, told = run(capsys, str(place / "square.png"), "--model", str(place / "model"))
    assert not code and len(grid(printed)) == 2
    assert told == "imagerl: the picture is 50x50 pixels; it was resized and its middle 64x32 kept\n"


def test_a_ta_tok_file_has_scales(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagerl.models.blip3o_next.ta_tok.load_ta_tok.__defaults__", (2, 32))
    sizes = {"hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    codebook = {"name": "simvq", "args": {"codebook_size": 20, "l2_normalized": True}}
    tokenizer = TATokenizer(
        {
            "siglip": {**sizes, "image_size": 32, "patch_size": 5},
            "bottleneck": {"bottleneck_dim": 4, "regularizer": codebook},
            "decoder_depth": 1,
        }
    )
    stir(tokenizer)
    save_file(tokenizer.state_dict(), place / "tok.safetensors")
    picture = prepare_picture(place / "square.png", (32, 32))[None]
    for scale, side in ((1, 6), (2, 3), (3, 2)):
        arguments = ("--model", str(place / "tok.safetensors"), "--scale", str(scale))
        code, printed, _ = run(capsys, str(place / "square.png"), *arguments)
        assert not code
        assert torch.equal(torch.tensor(grid(printed)), tokenizer.encode(picture, scale).view(side, side))


@pytest.mark.parametrize(
    ("picture", "arguments", "message"),
    [
        ("absent.png", [], 'no file "'),
        ("broken.png", [], "cannot be read as a picture"),
        ("picture.png", ["--scale", "2"], "no scale 2, only 1"),
        ("picture.png", ["--model", "{place}/nowhere"], "is no folder"),
        ("picture.png", ["--model", "{place}/broken.png"], "cannot be read as TA-Tok weights"),
    ],
)
def test_mistakes_are_told_in_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], picture: str, arguments: list[str], message: str
) -> None:
    given = [argument.format(place=place) for argument in arguments]
    model = [] if "--model" in given else ["--model", str(place / "model")]
    code, printed, told = run(capsys, str(place / picture), *model, *given)
    assert code == 1 and not printed
    assert message in told and told.count("\n") == 1
