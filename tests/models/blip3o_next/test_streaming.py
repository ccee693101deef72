"""How much memory loading takes, measured in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagerl.models.common.shards import Shards
from tests.micro import micro_folder
from tests.resident import alone

MEASURE = """
import json, sys
from pathlib import Path
from imagerl.models.blip3o_next.loading import load_policy, load_state, read_weights
from imagerl.models.blip3o_next.building import build_policy
from tests.resident import grown
warm, big = sys.argv[1:]
load_policy(warm)  # imports everything that loading imports
def naive():
    policy, config = load_policy(big)
    fresh = build_policy(config, policy.text_tokenizer)
    load_state(fresh, read_weights(Path(big)), Path(big))
print(json.dumps([grown(lambda: load_policy(big)), grown(naive)]))
"""


@pytest.mark.slow
def test_loading_needs_little_more_memory_than_the_checkpoint_has_bytes(tmp_path: Path) -> None:
    warm = micro_folder(tmp_path / "warm")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "head_dim": 64}
    big = micro_folder(tmp_path / "big", **sizes)
    checkpoint = Shards(big).nbytes
    assert checkpoint > 80e6
    streamed, naive = alone(MEASURE, str(warm), str(big))
    assert 0.9 * checkpoint < streamed < 1.3 * checkpoint
    assert naive > 1.8 * checkpoint  # the measure sees what it should see
