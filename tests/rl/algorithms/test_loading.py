"""A user's own loss and advantages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from imagerl.rl.algorithms.loading import SETTINGS, load_advantages, load_loss, loss_settings
from imagerl.rl.algorithms.losses import policy_loss
from imagerl.rl.config.algorithm import AlgorithmConfig
from imagerl.rl.config.algorithm_table import ALGORITHMS
from imagerl.rl.errors import ImageRLError
from tests.loss_examples import LOSS_FIELDS, example

FILE = '''
from dataclasses import dataclass

import torch

from imagerl.rl.types import LossOutput


@dataclass
class Helper:
    value: float = 1.0


def mine(inputs, clip_high, temperature=1.0):
    """Takes one setting of the recipe and one of its own."""
    loss = -(inputs.logprobs * inputs.advantages * inputs.action_mask).sum() / inputs.denominator
    return LossOutput(loss * temperature, {"cap": clip_high * inputs.action_mask.sum()})


def everything(inputs, **settings):
    return LossOutput(inputs.logprobs.sum(), {"settings": torch.tensor(float(len(settings)))})


def bare(inputs):
    return inputs.logprobs.sum()


def needy(inputs, beta):
    return LossOutput(inputs.logprobs.sum(), {})


def twice(inputs):
    return 2 * inputs.rewards


def wrong(inputs):
    return inputs.rewards[1:]
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_algorithm.py"
    path.write_text(FILE)
    return path


def config(**settings: Any) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate(settings)


def call(algorithm: AlgorithmConfig) -> Any:
    return load_loss(algorithm)(example(), **loss_settings(algorithm, algorithm.kl_coef))


def test_without_a_path_it_is_ours() -> None:
    assert load_loss(config()) is policy_loss
    assert set(SETTINGS) >= set(LOSS_FIELDS)
    for name in ALGORITHMS:
        algorithm = config(name=name)
        settings = loss_settings(algorithm, 0.7)
        assert settings["kl_coef"] == (0.7 if algorithm.kl_in == "loss" else 0.0)
        assert torch.isfinite(policy_loss(example(), **settings).loss)


def test_a_loss_gets_the_settings_that_it_names(file: Path) -> None:
    algorithm = config(import_path=f"{file}:mine", clip_high=0.3, arguments={"temperature": 2.0})
    output, inputs = call(algorithm), example()
    expected = -2 * (inputs.logprobs * inputs.advantages * inputs.action_mask).sum() / inputs.denominator
    torch.testing.assert_close(output.loss, expected)
    assert output.metrics["cap"] == pytest.approx(0.3 * 25) and output.metrics["actions"] == 25
    assert output.metrics["kl_k3"] > 0  # what it does not measure itself
    assert call(config(import_path=f"{file}:everything")).metrics["settings"] == len(SETTINGS) + 1


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"import_path": "nowhere.py:f"}, "nowhere.py does not exist"),
        ({"import_path": "{file}:mien"}, "did you mean mine?"),
        ({"import_path": "{file}:mine", "arguments": {"tau": 1}}, "mine has no argument 'tau'"),
        ({"import_path": "{file}:needy"}, "set algorithm.arguments.beta"),
        ({"import_path": "{file}:bare"}, "must return LossOutput"),
        ({"import_path": "no.such.module:f"}, "importing it failed: ModuleNotFoundError"),
        ({"arguments": {"tau": 1}}, "set algorithm.import_path too"),
    ],
)
def test_mistakes_are_told(file: Path, settings: dict[str, Any], part: str) -> None:
    if "import_path" in settings:
        settings = settings | {"import_path": settings["import_path"].replace("{file}", str(file))}
    with pytest.raises(ImageRLError) as caught:
        call(config(**settings))
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_the_example_of_the_docs(tmp_path: Path) -> None:
    from tests.rl.algorithms.test_advantage_rows import given

    page = (Path(__file__).parents[3] / "docs" / "algorithms.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    path = tmp_path / "my_algorithm.py"
    path.write_text(source)
    one = call(config(import_path=f"{path}:tempered", arguments={"power": 1.0}))
    torch.testing.assert_close(one.loss, call(config(clip="none", kl_coef=0)).loss)
    assert call(config(import_path=f"{path}:tempered")).loss != one.loss
    ranks = load_advantages(config(advantage_import_path=f"{path}:ranks"))
    assert ranks(given([0.1, 0.9, 0.4], 3)).advantages.tolist() == [-1, 1, 0]


def test_broken_code_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(ImageRLError, match=r"syntax error in .*broken\.py, line 1"):
        load_loss(config(import_path=f"{tmp_path / 'broken.py'}:f"))


def test_advantages_of_ones_own(file: Path) -> None:
    from tests.rl.algorithms.test_advantage_rows import given

    inputs = given([1.0, 2.0, 3.0, 4.0])
    mine = load_advantages(config(advantage_import_path=f"{file}:twice"))
    assert mine(inputs).advantages.tolist() == [2, 4, 6, 8]
    with pytest.raises(ImageRLError, match=r"wrong.*must return \[B\] or \[B, N\]"):
        load_advantages(config(advantage_import_path=f"{file}:wrong"))(inputs)
    ours = load_advantages(config(name="dr_grpo"))
    assert ours(inputs).advantages.tolist() == [-1.5, -0.5, 0.5, 1.5]
