"""Suites by name and from files, and what two measurements of one suite say about each other."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imagerl.models.families import fingerprint as model_fingerprint
from imagerl.rl.errors import ImageRLError
from imagerl.rl.evaluation.suites import SUITES, find_suite, fingerprint
from tests.command import call as imagerl
from tests.micro import micro_folder

REWARDS = """
import numpy as np

def light(images):
    return [float(np.asarray(image).mean()) / 255 for image in images]

def red(images, ink):
    pixels = [np.asarray(image, float) for image in images]
    return [float(p[..., 0].mean()) / 255 if wanted == "red" else None for p, wanted in zip(pixels, ink)]
"""
SUITE = """
prompts: [{{prompt: a red cat, ink: red}}, {{prompt: a blue dog, ink: blue}}, {{prompt: a red bird, ink: red}}]
rewards: [{{import_path: "{file}:light", weight: 2.0}}]
gold: [{{import_path: "{file}:red"}}]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suites")
    (folder / "my.py").write_text(REWARDS)
    (folder / "animals.yaml").write_text(SUITE.format(file=folder / "my.py"))
    for seed, name in enumerate(("a", "b")):
        micro_folder(folder / name, seed)
    return folder


@pytest.fixture(scope="module")
def results(place: Path) -> dict[str, Any]:
    """One evaluation of model a with pictures, against model b."""
    command = ["eval", "--suite", str(place / "animals.yaml"), "--samples", "2", "--seed", "3"]
    both = ["--model", str(place / "a"), "--against", str(place / "b")]
    assert imagerl(*command, *both, "--json", str(place / "r.json"), "--pictures", str(place / "kept")) == 0
    document: dict[str, Any] = json.loads((place / "r.json").read_text())
    return document


def test_results_say_what_was_measured(place: Path, results: dict[str, Any]) -> None:
    assert (results["suite"], results["n"], results["samples"], results["seed"]) == ("animals", 3, 2, 3)
    assert set(results["metrics"]) == {"total", "light", "red"} and results["gold"] == ["red"]
    assert [(row["index"], row["sample"]) for row in results["per_prompt"]] == [
        (index, sample) for index in range(3) for sample in range(2)
    ]
    assert results["model"] == str(place / "a") and results["model_sha256"] == model_fingerprint(
        str(place / "a")
    )
    suite = find_suite(str(place / "animals.yaml"))
    assert results["suite_sha256"] == fingerprint(suite, suite.prompts(None))
    assert results["flow_steps"] == 3 and results["versions"]["torch"]


def test_pictures_are_kept_under_their_prompt_and_sample(place: Path, results: dict[str, Any]) -> None:
    """The values of the rows are those of the files of their names."""
    for row in results["per_prompt"]:
        picture = np.asarray(Image.open(place / "kept" / f"{row['index']:05d}_{row['sample']:02d}.png"))
        assert row["light"] == pytest.approx(picture.mean() / 255)
        assert row["total"] == pytest.approx(2 * row["light"])  # its weight; gold is in no total
        assert (row["red"] is None) == (row["prompt"] == "a blue dog")
    assert len(list((place / "kept").glob("*.png"))) == len(list((place / "kept/against").glob("*.png"))) == 6
    assert results["metrics"]["red"]["n"] == 2


def test_differences_are_paired(
    place: Path, results: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Means over the samples of a prompt, subtracted prompt by prompt; three prompts show nothing yet."""
    means = {}
    for name in ("kept", "kept/against"):
        pictures = [
            np.mean(
                [np.asarray(Image.open(place / name / f"{i:05d}_{s:02d}.png")).mean() / 255 for s in (0, 1)]
            )
            for i in range(3)
        ]
        means[name] = np.array(pictures)
    row = results["against"]["metrics"]["light"]
    assert row["model"] == pytest.approx(means["kept"].mean())
    assert row["against"] == pytest.approx(means["kept/against"].mean())
    difference = means["kept"] - means["kept/against"]
    assert row["difference"] == {"mean": pytest.approx(difference.mean()), "low": None, "high": None, "n": 3}
    assert row["verdict"] == "no difference shown"
    assert results["against"]["model_sha256"] == model_fingerprint(str(place / "b"))
    # The same from the other model's results, measured before.
    command = ["eval", "--suite", str(place / "animals.yaml"), "--samples", "2", "--seed", "3"]
    assert imagerl(*command, "--model", str(place / "b"), "--json", str(place / "b.json")) == 0
    again = [
        "--model",
        str(place / "a"),
        "--against",
        str(place / "b.json"),
        "--json",
        str(place / "again.json"),
    ]
    assert imagerl(*command, *again) == 0
    document = json.loads((place / "again.json").read_text())
    assert document["against"] == results["against"] and document["per_prompt"] == results["per_prompt"]
    assert "too few to tell, n=3: no difference shown" in capsys.readouterr().out
    command[-1] = "4"
    assert imagerl(*command, *again) == 1
    assert "has another seed (3, here 4)" in capsys.readouterr().err


def test_a_model_differs_in_nothing_from_itself(place: Path) -> None:
    same = [f"--{option}={place / 'a'}" for option in ("model", "against")]
    assert (
        imagerl("eval", "--suite", str(place / "animals.yaml"), *same, "--json", str(place / "s.json")) == 0
    )
    metrics = json.loads((place / "s.json").read_text())["against"]["metrics"]
    for row in metrics.values():
        assert (row["difference"]["mean"], row["difference"]["low"], row["difference"]["high"]) == (
            0.0,
            None,
            None,
        )
        assert row["verdict"] == "no difference shown"


def test_the_fingerprint_of_a_suite(place: Path, tmp_path: Path) -> None:
    """It changes with prompts, columns, weights, pictures and the code of a reward, and with nothing else."""
    text, code = (place / "animals.yaml").read_text(), tmp_path / "my.py"
    code.write_text(REWARDS)
    Image.new("RGB", (2, 2), "red").save(tmp_path / "a.png")
    text = text.replace(str(place), str(tmp_path)).replace("ink: blue", "ink: blue, reference: a.png")

    def of(content: str) -> str:
        file = tmp_path / "s.yaml"
        file.write_text(content)
        suite = find_suite(str(file))
        return fingerprint(suite, suite.prompts(None))

    first = of(text)
    assert of(text + "\n# a remark\n") == first
    seen = {
        first,
        of(text.replace("cat", "cow")),
        of(text.replace("ink: blue", "ink: green")),
        of(text.replace("2.0", "1.0")),
    }
    Image.new("RGB", (2, 2), "blue").save(tmp_path / "a.png")
    seen.add(of(text))
    code.write_text(REWARDS + "# changed\n")
    seen.add(of(text))
    assert len(seen) == 6


def test_the_fingerprint_of_a_model(place: Path, tmp_path: Path) -> None:
    first = model_fingerprint(str(place / "a"))
    assert first != model_fingerprint(str(place / "b"))
    micro_folder(tmp_path / "a", 0)
    (tmp_path / "a" / "README.md").write_text("about")
    (tmp_path / "a" / "provenance.json").write_text("{}")
    assert model_fingerprint(str(tmp_path / "a")) == first
    (tmp_path / "a" / "config.json").write_text((tmp_path / "a" / "config.json").read_text() + " ")
    assert model_fingerprint(str(tmp_path / "a")) != first


def test_the_fingerprint_of_an_adapter_includes_its_base(place: Path, tmp_path: Path) -> None:
    base = micro_folder(tmp_path / "base")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    told = model_fingerprint(str(tmp_path / "lora"))
    (base / "chat_template.jinja").write_text("another")
    assert model_fingerprint(str(tmp_path / "lora")) != told
    own = hashlib.sha256((tmp_path / "lora" / "adapter_config.json").read_bytes()).hexdigest()
    lines = f"adapter_config.json {own}\nbase {model_fingerprint(str(base))}\n"
    assert model_fingerprint(str(tmp_path / "lora")) == hashlib.sha256(lines.encode()).hexdigest()


def test_edits_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """References and perfect results are paths beside the prompt file: sources and ideals can be scored."""
    (tmp_path / "my.py").write_text(REWARDS)
    rows = []
    for index, (source, ideal) in enumerate([("black", "white"), ("blue", "white")]):
        Image.new("RGB", (8, 8), source).save(tmp_path / f"s{index}.png")
        Image.new("RGB", (8, 8), ideal).save(tmp_path / f"i{index}.png")
        rows.append({"prompt": "make it white", "reference": f"s{index}.png", "ideal": f"i{index}.png"})
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    suite = tmp_path / "whiter.yaml"
    suite.write_text(
        f"prompts: {{path: {tmp_path}/edits.jsonl}}\nrewards: [{{import_path: '{tmp_path}/my.py:light'}}]\n"
    )
    for flag, wanted in (("--ceiling", 1.0), ("--copy", 1 / 6)):
        assert imagerl("eval", "--suite", str(suite), flag, "--json", str(tmp_path / "r.json")) == 0
        assert json.loads((tmp_path / "r.json").read_text())["metrics"]["light"]["mean"] == pytest.approx(
            wanted
        )
    Image.new("RGB", (8, 9)).save(tmp_path / "s1.png")
    assert imagerl("eval", "--suite", str(suite), "--copy") == 1
    assert "is 8x9 pixels, others 8x8; give pictures of one size" in capsys.readouterr().err
    (tmp_path / "s1.png").write_bytes(b"no picture")
    assert imagerl("eval", "--suite", str(suite), "--copy") == 1
    assert "s1.png cannot be read as a picture" in (told := capsys.readouterr().err) and told.count("\n") == 1
    (tmp_path / "s1.png").unlink()
    assert imagerl("eval", "--suite", str(suite), "--copy") == 1
    assert 'line 2: "reference" should be the path of a picture' in capsys.readouterr().err


LIGHT = "rewards: [{import_path: my.py:light}]"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"prompts: [a, '  ']\n{LIGHT}", 'line 2: "prompt" should be a text that is not empty'),
        (f"prompts: [{{words: a}}]\n{LIGHT}", 'line 1: no column "prompt"'),
        (f"prompts: []\n{LIGHT}", "holds no prompts"),
        (f"prompts: {{path: none.jsonl}}\n{LIGHT}", 'no file "none.jsonl"'),
        (
            f"prompts: {{pathh: none.jsonl}}\n{LIGHT}",
            'unknown key "prompts.pathh"; did you mean "prompts.path"?',
        ),
        (f"prompts: 5\n{LIGHT}", '"prompts" should be'),
        (f"promts: [a]\n{LIGHT}", 'unknown key "promts"; did you mean "prompts"?'),
        ("prompts: [a]", '"rewards" is missing'),
        ("prompts: [a]\nrewards: []", '"rewards"'),
        ("prompts: [a]\nrewards: [{name: ocrr}]", "did you mean ocr?"),
        (f"prompts: [a]\n{LIGHT}\ngold: [{{import_path: my.py:light}}]", 'two rewards are called "light"'),
        ("prompts: [a]\nrewards: [{name: ocr, weight: {0: 1, 9: 2}}]", "an evaluation has no steps"),
        (
            f"prompts: [a]\n{LIGHT}\ngold: [{{name: ocr, gate: {{by: light, at_least: 1}}}}]",
            "remove its gate",
        ),
        ("prompts: [a]\nrewards: [{name: ocr, gate: {by: light, at_least: 1}}]", "which is no reward"),
        ("prompts: [a]\nrewards: [{import_path: my.py:reward}]", "cannot be called"),
        (f"prompts: [a]\n{LIGHT}\n---", ""),
        ("", "is empty"),
    ],
)
def test_mistakes_in_a_file_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.py").write_text(REWARDS)
    Path("suite.yaml").write_text(content)
    assert imagerl("eval", "--suite", "suite.yaml", "--copy") == 1
    told = capsys.readouterr().err
    assert message in told and told.startswith("imagerl: ") and told.count("\n") == 1


def test_named_suites_are_whole() -> None:
    for name, suite in SUITES.items():
        assert suite.name == name
        prompts = suite.prompts(4)
        assert len(prompts) == 4
        assert suite.reads or (suite.truth is not None and suite.truth(prompts[0]).size == (64, 32))
    with pytest.raises(ImageRLError, match="no file"):
        find_suite("none.yaml")


def test_pictures_never_overwrite(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.png").write_bytes(b"")
    arguments = [
        "--suite",
        str(place / "animals.yaml"),
        "--pictures",
        str(tmp_path),
        "--model",
        str(place / "a"),
    ]
    assert imagerl("eval", *arguments) == 1
    assert "is not empty" in capsys.readouterr().err
