"""The training loop of `recipes/tiny_ocr_grpo.yaml` twice: by ImageRL, and by TRL's own GRPOTrainer, which gets our
rollout engine through `rollout_func` and our reward as one of its `reward_funcs`. docs/trl.md has the result.

    python docs/examples/trl_loop.py --seeds 3 --steps 20
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

RECIPE = "recipes/tiny_ocr_grpo.yaml"
# Both trainers read all settings from the recipe. What only one of them has is switched off: TRL would keep a copy
# of the model as reference, which the loss does not need without KL, and knows no schedule with a decay share.
SHARED = [
    *("algorithm.kl_coef=0", "optim.schedule=constant", "optim.decay_share=1.0", "optim.lr=2e-4"),
    *("rollout.prompts_per_step=6", "rollout.group_size=8", "rewards.workers=0", "engine.threads=1"),
    "gold=[]",
]
BIAS = -1e4  # takes all probability from a token in float32, and stays finite times zero in an entropy


def image_tokens_only(lm: Any, columns: slice) -> None:
    """Give the language model a head whose softmax is over image tokens: TRL scores over the whole vocabulary, and
    the rollout draws from the image tokens alone."""
    head = lm.lm_head
    bias = torch.full((head.out_features,), BIAS)
    bias[columns] = 0.0
    head.bias = nn.Parameter(bias, requires_grad=False)


def train_with_trl(recipe: Any, folder: Path) -> tuple[Any, list[float], list[float]]:
    """The trained policy, and of every step the mean reward and the processor seconds."""
    import transformers
    import trl
    from datasets import Dataset

    from imagerl.models.families import load_policy
    from imagerl.rewards.base import RewardSpec, as_trl_reward, load_rewards
    from imagerl.rewards.workers.scoring import to_pil_images
    from imagerl.rl.data.prompt_sets import load_prompt_set
    from imagerl.rl.data.seeding import GroupedSampler
    from imagerl.rl.engine.engine import Engine
    from imagerl.rl.rollout.engine import RolloutEngine, reward_request, training_sampling
    from imagerl.rl.training.halves import trained_module

    rollout, optim, steps = recipe.rollout, recipe.optim, recipe.run.steps
    engine = Engine(recipe.engine)
    policy: Any = load_policy(recipe.model.path, engine.device)
    trained_module(policy, recipe)
    image_tokens_only(policy.trainable.lm, policy.vocabulary.columns)
    draw = RolloutEngine(policy, training_sampling(recipe), recipe.run.seed, engine.autocast)
    sampler = GroupedSampler(load_prompt_set(recipe.data.train), rollout.prompts_per_step, recipe.run.seed)
    prompts = [prompt for step in range(steps) for prompt in sampler.step(step)]
    by_text = {prompt.text: prompt for prompt in prompts}

    def roll_out(texts: list[str], trainer: Any) -> dict[str, list[Any]]:
        """TRL repeats each prompt `num_generations` times; we sample them as a group."""
        own = [by_text[text] for text in texts[:: rollout.group_size]]
        policy.refresh_sampler()
        (groups,) = draw.generate(own, rollout.group_size, trainer.state.global_step)
        ids, mask = policy.encode_prompts([prompt.text for prompt in own])
        rows = [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]
        tokens = torch.cat([group.tokens for group in groups]) + policy.vocabulary.image_start_token_id
        logprobs = torch.cat([group.rollout_logprobs for group in groups])
        return {
            "prompt_ids": [row for row in rows for _ in range(rollout.group_size)],
            "completion_ids": tokens.tolist(),
            "logprobs": logprobs.tolist(),
            "images": to_pil_images(reward_request(groups).images),
        }

    clock = Clock()
    trainer = trl.GRPOTrainer(
        model=policy.trainable.lm,
        reward_funcs=[
            as_trl_reward(reward.fn, reward.label)
            for reward in load_rewards(
                [RewardSpec.from_mapping(spec.model_dump()) for spec in recipe.rewards.functions]
            )
        ],
        args=trl.GRPOConfig(
            str(folder),
            max_steps=steps,
            num_generations=rollout.group_size,
            per_device_train_batch_size=recipe.engine.micro_batch_size,
            gradient_accumulation_steps=rollout.prompts_per_step
            * rollout.group_size
            // recipe.engine.micro_batch_size,
            max_completion_length=policy.num_actions,
            temperature=rollout.temperature,
            shuffle_dataset=False,
            loss_type="grpo",
            scale_rewards=recipe.algorithm.scale_rewards,
            beta=0.0,
            learning_rate=optim.lr,
            lr_scheduler_type=optim.schedule,
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            adam_epsilon=optim.eps,
            weight_decay=optim.weight_decay,
            max_grad_norm=optim.max_grad_norm,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": p.text, **p.columns} for p in prompts]),
        processing_class=policy.text_tokenizer,
        rollout_func=roll_out,
        callbacks=[clock.callback(transformers.TrainerCallback)],
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    return policy, rewards, clock.seconds


class Clock:
    """Processor seconds of every step of a transformers trainer, sampling and scoring included: other work on the
    machine does not count."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def callback(self, base: type) -> Any:
        seconds = self.seconds

        class Steps(base):  # type: ignore[misc]
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                self.start = time.process_time()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                seconds.append(time.process_time() - self.start)

        return Steps()


def train_with_imagerl(recipe: Any) -> tuple[Any, list[float], list[float]]:
    """The same: what `imagerl train` does, without a run folder."""
    from functools import partial

    from imagerl.models.families import load_policy
    from imagerl.rewards.workers.pool import RewardWorkers
    from imagerl.rl.data.prompt_sets import load_prompt_set
    from imagerl.rl.data.seeding import GroupedSampler
    from imagerl.rl.engine.engine import Engine
    from imagerl.rl.rollout.engine import LocalRollouts, RolloutEngine, training_sampling
    from imagerl.rl.training.halves import lr_factor, trained_module
    from imagerl.rl.training.trainer import Trainer

    engine = Engine(recipe.engine)
    policy: Any = load_policy(recipe.model.path, engine.device)
    module = trained_module(policy, recipe)
    engine.prepare(module, recipe.optim, recipe.run.steps, None, partial(lr_factor, recipe))
    scorer = RewardWorkers([spec.model_dump() for spec in recipe.rewards.functions], workers=0)
    sampler = GroupedSampler(
        load_prompt_set(recipe.data.train), recipe.rollout.prompts_per_step, recipe.run.seed
    )
    draw = RolloutEngine(policy, training_sampling(recipe), recipe.run.seed, engine.autocast)
    trainer = Trainer(recipe, policy, sampler, LocalRollouts(recipe, draw, scorer, engine), engine)
    rewards, seconds = [], []
    for step in range(recipe.run.steps):
        start = time.process_time()
        rewards.append(trainer.step(step)["reward/mean"])
        seconds.append(time.process_time() - start)
    return policy, rewards, seconds


def table(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], block: int = 5) -> str:
    """Mean rewards of blocks of steps, mean ± standard deviation over seeds, and of their paired difference."""
    rows = ["| steps | ImageRL | TRL | TRL − ImageRL, paired by seed |", "|---|---|---|---|"]
    for first in range(0, len(ours[0]), block):
        part = slice(first, first + block)
        means = [[statistics.fmean(run[part]) for run in runs] for runs in (ours, theirs)]
        gaps = [b - a for a, b in zip(*means, strict=True)]
        cells = [spread(values) for values in (*means, gaps)]
        rows.append(f"| {first + 1}–{min(first + block, len(ours[0]))} | {' | '.join(cells)} |")
    return "\n".join(rows)


def spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def main() -> None:
    from imagerl.rl.config.train import load_recipe

    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--json", type=Path, help="write every step's reward and seconds there")
    given = arguments.parse_args()
    found: dict[str, list[list[float]]] = {"ours": [], "theirs": [], "our_s": [], "their_s": []}
    for seed in range(given.seeds):
        with tempfile.TemporaryDirectory() as folder:
            place = [f"run.seed={seed}", f"run.steps={given.steps}", f"run.output_dir={folder}/run"]
            recipe = load_recipe(RECIPE, [*SHARED, *place])
            _, theirs, their_seconds = train_with_trl(recipe, Path(folder))
            _, ours, our_seconds = train_with_imagerl(recipe)
        for name, values in zip(found, (ours, theirs, our_seconds, their_seconds), strict=True):
            found[name].append(values)
        print(f"seed {seed}: first step {ours[0]:.6f} and {theirs[0]:.6f}", flush=True)
        if given.json:
            given.json.write_text(json.dumps(found))
    print(table(found["ours"], found["theirs"]))
    our_step, their_step = (statistics.median(chain(*found[name])) for name in ("our_s", "their_s"))
    print(f"median step: ImageRL {our_step:.2f} processor seconds, TRL {their_step:.2f}")


if __name__ == "__main__":
    main()
