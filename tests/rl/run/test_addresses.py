"""A served reward may move between a run and its continuation."""

from imagerl.rl.config.train import Recipe
from imagerl.rl.run.folder import differing_keys


def recipe(**reward: object) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"steps": 1, "output_dir": "x"},
            "data": {"train": {"path": "a.txt"}, "heldout": {"path": "b.txt"}},
            "rewards": [reward],
        }
    )


def test_the_host_of_a_reward_may_change_but_not_what_it_is() -> None:
    first = recipe(url="http://127.0.0.1:8123/ocr")
    assert differing_keys(first, recipe(url="https://gpu-box/rewards/ocr")) == []
    assert differing_keys(first, recipe(url="http://127.0.0.1:8123/clip")) == ["rewards.functions"]
    assert differing_keys(first, recipe(url="http://127.0.0.1:8123/ocr", weight=2.0)) == ["rewards.functions"]
