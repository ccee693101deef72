from __future__ import annotations

from pathlib import Path

import pytest

from imagerl.models import families
from tools.tiny import glm_image
from tools.tiny.number_world import scenes
from tools.tiny.samples import pictures


@pytest.mark.slow
def test_a_model_is_written_whose_tokens_tell_grounds_apart(tmp_path: Path) -> None:
    glm_image.run(tmp_path / "glm", steps=1, count=64, seed=0)
    policy = families.load_policy(str(tmp_path / "glm" / "model"))
    batch = scenes("heldout", 24)
    tokens = policy.tokens_of(pictures(batch, (64, 32)))  # type: ignore[attr-defined]
    assert tokens.shape == (24, 242 + 2)
    # The upper left corner of the preview is the ground: one code, and no other ground's.
    corners = {(code, scene.background) for code, scene in zip(tokens[:, 0].tolist(), batch, strict=True)}
    assert len(corners) == len({code for code, _ in corners}) == len({ground for _, ground in corners}) == 4
    assert len({tuple(row) for row in tokens[:, -2:].tolist()}) > 12
