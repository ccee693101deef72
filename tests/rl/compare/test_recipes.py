"""What recipes/compare/ trains can be trained: two steps of each on the micro model."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagerl.api.training import run_training
from imagerl.rl.config.train import load_recipe
from imagerl.rl.files.metrics import read_metrics
from imagerl.rl.run import report
from tests.micro import micro_folder
from tests.small_run import REWARD_FILE

COMPARED = sorted((Path(__file__).parents[3] / "recipes" / "compare").glob("*.yaml"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    micro_folder(folder / "model")
    (folder / "reward.py").write_text(REWARD_FILE)
    return folder


@pytest.mark.parametrize("path", COMPARED, ids=lambda path: path.stem)
def test_two_steps(path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "render", lambda chart: "")
    size = load_recipe(path).rollout.group_size
    rewards = f"rewards.functions=[{{import_path: '{place}/reward.py:brightness'}}]"
    small = ("run.steps=2", f"model.path={place / 'model'}", f"run.output_dir={place / path.stem}", "gold=[]")
    fewer = (
        "rollout.prompts_per_step=2",
        f"rollout.group_size={min(4, size)}",
        "eval.size=2",
        "run.sample_prompts=1",
    )
    run_training(load_recipe(path, [*small, *fewer, rewards]))
    steps = [record for record in read_metrics(place / path.stem) if "rollout/images" in record]
    joint, flow = path.stem == "joint", path.stem in ("flow_grpo", "mixgrpo", "nft")
    assert len(steps) == 2 and all(record["rollout/images"] >= 8 for record in steps)
    assert all(
        ("policy/updates" in record) != flow and ("flow/updates" in record) == (flow or joint)
        for record in steps
    )
    updates = [record.get("policy/updates", record.get("flow/updates")) for record in steps]
    assert updates == [2, 2]
