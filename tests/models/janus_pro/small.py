"""Small random Janus models in transformers' own classes: the oracle that ours must repeat.

Sizes are those of a config file beside the other parity fixtures, so `IMAGERL_PARITY_DIR` can name others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagerl.models.janus_pro.loading import load_policy
from imagerl.models.janus_pro.policy import JanusPolicy
from imagerl.rl.types import Prompt, Rows
from tests.parity import FOLDER, seeded_weight

CAPTIONS = ('a sign that says "RIVER" in red', "two cats", "a blue cup beside a green plate, seen from above")
PROMPTS = [Prompt(index, caption) for index, caption in enumerate(CAPTIONS)]
BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
IMAGE, BEGIN, END = "<image_placeholder>", "<begin_of_image>", "<end_of_image>"
USER, ASSISTANT = "<|User|>", "<|Assistant|>"
# As the published template: named tokens for the two speakers, the picture before the words, which are stripped.
CHAT = (
    "{% for message in messages %}<|User|>: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image_placeholder>\n{% else %}{{ part['text'].strip() }}{% endif %}"
    "{% endfor %}\n\n{% endfor %}{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
)


def sizes() -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((FOLDER / "janus_pro.json").read_text(encoding="utf-8"))
    return settings


def text_tokenizer() -> Any:
    """A byte-level tokenizer with a few merges, which puts the begin of sequence before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[BOS, EOS, PAD, IMAGE, BEGIN, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([f"{USER}: {caption}" for caption in CAPTIONS], trainer)
    raw.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, raw.token_to_id(BOS))]
    )
    named = {"image_token": IMAGE, "boi_token": BEGIN, "eoi_token": END}
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        extra_special_tokens=named,
    )


def build(vq: dict[str, Any] | None = None, **text_config: Any) -> tuple[Any, Any]:
    """The library's model on seeded weights, and its processor; `vq` and `text_config` override sizes."""
    from transformers import JanusConfig, JanusForConditionalGeneration, JanusProcessor
    from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

    settings, tokenizer = sizes(), text_tokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    vision = settings["vision_config"]
    config = JanusConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            **settings["text_config"],
            **ids,
            **text_config,
        },
        vision_config=vision,
        vq_config={**settings["vq_config"], **(vq or {})},
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=False,
    )
    model = JanusForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(seeded_weight(name, tuple(parameter.shape), settings["seed"]))
    generation = model.generation_config
    generation._from_model_config = False  # as the published converter does
    generation.guidance_scale = 5
    generation.generation_kwargs = {"boi_token_id": tokenizer.convert_tokens_to_ids(BEGIN)}
    side = {"height": vision["image_size"], "width": vision["image_size"]}
    pictures = JanusImageProcessorPil(size=side, min_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = JanusProcessor(
        pictures,
        tokenizer,
        chat_template=CHAT,
        use_default_system_prompt=True,
        num_image_tokens=vision["num_image_tokens"],
    )
    return model, processor


def saved(folder: Path, vq: dict[str, Any] | None = None, **text_config: Any) -> Path:
    """The same in the hub's layout, written by the library."""
    model, processor = build(vq, **text_config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def policy_in(folder: Path) -> JanusPolicy:
    return load_policy(folder, "cpu", torch.float32)


def random_tokens(policy: JanusPolicy, batch: int, seed: int = 0) -> Tensor:
    tokens = policy.prompts.canvas(PROMPTS[0]).tokens
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(policy.trainable.codes, (batch, tokens), generator=draws)


def uniforms(policy: JanusPolicy, batch: int, seed: int = 0) -> Tensor:
    tokens = policy.prompts.canvas(PROMPTS[0]).tokens
    draws = torch.Generator().manual_seed(seed)
    return torch.rand(batch, tokens, generator=draws, dtype=torch.float64)


def their_inputs(processor: Any, captions: tuple[str, ...] = CAPTIONS) -> Any:
    """What the library's own processor makes of captions, in one left-padded batch."""
    messages = [[{"role": "user", "content": [{"type": "text", "text": caption}]}] for caption in captions]
    texts = [processor.apply_chat_template(each, add_generation_prompt=True) for each in messages]
    return processor(text=texts, generation_mode="image", padding=True, return_tensors="pt")


def first(prompts: Rows, count: int) -> Rows:
    return {name: rows[:count] for name, rows in prompts.items()}
