"""The mix of tasks: every loss where it should be, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.rl.data.tiny.world import FONTS
from tests.models.helpers import edit_policy
from tools.tiny.config import TasksStage
from tools.tiny.samples import edits, pictures, questions, scenes
from tools.tiny.stages import token_loss
from tools.tiny.tasks import (
    IGNORED,
    answer_loss,
    answer_rows,
    drawing_loss,
    editing_loss,
    fit_tasks,
    reading_loss,
    task_sizes,
)


@pytest.fixture(scope="module")
def policy() -> ImagePolicy:
    return edit_policy()[0]


def stage(**changes: Any) -> TasksStage:
    defaults = {"steps": 25, "batch_size": 8, "lr": 3e-3, "warmup_steps": 1, "bf16": False}
    return TasksStage(**(defaults | changes))


def test_batches_are_functions_of_seed_stage_and_step() -> None:
    for draw in (edits, questions):
        batch = draw(0, "tasks", 3, 6, 0.5)
        assert draw(0, "tasks", 3, 6, 0.5) == batch
        for other in (draw(1, "tasks", 3, 6, 0.5), draw(0, "x", 3, 6, 0.5), draw(0, "tasks", 4, 6, 0.5)):
            assert not set(other) & set(batch)  # type: ignore[arg-type]
        assert {one.part for one in draw(0, "tasks", 0, 20, 1.0)} == {"text"}
    assert {edit.source.font for edit in edits(0, "tasks", 0, 20, 0.5, FONTS[1:2])} == {FONTS[1]}


def test_tasks_share_a_batch() -> None:
    assert task_sizes(stage(batch_size=24, edit_share=0.5, question_share=0.33)) == {
        "draw": 4,
        "edit": 12,
        "read": 8,
    }
    assert task_sizes(stage(edit_share=0.0, question_share=0.0)) == {"draw": 8, "edit": 0, "read": 0}


def test_answers_end_the_turn_and_are_padded_with_what_is_ignored(policy: ImagePolicy) -> None:
    rows = answer_rows(policy.text_tokenizer, ["RIVER", "NO"])
    end = policy.text_tokenizer.eos_token_id
    assert rows.shape == (2, 6)  # capitals are tokens of their own
    assert policy.text_tokenizer.decode(rows[0, :5]) == "RIVER" and rows[0, 5] == end
    assert policy.text_tokenizer.decode(rows[1, :2]) == "NO"
    assert rows[1, 2:].tolist() == [end, IGNORED, IGNORED, IGNORED]
    assert rows[0].tolist() == policy.prompts.answers(["RIVER"])[0]


@torch.no_grad()
def test_answer_loss_by_hand(policy: ImagePolicy) -> None:
    """Cross-entropy of each answer's own tokens, computed alone, without padding on either side."""
    shown = torch.randint(16, (2, 8), generator=torch.Generator().manual_seed(0))
    asked = ["what is written?", "what?"]
    answers = answer_rows(policy.text_tokenizer, ["RIVER", "NO"])
    total, count = 0.0, 0
    for row in range(2):
        ids, _ = policy.encode_questions(asked[row : row + 1], shown[row : row + 1])
        wanted = [int(token) for token in answers[row] if token != IGNORED]
        logits = policy.trainable.lm(torch.cat([ids, torch.tensor([wanted])], dim=1)).logits[0].double()
        for place, token in enumerate(wanted):
            total -= logits[ids.shape[1] - 1 + place].log_softmax(-1)[token].item()
            count += 1
    together = answer_loss(policy.trainable.lm, *policy.encode_questions(asked, shown), answers)
    assert together.item() == pytest.approx(total / count, rel=1e-5)


def test_answer_loss_teaches_only_the_answer() -> None:
    """Logits of prompt positions get no gradient, those of answer positions all of it."""
    policy = edit_policy()[0]
    policy.trainable.requires_grad_(True)
    lm = policy.trainable.lm
    seen: list[torch.Tensor] = []

    def watch(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0])

    hook = lm.lm_head.register_forward_pre_hook(watch)
    shown = torch.zeros(2, 8, dtype=torch.long)
    answers = answer_rows(policy.text_tokenizer, ["RIVER", "NO"])
    loss = answer_loss(lm, *policy.encode_questions(["what?", "what?"], shown), answers)
    hook.remove()
    assert seen[0].shape == (2, 6, 32)
    (gradient,) = torch.autograd.grad(loss, seen[0])
    taught = gradient.abs().sum(-1) > 0
    assert torch.equal(taught, answers != IGNORED)


@torch.no_grad()
def test_every_task_is_scored_on_its_own_prompt(policy: ImagePolicy) -> None:
    settings = stage()
    batch = edits(0, "tasks", 2, 3, settings.edit_text_share, settings.fonts)
    reference, tokens = (
        policy.image_tokenizer.encode(pictures([getattr(edit, which) for edit in batch]))
        for which in ("source", "result")
    )
    prompt = policy.encode_prompts([edit.instruction for edit in batch], reference)
    wanted = token_loss(policy.trainable, policy.trainable.hidden_states(*prompt, tokens), tokens)
    assert editing_loss(policy, settings, 0, 2, 3).item() == pytest.approx(wanted.item(), rel=1e-5)

    drawn = scenes(0, "tasks", 2, 3, settings.fonts)
    tokens = policy.image_tokenizer.encode(pictures(drawn))
    prompt = policy.encode_prompts([scene.caption for scene in drawn])
    wanted = token_loss(policy.trainable, policy.trainable.hidden_states(*prompt, tokens), tokens)
    assert drawing_loss(policy, settings, 0, 2, 3).item() == pytest.approx(wanted.item(), rel=1e-5)

    asked = questions(0, "tasks", 2, 3, settings.question_text_share, settings.fonts)
    shown = policy.image_tokenizer.encode(pictures([question.scene for question in asked]))
    prompt = policy.encode_questions([question.text for question in asked], shown)
    answers = answer_rows(policy.text_tokenizer, [question.answer for question in asked])
    wanted = answer_loss(policy.trainable.lm, *prompt, answers)
    assert reading_loss(policy, settings, 0, 2, 3).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_all_tasks_are_learned_and_weighed_by_their_shares() -> None:
    policy = edit_policy()[0]
    policy.trainable.requires_grad_(True)
    decoder = [p.clone() for p in policy.decoder.parameters()]
    log: list[dict[str, float]] = []
    snapshots: list[int] = []
    settings = stage(snapshot_every=10)
    fit_tasks(policy, settings, 0, lambda name, step, metrics: log.append(metrics), snapshots.append)
    first, last = log[0], log[-1]
    assert first["loss"] == pytest.approx(
        0.25 * first["draw"] + 0.5 * first["edit"] + 0.25 * first["read"], rel=1e-5
    )
    for task in ("draw", "edit", "read"):
        assert last[task] < 0.85 * first[task]
    assert snapshots == [10, 20]
    assert all(torch.equal(p, q) for p, q in zip(policy.decoder.parameters(), decoder, strict=True))
