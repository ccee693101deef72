from __future__ import annotations

import pytest
import torch
from PIL import Image

from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.models.blip3o_next.understanding import greedy_text, text_columns
from imagerl.rl.types import ImageRLError
from tests.models.helpers import edit_policy, lively_policy, random_tokens

QUESTIONS = ["what is written?", "colour?", "what colour is the ink, and what is the background?"]
NEW = 12
PICTURE = Image.new("RGB", (64, 32), "red")


@pytest.fixture(scope="module")
def policy() -> ImagePolicy:
    return lively_policy(3)


def one_by_one(policy: ImagePolicy, ids: torch.Tensor, stop: set[int]) -> list[int]:
    """Greedy decoding without cache, batch or padding."""
    lm, answer = policy.trainable.lm, list[int]()
    for _ in range(NEW):
        with torch.no_grad():
            logits = lm(input_ids=torch.cat([ids, torch.tensor([answer], dtype=torch.long)], dim=1)).logits
        text = logits[
            0, -1, : policy.vocabulary.image_start_tag_id
        ]  # in the tiny vocabulary all text comes first
        token = int(text.argmax())
        if token in stop:
            break
        answer.append(token)
    return answer


def test_answers_of_a_batch_are_those_of_each_question_alone(policy: ImagePolicy) -> None:
    tokens = random_tokens(policy, 3)
    ids, mask = policy.encode_questions(QUESTIONS, tokens)
    assert mask.sum(1).unique().numel() == 3
    free = [one_by_one(policy, row[kept][None], set()) for row, kept in zip(ids, mask, strict=True)]
    stop = {free[1][4]}  # a token that ends one answer early
    found = greedy_text(policy.trainable, ids, mask, stop, NEW)
    wanted = [one_by_one(policy, row[kept][None], stop) for row, kept in zip(ids, mask, strict=True)]
    assert found == wanted
    assert min(map(len, found)) < max(map(len, found))


def test_the_picture_matters(policy: ImagePolicy) -> None:
    tokens = random_tokens(policy, 2)
    asked = policy.encode_questions([QUESTIONS[0]] * 2, tokens)
    first, second = greedy_text(policy.trainable, *asked, set(), NEW)
    assert first != second


def test_only_text_is_written(policy: ImagePolicy) -> None:
    vocabulary = policy.vocabulary
    allowed = text_columns(vocabulary, policy.trainable.lm.config.vocab_size)
    assert allowed.tolist() == [i < vocabulary.image_start_tag_id for i in range(len(allowed))]
    with torch.no_grad():  # however likely an image token is
        policy = lively_policy(3)
        policy.trainable.lm.lm_head.weight[vocabulary.image_start_token_id :] *= 100
    rows = greedy_text(
        policy.trainable, *policy.encode_questions(QUESTIONS[:1], random_tokens(policy, 1)), set(), NEW
    )
    assert len(rows[0]) == NEW and max(rows[0]) < vocabulary.image_start_tag_id


def test_an_answer_is_words_up_to_the_end_of_the_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy, _ = edit_policy()
    asked: dict[str, object] = {}

    def scripted(ar: object, ids: object, mask: object, stop: set[int], limit: int) -> list[list[int]]:
        asked.update(stop=stop, limit=limit)
        return [policy.prompts.plain(" RIVER 42"), []]

    monkeypatch.setattr("imagerl.models.blip3o_next.policy.greedy_text", scripted)
    assert policy.answer([PICTURE] * 2, QUESTIONS[:2], 5) == ["RIVER 42", ""]
    names = policy.text_tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert asked == {"stop": set(names), "limit": 5}


def test_questions_and_pictures_must_pair() -> None:
    policy, _ = edit_policy()
    with pytest.raises(ImageRLError, match="2 prompts need picture tokens"):
        policy.answer([PICTURE] * 3, QUESTIONS[:2])
