"""A prompt that the model has no positions for is refused by every command, before anything is drawn or written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import urllib3
import yaml
from PIL import Image

from imagerl.api.fine_tuning import run_sft
from imagerl.models.blip3o_next.loading import save_policy
from imagerl.rl.commands.chat_server import chat_app
from imagerl.rl.commands.cli import main
from imagerl.rl.files.metrics import read_metrics
from imagerl.rl.types import ImageRLError
from tests import small_sft
from tests.micro import micro_folder
from tests.models.helpers import edit_policy
from tests.rl.commands.test_chat_server import HEADERS, PICTURE, chat
from tests.served import served
from tests.small_run import write_recipe

LONG = "Q" * 14_000
SAID = " tokens long with the chat template, and the model takes "


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    micro_folder(folder / "model")
    (folder / "editor").mkdir()
    policy, config = edit_policy()
    save_policy(policy, folder / "editor", config)
    Image.new("RGB", (64, 32), "pink").save(folder / "fits.png")
    rows = [{"prompt": f"a word {number}"} for number in range(4)]
    (folder / "short.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "long.jsonl").write_text("\n\n".join(map(json.dumps, [{"prompt": "a cat"}, {"prompt": LONG}])))
    edits = [{"prompt": text, "reference": "fits.png"} for text in ("paint it", LONG)]
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, edits)))
    write_recipe(folder)
    for name in ("long", "edits"):
        suite = {"prompts": {"path": str(folder / f"{name}.jsonl")}}
        suite["rewards"] = [{"import_path": f"{folder / 'reward.py'}:brightness"}]  # type: ignore[assignment]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(suite))
    (folder / "geneval.jsonl").write_text(json.dumps({"tag": "single", "include": [], "prompt": LONG}))
    return folder


SMALL = ("run.sample_prompts=1", "eval.size=1", "rollout.prompts_per_step=1")
COMMANDS = {
    "train": (["train", "recipe.yaml", "data.train={path: long.jsonl}", *SMALL], "long.jsonl, line 3: "),
    "held out": (["train", "recipe.yaml", "data.heldout={path: long.jsonl}", *SMALL], "long.jsonl, line 3: "),
    "edits": (
        ["train", "recipe.yaml", "model.path=editor", "data.heldout={path: edits.jsonl}", *SMALL],
        "edits.jsonl, line 2: ",
    ),
    "compare": (
        [
            "compare",
            "recipe.yaml",
            "--seeds",
            "2",
            "--budget",
            "images=8",
            "data.heldout={path: long.jsonl}",
            *SMALL,
        ],
        "long.jsonl, line 3: ",
    ),
    "plan": (["plan", "recipe.yaml", "data.train={path: long.jsonl}", *SMALL], '"QQQ'),
    "eval": (["eval", "--suite", "long.yaml", "--model", "model"], "long.jsonl, line 3: "),
    "eval of edits": (["eval", "--suite", "edits.yaml", "--model", "editor"], "edits.jsonl, line 2: "),
    "layout": (
        [
            "eval",
            "--layout",
            "geneval",
            "--prompts",
            "geneval.jsonl",
            "--pictures",
            "drawn",
            "--model",
            "model",
        ],
        "geneval.jsonl, 00000: ",
    ),
    "sample": (["sample", "a cat", LONG, "--model", "model", "--out", "out"], "prompt 2: "),
    "edit": (["sample", "--edit", "fits.png", LONG, "--model", "editor", "--out", "out"], "prompt 1: "),
    "ask": (["ask", "fits.png", "what is written?", LONG, "--model", "editor"], "prompt 2: "),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_it_is_refused_in_one_line(
    place: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    arguments, begins = COMMANDS[command]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    printed = capsys.readouterr()
    assert ended.value.code == 1 and printed.err.count("\n") == 1 and printed.out == ""
    assert begins in printed.err and SAID in printed.err and "512 positions" in printed.err
    assert sorted(place.rglob("*")) == before


def test_a_server_answers_400_and_goes_on() -> None:
    encoder = edit_policy()[0].prompts
    app = chat_app(
        lambda pictures, questions, most: ["yes"] * len(questions),
        "micro",
        refuse=lambda text: encoder.encode(text, "question"),
    )
    with served(app) as address:
        url = f"{address}/v1/chat/completions"
        body = chat(PICTURE, {"type": "text", "text": LONG[:3900]})
        answer = urllib3.request("POST", url, json=body, headers=HEADERS, retries=False)
        assert answer.status == 400 and SAID in answer.json()["error"]["message"]
        assert urllib3.request("POST", url, json=chat(), headers=HEADERS, retries=False).status == 200


def test_in_fine_tuning_it_is_a_bad_sample(place: Path, tmp_path: Path) -> None:
    """Captions come in a stream that nobody has read before; what is bad there is counted, and refused in numbers."""
    small_sft.write_pictures(tmp_path)
    captions = sorted((tmp_path / "train").glob("*.txt"))
    captions[0].write_text("Q" * 600)
    options = ("run.steps=5", f"model.path={place / 'model'}", f"data.train=[{tmp_path / 'train'}]")
    run_sft(small_sft.recipe(tmp_path, *options))
    last = [record for record in read_metrics(tmp_path / "run") if "data/bad" in record][-1]
    assert last["data/bad"] == last["data/bad/long_caption"] == 1
    for caption in captions:
        caption.write_text("Q" * 600)
    with pytest.raises(ImageRLError, match=rf"long_caption \d+ such as .*{SAID}504 "):
        run_sft(small_sft.recipe(tmp_path, *options, f"run.output_dir={tmp_path / 'bad'}"))
