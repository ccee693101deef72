"""`imagerl reward check` as a user calls it."""

from pathlib import Path

import pytest

from imagerl.rl.commands.reward import parse_settings
from imagerl.rl.errors import ImageRLError
from tests.command import exit_code

BAD = str(Path(__file__).parents[3] / "docs" / "examples" / "bad_reward.py")


def test_the_bad_example_fails_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "bad.html"
    assert exit_code(["reward", "check", f"{BAD}:vivid", "--prompts", "2", "--page", str(page)]) == 1
    output = capsys.readouterr()
    assert "reward 'vivid' fails 'batch size'" in output.err and len(output.err.splitlines()) == 1
    assert '"saturated" earns more than an honest picture' in output.out
    assert page.read_text().count("<img") == 24


@pytest.mark.parametrize("arguments", [["ocr", "mode=recognise"], ["colours"]])
def test_the_shipped_rewards_pass(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["reward", "check", *arguments, "--prompts", "2"]) == 0
    assert "rank correlation with the shipped rewards" in capsys.readouterr().out


def test_a_misspelt_reward_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["reward", "check", "colors"]) == 1
    assert capsys.readouterr().err == (
        "imagerl: no reward is named 'colors'; did you mean colours? (your own: import_path: file.py:name)\n"
    )


def test_settings() -> None:
    assert parse_settings(["mode=full", "weight=0.5", "names=[a, b]"]) == {
        "mode": "full",
        "weight": 0.5,
        "names": ["a", "b"],
    }
    with pytest.raises(ImageRLError, match="write key=value"):
        parse_settings(["recognise"])


def test_a_reward_that_names_groups_is_not_torn_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagerl.api.checking._shipped", lambda but: [])
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n\ndef contrast(images, groups):\n"
        "    own = np.array([np.asarray(image.convert('L'), float).std() for image in images])\n"
        "    groups = np.array(groups)\n"
        "    return [float(own[i] - own[groups == group].mean()) / 128 for i, group in enumerate(groups)]\n"
    )
    exit_code(["reward", "check", f"{tmp_path}/mine.py:contrast", "--prompts", "2"])
    assert (
        "pass  batch size   the pictures of a prompt alone or with others: the same"
        in capsys.readouterr().out
    )
