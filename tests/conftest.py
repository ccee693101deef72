from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_traces_of_rewards() -> Iterator[None]:
    """What the rewards of one test set of the process is not kept for those of the next."""
    yield
    if (boundary := sys.modules.get("imagerl.rewards.boundary.guard")) is not None:
        boundary._theirs.clear()
        boundary._their_variables.clear()
    # Variables that DeepSpeed leaves behind: the next test's command would say that it ignores them.
    if (environment := sys.modules.get("imagerl.rl.files.environment")) is not None:
        environment.leave_to_the_recipe()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
