from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from imagerl.models import families
from imagerl.models.janus_pro.family import JanusPro
from imagerl.models.janus_pro.prompts import JanusPrompts
from imagerl.rl.types import ImageRLError, Prompt
from tests.models.janus_pro.small import CAPTIONS, PROMPTS, policy_in, saved, their_inputs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "janus")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_export_loads_in_the_library_unchanged_and_generates_the_same(
    folder: Path, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    from transformers import JanusForConditionalGeneration, JanusProcessor

    policy = policy_in(folder)
    with torch.no_grad():
        for parameter in policy.trainable.parameters():
            parameter.mul_(1.05)
            if dtype is not None:
                parameter.copy_(parameter.to(dtype))
    policy.sampling = replace(policy.sampling, token_guidance=3.0)
    out = tmp_path / "out"
    out.mkdir()
    policy.save(out, "janus", folder, dtype)
    model, found = JanusForConditionalGeneration.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values())
    assert {path.name for path in folder.iterdir()} == {path.name for path in out.iterdir()}
    stored = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype or torch.float32}
    inputs = their_inputs(JanusProcessor.from_pretrained(out))
    theirs = model.generate(**inputs, generation_mode="image", do_sample=False)
    greedy = replace(policy.sampling, temperature=1e-4)
    numbers = torch.full(theirs.shape, 0.5, dtype=torch.float64)
    assert torch.equal(policy.sample_tokens(policy.encode(PROMPTS), numbers, greedy).tokens, theirs)
    assert model.generation_config.guidance_scale == 3.0 and policy_in(out).sampling == policy.sampling


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    settings = json.loads((folder / name).read_text())
    change(settings)
    (folder / name).write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(model_type="multi_modality"), r"DeepSeek's own format.*deepseek-community/Janus"),
        (lambda c: c.update(model_type="llava"), r"type 'llava' that is of none of the families .*janus_pro"),
        (lambda c: c.update(quantization_config={"bits": 4}), "quantised weights do not train"),
        (lambda c: c["text_config"].update(hidden_act="gelu"), "text_config.hidden_act must be 'silu'"),
        (lambda c: c["text_config"].update(attention_bias=True), "text_config.attention_bias must be False"),
        (lambda c: c["vision_config"].update(num_image_tokens=9), "is 9, but the VQ decoder draws 16"),
        (lambda c: c["vision_config"].update(hidden_size="x"), "describes no Janus model"),
        (lambda c: c["text_config"].update(num_hidden_layers=3), "tensors are missing, such as"),
        (lambda c: c["text_config"].update(vocab_size=9), "do not fit"),
    ],
)
def test_a_folder_that_is_not_as_it_should_be_is_refused_in_one_line(
    folder: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit(folder, "config.json", change)
    with pytest.raises(ImageRLError, match=message) as refusal:
        families.load_policy(str(folder))
    assert "\n" not in str(refusal.value)


def test_pickles_and_numbers_that_are_not_finite_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.generation_head.proj_out.bias"][0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ImageRLError, match=r"generation_head\.proj_out\.bias.*not finite"):
        families.load_policy(str(folder))
    file.rename(folder / "pytorch_model.bin")
    with pytest.raises(ImageRLError, match="safetensors"):
        families.load_policy(str(folder))


def test_a_folder_without_its_template_or_guidance(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    policy = policy_in(folder)  # what the published models say, and the tokenizer
    assert policy.sampling.token_guidance == 5.0
    assert policy.trainable.blank == policy_in(saved(folder)).trainable.blank
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ImageRLError, match=r"no chat template that works; copy chat_template\.jinja"):
        families.load_prompts(str(folder))


def test_words_are_plain_text_in_captions_and_in_questions(folder: Path) -> None:
    reader = families.load_prompts(str(folder))
    assert isinstance(reader, JanusPrompts)
    begin, image = (
        reader.tokenizer.convert_tokens_to_ids(n) for n in ("<begin_of_image>", "<image_placeholder>")
    )
    words = "a <begin_of_image><|Assistant|> <image_placeholder> b"
    for ids, pictures in ((reader.caption(words), 0), (reader.question(words), 16)):
        assert ids.count(begin) == 1 and ids.count(image) == pictures
        assert words in reader.tokenizer.decode(ids)
    assert reader.caption(f"  {CAPTIONS[1]}\n") == reader.caption(CAPTIONS[1])  # as the template strips it


def test_prompts_that_cannot_be_drawn(folder: Path) -> None:
    reader = families.load_prompts(str(folder))
    with pytest.raises(ImageRLError, match=r"prompt 4: .* is \d+ tokens long .* takes 496.*shorten it"):
        reader.require([Prompt(3, "xy " * 400)])
    with pytest.raises(ImageRLError, match="prompt 4: Janus-Pro does not edit pictures"):
        reader.require([Prompt(3, "make it red", {"reference": "sign.png"})])


def test_the_outline_has_the_shapes_of_the_model(folder: Path) -> None:
    family = JanusPro()
    outline, loaded = family.outline(folder), family.load(folder, "cpu", torch.float32)
    shapes = {name: p.shape for name, p in loaded.trainable.named_parameters()}
    sized = dict(outline.policy().trainable.named_parameters())
    assert {name: p.shape for name, p in sized.items()} == shapes
    assert all(p.is_meta and p.requires_grad for p in sized.values())
    assert outline.prompts.longest(PROMPTS) == loaded.prompts.longest(PROMPTS)


@pytest.mark.parametrize(("size", "billions"), [("1B", 1.6), ("7B", 6.9)])
def test_published_models_are_known_by_their_names(size: str, billions: float) -> None:
    """What the names count is the language model with its head: DeepSeek-LLM 1.5B and 7B."""
    outline = JanusPro().published(f"deepseek-community/Janus-Pro-{size}@main")
    assert outline is not None and JanusPro().published("BLIP3o/BLIP3o-NEXT-SFT-3B") is None
    model = outline.policy().model
    count = sum(p.numel() for p in model.model.language_model.parameters()) + model.lm_head.weight.numel()
    assert count / 1e9 == pytest.approx(billions, abs=0.1)
    assert outline.prompts.canvas(PROMPTS[0]) == (576, (384, 384), None, (24, 24))
    assert outline.prompts.token_guided
