"""Runs small enough for unit tests: the micro model, rewards that need no model, and a recipe for both."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.rewards.base import LoadedReward
from imagerl.rewards.workers.scoring import score_request
from imagerl.rl.config.recipe import apply_override, validate_recipe
from imagerl.rl.config.train import Recipe
from imagerl.rl.data.curriculum import CurriculumSampler
from imagerl.rl.data.seeding import GroupedSampler
from imagerl.rl.data.tiny.world import prompt_set
from imagerl.rl.engine.engine import Engine
from imagerl.rl.rollout.engine import LocalRollouts, RolloutEngine, training_sampling
from imagerl.rl.training.halves import freeze_references, lr_factor, trained_module
from imagerl.rl.training.trainer import Trainer
from imagerl.rl.types import RewardRequest, RewardScores
from tests.micro import micro_policy

REWARD_FILE = '''
def low_tokens(completions, **_):
    """Share of the tokens from the lower half of the 16 codes: easy to learn, seen without decoding."""
    return [sum(token < 8 for token in tokens) / len(tokens) for tokens in completions]


def mostly_low(completions, **_):
    """Whether most of the tokens are from there: groups of two are silent half of the time."""
    return [float(value > 0.5) for value in low_tokens(completions)]


def brightness(images, **_):
    """Mean grey value in [0, 1]."""
    return [sum(image.convert("L").tobytes()) / (255 * image.width * image.height) for image in images]
'''


def recipe_data(folder: Path, *overrides: str, reward: str = "low_tokens") -> dict[str, Any]:
    """A recipe as plain data; the model in `folder/model`, the reward file in `folder`, the run in `folder/run`.
    Numbers are chosen for speed, and `optim.eps` so that Adam does not blow up rounding differences."""
    data: dict[str, Any] = {
        "run": {"steps": 4, "output_dir": str(folder / "run"), "sample_every": 2, "sample_prompts": 2},
        "model": {"path": str(folder / "model")},
        "data": {
            "train": {"name": "tiny_world", "split": "train", "size": 32},
            "heldout": {"name": "tiny_world", "split": "heldout", "size": 4},
        },
        "rollout": {"prompts_per_step": 2, "group_size": 4, "flow_steps": 1},
        "rewards": {"workers": 0, "functions": [{"import_path": f"{folder / 'reward.py'}:{reward}"}]},
        "optim": {"lr": 0.003, "eps": 1e-4},
        "engine": {"device": "cpu", "threads": 1, "micro_batch_size": 8},
        "eval": {"size": 4},
        "checkpoint": {"every": 2},
    }
    for override in overrides:
        apply_override(Recipe, data, override)
    return data


def write_recipe(folder: Path, *overrides: str, name: str = "recipe.yaml", **options: Any) -> Path:
    """The recipe as a file, with the reward file that it names."""
    (folder / "reward.py").write_text(REWARD_FILE)
    path = folder / name
    path.write_text(yaml.safe_dump(recipe_data(folder, *overrides, **options)))
    return path


class FunctionScorer:
    """A `RewardScorer` over plain functions, scored at once."""

    def __init__(self, rewards: Mapping[str, Callable[..., Any]]) -> None:
        self.rewards = [LoadedReward(name, function) for name, function in rewards.items()]
        self.scores: list[RewardScores] = []

    def submit(self, request: RewardRequest, with_gold: bool = False) -> int:
        self.scores.append(score_request(self.rewards, request))
        return len(self.scores) - 1

    def collect(self, ticket: int) -> RewardScores:
        return self.scores[ticket]

    def close(self) -> None:
        pass


def low_tokens(completions: list[list[int]], **_: Any) -> list[float]:
    return [float(np.mean([token < 8 for token in tokens])) for tokens in completions]


def small_trainer(
    *overrides: str,
    policy: ImagePolicy | None = None,
    state: Mapping[str, Any] | None = None,
    specs: Sequence[Mapping[str, Any]] | None = None,
    **rewards: Callable[..., Any],
) -> Trainer:
    """A trainer on a fresh micro policy, put together as the command line does it; `state` is the engine's, `specs` the
    recipe's entries for the rewards."""
    rewards = rewards or {"low_tokens": low_tokens}
    named = specs or [{"import_path": f"unused.py:{name}"} for name in rewards]
    recipe = validate_recipe(Recipe, recipe_data(Path("unused"), *overrides, f"rewards={named}"), "test")
    policy = policy or micro_policy()[0]
    engine = Engine(recipe.engine)
    module = trained_module(policy, recipe)
    freeze_references(policy, recipe)
    total = recipe.run.steps * recipe.algorithm.updates_per_rollout
    engine.prepare(module, recipe.optim, total, state, partial(lr_factor, recipe))
    settings = recipe.rollout
    chosen = prompt_set("train", 32), settings.prompts_per_step, recipe.run.seed
    curriculum = recipe.data.curriculum
    sampler = (
        CurriculumSampler(*chosen, lambda _: None, curriculum) if curriculum else GroupedSampler(*chosen)
    )
    rollout = RolloutEngine(policy, training_sampling(recipe), recipe.run.seed, engine.autocast)
    rollouts = LocalRollouts(recipe, rollout, FunctionScorer(rewards), engine)
    return Trainer(recipe, policy, sampler, rollouts, engine)


# ---- the command line as a process that can be killed ------------------------------------------------------


def _run_main(arguments: Sequence[str], output: Path) -> None:
    import faulthandler

    from imagerl.rl.commands.cli import main

    faulthandler.enable()
    with output.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    main(arguments)


@cache
def _forkserver() -> Any:
    """Processes are forked from one that has everything imported: a start costs nothing instead of 8 s."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            *(
                "imagerl.rl.commands.cli",
                "imagerl.rl.run.loop",
                "imagerl.rl.training.trainer",
                "imagerl.models.blip3o_next.loading",
                "imagerl.rewards.workers.pool",
                "imagerl.rl.files.environment",
            ),
            *("torch.utils.tensorboard", "transformers.models.qwen3.modeling_qwen3", "peft", "accelerate"),
            *("rich.progress", "matplotlib", "imagerl.models.blip3o_next.flow_decoder", "diffusers"),
        ]
    )
    return context


class Command:
    """`imagerl ...` running on its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._output = folder / f"output_{len(list(folder.glob('output_*')))}"
        self._output.touch()
        self._process = _forkserver().Process(target=_run_main, args=(arguments, self._output))
        self._process.start()
        self.pid: int = self._process.pid

    def wait(self, seconds: float = 300) -> int:
        """The exit code; negative: the signal that ended it."""
        self._process.join(seconds)
        if self._process.is_alive():
            self.kill(signal.SIGABRT)  # prints where it hangs
            self._process.join()
            raise TimeoutError(f"still running after {seconds} s: {self.output}")
        return int(self._process.exitcode)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 300) -> None:
        """Look again and again until something is so; fails when the process ends before."""
        end = time.monotonic() + seconds
        while not condition():
            if not self._process.is_alive() or time.monotonic() > end:
                raise AssertionError(f"ended, or took too long: {self.output}")
            time.sleep(0.0005)  # a checkpoint takes longer to write, and others need the processor

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    @property
    def output(self) -> str:
        return self._output.read_text()
