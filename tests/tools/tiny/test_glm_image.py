from __future__ import annotations

from pathlib import Path

import pytest

from imagerl.models import families
from tools.tiny import glm_image
from tools.tiny.number_world import scenes
from tools.tiny.samples import pictures


@pytest.mark.slow
def test_a_model_is_written_whose_tokens_tell_pictures_apart(tmp_path: Path) -> None:
    glm_image.run(tmp_path / "glm", steps=1, count=64, seed=0)
    policy = families.load_policy(str(tmp_path / "glm" / "model"))
    tokens = policy.tokens_of(pictures(scenes("heldout", 12), (64, 32)))  # type: ignore[attr-defined]
    assert tokens.shape == (12, 242 + 2) and len({tuple(row) for row in tokens[:, -2:].tolist()}) > 6
