"""A micro model with its recipe, and runs of it that nothing disturbed; once a test file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.micro import micro_folder
from tests.rl.run.helpers import STEPS, VARIANTS, arguments
from tests.small_run import Command, write_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    micro_folder(folder / "model")
    for name, overrides in VARIANTS.items():
        gold = f"gold=[{{import_path: {folder / 'reward.py'}:brightness}}]"
        more = f"run.steps={STEPS}", "eval.every=4", gold, "monitors.window=3"
        write_recipe(folder, *more, *overrides, name=f"{name}.yaml")
    return folder


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> dict[str, Path]:
    """A finished run of each variant."""
    for variant in VARIANTS:
        command = Command(place, *arguments(place, variant, f"{variant}_whole"))
        assert command.wait() == 0, command.output
    return {variant: place / f"{variant}_whole" for variant in VARIANTS}
