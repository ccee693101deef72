"""The stage that teaches one language model three tasks: to draw pictures, to edit them and to read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.tiny.config import TasksStage
from tools.tiny.samples import edits, pictures, questions, scenes
from tools.tiny.stages import fit, token_loss

IGNORED = -100  # what cross-entropy leaves out


def answer_rows(text_tokenizer: Any, answers: Sequence[str]) -> Tensor:
    """Return [B, A] ids of the answers, each closed by the end of the turn, then IGNORED."""
    rows = [
        [*text_tokenizer(answer, add_special_tokens=False)["input_ids"], text_tokenizer.eos_token_id]
        for answer in answers
    ]
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [IGNORED] * (longest - len(row)) for row in rows])


def answer_loss(lm: Any, prompt_ids: Tensor, prompt_mask: Tensor, answers: Tensor) -> Tensor:
    """Return cross-entropy of the answers [B, A] alone, over the whole vocabulary, after left-padded prompts [B, L].

    What is IGNORED stands after an answer, where causal attention keeps it from mattering."""
    ids = torch.cat([prompt_ids, answers.clamp(min=0)], dim=1)
    mask = torch.cat([prompt_mask, torch.ones_like(answers, dtype=torch.bool)], dim=1)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    out = lm.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    logits = lm.lm_head(out.last_hidden_state[:, prompt_ids.shape[1] - 1 : -1]).float()
    return F.cross_entropy(logits.flatten(0, 1), answers.flatten(), ignore_index=IGNORED)


def drawing_loss(policy: Any, stage: TasksStage, seed: int, step: int, count: int) -> Tensor:
    batch = scenes(seed, "tasks", step, count, stage.fonts)
    tokens = policy.image_tokenizer.encode(pictures(batch).to(policy.device))
    prompt = policy.encode_prompts([scene.caption for scene in batch])
    return token_loss(policy.trainable, policy.trainable.hidden_states(*prompt, tokens), tokens)


def editing_loss(policy: Any, stage: TasksStage, seed: int, step: int, count: int) -> Tensor:
    batch = edits(seed, "tasks", step, count, stage.edit_text_share, stage.fonts)
    both = pictures([edit.source for edit in batch] + [edit.result for edit in batch]).to(policy.device)
    reference, tokens = policy.image_tokenizer.encode(both).chunk(2)
    prompt = policy.encode_prompts([edit.instruction for edit in batch], reference)
    return token_loss(policy.trainable, policy.trainable.hidden_states(*prompt, tokens), tokens)


def reading_loss(policy: Any, stage: TasksStage, seed: int, step: int, count: int) -> Tensor:
    batch = questions(seed, "tasks", step, count, stage.question_text_share, stage.fonts)
    shown = policy.image_tokenizer.encode(pictures([question.scene for question in batch]).to(policy.device))
    ids, mask = policy.encode_questions([question.text for question in batch], shown)
    answers = answer_rows(policy.text_tokenizer, [question.answer for question in batch])
    return answer_loss(policy.trainable.lm, ids, mask, answers.to(policy.device))


def task_sizes(stage: TasksStage) -> dict[str, int]:
    """Return how many samples of a batch each task gets."""
    edit, question = (round(stage.batch_size * share) for share in (stage.edit_share, stage.question_share))
    return {"draw": stage.batch_size - edit - question, "edit": edit, "read": question}


def fit_tasks(
    policy: Any,
    stage: TasksStage,
    seed: int,
    log: Callable[[str, int, dict[str, float]], None],
    on_snapshot: Callable[[int], None] = lambda step: None,
) -> None:
    """Train the language model on all tasks at once; the sequences of each are padded among themselves only.

    The loss is the mean over samples, so that a short answer weighs as much as a picture."""
    policy.image_tokenizer.requires_grad_(False).eval()
    module: nn.Module = policy.trainable
    losses = {"draw": drawing_loss, "edit": editing_loss, "read": reading_loss}
    sizes = {task: size for task, size in task_sizes(stage).items() if size}

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        if step and step % stage.snapshot_every == 0:
            module.eval()
            on_snapshot(step)
            module.train()
        with torch.autocast(policy.device.type, torch.bfloat16, enabled=stage.bf16):
            parts = {task: losses[task](policy, stage, seed, step, size) for task, size in sizes.items()}
        total = torch.stack([parts[task] * (size / stage.batch_size) for task, size in sizes.items()]).sum()
        return total, {task: part.item() for task, part in parts.items()}

    fit("tasks", module, loss_of, stage, log)
