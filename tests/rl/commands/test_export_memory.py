"""How much memory an export takes, measured in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagerl.models.common.shards import Shards
from tests.micro import micro_folder
from tests.resident import alone
from tests.small_run import write_recipe

MEASURE = """
import json, sys
from pathlib import Path
from imagerl.api.exporting import write_export
from imagerl.models.families import load_policy
from imagerl.rl.config.train import load_recipe
from imagerl.rl.engine.checkpoint import save_checkpoint
from tests.resident import grown
place = Path(sys.argv[1])
def run(name):
    "A run with full weights that has taken a step."
    folder = place / "run" / name
    recipe = load_recipe(place / "recipe.yaml", [f"model.path={place / name}", f"run.output_dir={folder}"])
    weights = dict(load_policy(recipe.model.path).trainable.named_parameters())
    groups = {"model": weights, "optimizer": {f"exp_avg/{name}": weight for name, weight in weights.items()}}
    save_checkpoint(folder / "checkpoints", 1, groups, {"recipe": recipe.model_dump(mode="json")})
    return folder
for name, out in (("warm", "out0"), ("big", "out1")):
    source = run(name)
    used = grown(lambda: write_export(source, place / out, proof=0))
print(json.dumps([used, grown(lambda: write_export(source, place / "out2"))]))
"""


@pytest.mark.slow
def test_an_export_needs_little_more_memory_than_one_policy(tmp_path: Path) -> None:
    micro_folder(tmp_path / "warm")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "head_dim": 64}
    policy = Shards(micro_folder(tmp_path / "big", **sizes)).nbytes
    write_recipe(tmp_path)
    assert policy > 80e6
    weights_only, with_pictures = alone(MEASURE, str(tmp_path))
    assert 0.9 * policy < weights_only < 1.3 * policy
    assert with_pictures > 1.5 * policy  # the measure sees what it should see: the sampler's copy
