from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.micro import micro_policy
from tests.models.helpers import edit_policy
from tools.tiny.config import DecoderStage
from tools.tiny.decoder import fit_decoder, kept_edits, kept_states
from tools.tiny.samples import edits, pictures, scenes

Log = list[tuple[str, int, dict[str, float]]]


def params(*modules: nn.Module) -> list[torch.Tensor]:
    return [parameter for module in modules for parameter in module.parameters()]


def decoder_stage(**changes: Any) -> DecoderStage:
    defaults = {"steps": 20, "batch_size": 16, "lr": 3e-3, "warmup_steps": 1, "bf16": False}
    return DecoderStage(**(defaults | {"pictures": 64, "pictures_seed": 5} | changes))


@pytest.mark.parametrize("editing", [False, True])
def test_kept_states_are_those_of_inference(editing: bool) -> None:
    policy = edit_policy()[0] if editing else micro_policy()[0]
    kept = (kept_edits if editing else kept_states)(policy, decoder_stage())
    batch: Any = edits(5, "cache", 0, 64, 1 / 3) if editing else scenes(5, "cache", 0, 64)
    wanted = pictures([one.result for one in batch] if editing else batch)
    assert kept.hidden.shape == (64, 9, 32) and kept.latents.shape == (64, *policy.latent_shape)
    assert torch.equal(kept.tokens, policy.image_tokenizer.encode(wanted))
    torch.testing.assert_close(kept.latents, policy.decoder.encode(wanted))
    if editing:
        tokens, latents = policy.reference_of(pictures([batch[9].source]))
        torch.testing.assert_close(kept.reference[9:10], latents)
        prompt = policy.encode_prompts([batch[9].instruction], tokens)
    else:
        assert kept.reference is None
        prompt = policy.encode_prompts([batch[9].caption])
    with torch.no_grad():
        alone = policy.trainable.hidden_states(*prompt, kept.tokens[9:10])[0]
    torch.testing.assert_close(kept.hidden[9], alone, rtol=1e-4, atol=1e-4)


def test_a_new_decoder_learns_while_all_else_stays() -> None:
    results = []
    for _ in range(2):
        policy, _ = micro_policy()
        old = policy.decoder
        old.vae.register_to_config(scaling_factor=0.5)
        kept = (policy.trainable, policy.image_tokenizer)
        before = [p.clone() for module in kept for p in module.parameters()]
        log: Log = []
        fit_decoder(policy, decoder_stage(), 0, lambda *e, log=log: log.append(e))
        assert all(torch.equal(p, q) for p, q in zip(params(*kept), before, strict=True))
        assert policy.decoder is not old and policy.decoder.scaling_factor == 0.5
        assert all(
            torch.equal(p, q) for p, q in zip(params(policy.decoder.vae), params(old.vae), strict=True)
        )
        assert not torch.equal(policy.decoder.connector[0].weight, old.connector[0].weight)
        first, last = log[0][2], log[-1][2]
        assert first["loss"] == pytest.approx(first["flow"] + 0.3 * first["place"] + first["code"], rel=1e-5)
        assert last["loss"] < 0.9 * first["loss"] and last["place"] < first["place"]
        results.append(params(policy.decoder))
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_a_decoder_goes_on_learning_captions_and_edits() -> None:
    policy = edit_policy()[0]
    decoder = policy.decoder
    before = [p.clone() for p in params(policy.trainable, decoder.vae)]
    connector = [p.clone() for p in params(decoder.require_edit())]
    log: Log = []
    settings = decoder_stage(renew=False, edit_share=0.5, steps=30)
    fit_decoder(policy, settings, 0, lambda *e: log.append(e))
    assert policy.decoder is decoder
    assert all(torch.equal(p, q) for p, q in zip(params(policy.trainable, decoder.vae), before, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(params(decoder.require_edit()), connector, strict=True))
    first, last = log[0][2], log[-1][2]
    assert last["flow"] < 0.9 * first["flow"] and last["flow_edits"] < 0.9 * first["flow_edits"]


def test_captions_and_edits_get_their_shares_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = edit_policy()[0]
    seen: list[tuple[int, int | None]] = []
    plain = policy.decoder.flow_loss

    def watched(hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        reference = rest[-1]
        seen.append((len(hidden), None if reference is None else len(reference)))
        return plain(hidden, *rest)

    monkeypatch.setattr(policy.decoder, "flow_loss", watched)
    settings = decoder_stage(renew=False, edit_share=0.25, steps=1)
    log: Log = []
    fit_decoder(policy, settings, 0, lambda *e: log.append(e))
    assert seen == [(12, None), (4, 4)]
    metrics = log[0][2]
    assert metrics["loss"] == pytest.approx(
        metrics["flow"] + 0.3 * metrics["place"] + metrics["code"], rel=1e-5
    )
