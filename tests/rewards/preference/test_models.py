"""Preference models by name: small random models of the real architectures, in the files that their authors give out,
score as the public code does, written down here step by step."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from imagerl.rewards.base import REWARDS, RewardSpec, check_reward, load_reward
from imagerl.rewards.judge.rubrics import load_rubric
from imagerl.rewards.preference.presets import PRESETS
from imagerl.rl.types import ImageRLError
from tests.rewards.clip_folders import CAPTIONS, need_open_clip, open_clip_folder, transformers_folder

PROMPTS = ["a red ball", "three green birds", "a red ball"]


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


PICTURES = pictures((40, 30), (24, 24), (30, 60))


def scores(name: str, **settings: Any) -> list[float]:
    return list(load_reward(name, **settings)[1](prompts=PROMPTS, images=PICTURES, completions=[]).rewards)


def test_pickscore_is_the_scaled_cosine(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    folder = transformers_folder(tmp_path, "clip")
    model = CLIPModel.from_pretrained(folder).eval()
    pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")(images=PICTURES, return_tensors="pt")
    words = AutoTokenizer.from_pretrained(folder)(
        PROMPTS, padding="max_length", max_length=12, return_tensors="pt"
    )
    with torch.no_grad():
        output = model(**pixels, input_ids=words["input_ids"], attention_mask=words["attention_mask"])
    expected = model.logit_scale.exp() * (output.image_embeds * output.text_embeds).sum(-1)
    assert scores("pickscore", model=folder) == pytest.approx(expected.tolist(), abs=1e-4)


def test_hpsv2_is_the_cosine_of_weights_in_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file holds {"state_dict": …} of an architecture that open_clip knows by name."""
    open_clip = need_open_clip()

    def no_hub(*_: str) -> str:
        raise OSError("no network here")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_hub)
    folder = open_clip_folder(tmp_path / "model")
    assert PRESETS["hpsv2"][1]["model"] in open_clip.list_models()
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}", precision="fp32")
    with torch.no_grad():
        seen = model.eval().encode_image(torch.stack([preprocess(p) for p in PICTURES]), normalize=True)
        read = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(PROMPTS), normalize=True)
    expected = torch.diagonal(seen @ read.T).tolist()
    assert scores("clip", model=folder, head=PRESETS["hpsv2"][1]["head"]) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ImageRLError, match=r"there is no file gone\.pt"):
        scores("hpsv2", pretrained="gone.pt")
    with pytest.raises(ImageRLError, match=r"xswu/HPSv2/HPS_v2\.1_compressed\.pt cannot be fetched"):
        scores("hpsv2")


def test_aesthetic_is_five_linear_layers_on_normalised_features(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, CLIPModel

    folder = transformers_folder(tmp_path, "clip")
    torch.manual_seed(1)
    widths = (8, 12, 10, 6, 4, 1)
    layers: list[nn.Module] = []
    for index, (taken, made) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(taken, made)] + ([nn.Dropout(0.2)] if index < 3 else [])
    network = nn.Sequential(*layers).eval()
    torch.save(
        {f"layers.{name}": value for name, value in network.state_dict().items()}, tmp_path / "head.pth"
    )
    pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")(images=PICTURES, return_tensors="pt")
    with torch.no_grad():
        features = CLIPModel.from_pretrained(folder).eval().get_image_features(**pixels).pooler_output
        expected = network(features / features.norm(dim=-1, keepdim=True))[:, 0]
    got = scores("aesthetic", model=folder, head=str(tmp_path / "head.pth"))
    assert got == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_preset_that_cannot_be_made_is_named_as_it_was_called() -> None:
    with pytest.raises(ImageRLError, match=r"^reward 'pickscore': there is no folder \./nothing"):
        load_reward("pickscore", model="./nothing")


# ---- ImageReward ---------------------------------------------------------------------------------------------


def bert_folder(folder: Path) -> str:
    from transformers import BertTokenizerFast

    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    vocabulary = {
        word: place for place, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    }
    BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    return str(folder)


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def vit_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Two blocks of BLIP's vision transformer on 32 pixels."""
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, width), "pos_embed": (1, 5, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,)}
    for block in range(2):
        for name, size in (("attn.qkv", 3), ("attn.proj", 1), ("mlp.fc1", 2)):
            shapes |= {
                f"blocks.{block}.{name}.weight": (size * width, width),
                f"blocks.{block}.{name}.bias": (size * width,),
            }
        shapes |= {
            f"blocks.{block}.mlp.fc2.weight": (width, 2 * width),
            f"blocks.{block}.mlp.fc2.bias": (width,),
        }
        shapes |= {
            f"blocks.{block}.{norm}.{part}": (width,)
            for norm in ("norm1", "norm2")
            for part in ("weight", "bias")
        }
    return shapes | {"norm.weight": (width,), "norm.bias": (width,)}


def vit(state: dict[str, Tensor], pixels: Tensor, heads: int) -> Tensor:
    """BLIP's vision transformer, pre-norm, written out."""

    def norm(x: Tensor, name: str) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return nn.functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    x = nn.functional.conv2d(
        pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16
    )
    x = (
        torch.cat([state["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
        + state["pos_embed"]
    )
    for block in ("blocks.0", "blocks.1"):
        size, length, width = x.shape
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").reshape(size, length, 3, heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(width // heads)).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).reshape(size, length, width), f"{block}.attn.proj")
        x = x + linear(
            nn.functional.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2"
        )
    return norm(x, "norm")


def test_image_reward_is_its_public_formula(tmp_path: Path) -> None:
    """BLIP's picture half written out by hand, its text half as transformers has it, linear layers, standardised."""
    from transformers import AutoTokenizer, BlipTextConfig, BlipTextModel

    torch.manual_seed(2)
    width, words = 128, 64
    vision = random_state(vit_shapes(width))
    config = BlipTextConfig(
        vocab_size=40, hidden_size=words, encoder_hidden_size=width, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    text = BlipTextModel(config, add_pooling_layer=False).eval()
    mlp = nn.Sequential(
        nn.Linear(words, 8), nn.Dropout(0.2), nn.Linear(8, 4), nn.Dropout(0.2), nn.Linear(4, 1)
    ).eval()
    with torch.no_grad():
        for value in (*text.parameters(), *mlp.parameters()):
            value.normal_(0, 0.5)
    state = {f"blip.visual_encoder.{name}": value for name, value in vision.items()}
    state |= {f"blip.text_encoder.{name}": value for name, value in text.state_dict().items()}
    state |= {"blip.text_encoder.embeddings.position_ids": torch.arange(64)[None]}
    state |= {f"mlp.layers.{name}": value for name, value in mlp.state_dict().items()} | {
        "blip.vision_proj.bias": torch.ones(2)
    }
    torch.save(state, tmp_path / "ImageReward.pt")
    settings = {"weights": str(tmp_path / "ImageReward.pt"), "tokenizer": bert_folder(tmp_path / "bert")}

    pixels = []
    for picture in PICTURES:  # the shorter side to 32, bicubic; the middle; CLIP's mean and deviation
        scale = 32 / min(picture.size)
        w, h = (int(side * scale) for side in picture.size)
        left, top = (w - 32) // 2, (h - 32) // 2
        middle = picture.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
        values = torch.from_numpy(np.asarray(middle, np.float32) / 255).permute(2, 0, 1)
        mean, std = (
            torch.tensor([0.48145466, 0.4578275, 0.40821073]),
            torch.tensor([0.26862954, 0.26130258, 0.27577711]),
        )
        pixels.append((values - mean[:, None, None]) / std[:, None, None])
    read = AutoTokenizer.from_pretrained(settings["tokenizer"])(
        PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    with torch.no_grad():
        seen = vit(vision, torch.stack(pixels), heads=2)
        output = text(
            read["input_ids"], read["attention_mask"], encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long),
        )  # fmt: skip
        raw = mlp(output.last_hidden_state[:, 0])[:, 0]
    expected = (raw - 0.16717362830052426) / 1.0333394966054072
    assert expected.std() > 0.05  # a formula that ignored the pictures would be seen
    assert scores("image_reward", **settings) == pytest.approx(expected.tolist(), abs=2e-4)
    _, reward = load_reward("image_reward", **settings)
    assert reward(prompts=["", "a"], images=PICTURES[:2]).rewards[0] is None
    torch.save(
        {name: value for name, value in state.items() if "blocks.1.norm1" not in name},
        tmp_path / "ImageReward.pt",
    )
    with pytest.raises(ImageRLError, match="holds other weights"):
        load_reward("image_reward", **settings)
    torch.save({"mlp.0.weight": torch.ones(1, 2)}, tmp_path / "ImageReward.pt")
    with pytest.raises(ImageRLError, match="holds no ImageReward"):
        load_reward("image_reward", **settings)


# ---- HPSv3 and EditReward ------------------------------------------------------------------------------------

SPECIALS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def qwen(folder: Path, kind: str, heads: int) -> tuple[Any, list[nn.Sequential], dict[str, str]]:
    """A small model of the family with `heads` reward heads, its `base` folder, and the file of weights with the names
    of the public one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({token: place for place, token in enumerate(alphabet)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS})
    ids = dict(zip(SPECIALS, tokenizer.convert_tokens_to_ids(SPECIALS), strict=True))
    common = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    text = common | {
        "vocab_size": len(tokenizer) + 1, "num_hidden_layers": 2, "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    }  # fmt: skip
    if kind == "qwen2_vl":
        vision: dict[str, Any] = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}
    else:
        vision = {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 16,
        }
    config = AutoConfig.for_model(
        kind, text_config=text, vision_config=vision, image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
    )  # fmt: skip
    torch.manual_seed(4)
    model = AutoModel.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(0, 0.3)
    for part in (config, tokenizer, Qwen2VLImageProcessorPil()):
        part.save_pretrained(folder / "base")
    networks = [
        nn.Sequential(
            nn.Linear(16, 8), nn.ReLU(), nn.Dropout(0.05), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)
        ).eval()
        for _ in range(heads)
    ]
    with torch.no_grad():
        for network in networks:
            for value in network.parameters():
                value.normal_(0, 2)
    prefix = (lambda index: "rm_head.") if heads == 1 else (lambda index: f"rm_heads.head_{index}.")
    state = {
        (f"model.{n.removeprefix('language_model.')}" if kind == "qwen2_vl" and n.startswith("lang")
         else n if kind == "qwen2_vl" else f"model.{n}"): v.contiguous().clone() for n, v in model.state_dict().items()
    }  # fmt: skip
    state |= {prefix(i) + n: v for i, network in enumerate(networks) for n, v in network.state_dict().items()}
    save_file(state | {"lm_head.weight": torch.ones(2, 2)}, folder / "weights.safetensors")
    return model, networks, {"weights": str(folder / "weights.safetensors"), "base": str(folder / "base")}


@pytest.mark.parametrize(
    ("name", "kind", "heads"), [("hpsv3", "qwen2_vl", 1), ("edit_reward", "qwen2_5_vl", 2)]
)
def test_a_reward_head_is_read_at_its_token(tmp_path: Path, name: str, kind: str, heads: int) -> None:
    """One sample at a time and without padding: chat, pictures, question; positions one behind the other; the hidden
    state of <|Reward|> through the head; the mean of the heads' first numbers."""
    from transformers import AutoImageProcessor, AutoTokenizer

    model, networks, settings = qwen(tmp_path, kind, heads)
    questions = [f"Question {index}: {{prompt}}\nRating: <|Reward|>\nEND\n" for index in range(heads)]
    for index, question in enumerate(questions):
        (tmp_path / f"{index}.txt").write_text(question)
    asked = {
        **settings,
        "questions": [str(tmp_path / f"{i}.txt") for i in range(heads)],
        "pixels": 4 * 28 * 28,
    }
    sources = pictures((30, 30), (50, 40), (30, 30)) if heads == 2 else None
    tokenizer = AutoTokenizer.from_pretrained(settings["base"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    special = tokenizer.convert_tokens_to_ids("<|Reward|>")
    processor = AutoImageProcessor.from_pretrained(settings["base"], backend="pil")
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 4 * 28 * 28}
    expected = []
    for row, prompt in enumerate(PROMPTS):
        shown = [sources[row], PICTURES[row]] if sources else [PICTURES[row]]
        seen = processor(images=shown, size=size, return_tensors="pt")
        told = []
        for question, network in zip(questions, networks, strict=True):
            pads = [
                f"<|vision_start|>{'<|image_pad|>' * int(g.prod() // 4)}<|vision_end|>"
                for g in seen["image_grid_thw"]
            ]
            text = (
                "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n" + "".join(pads)
                + question.replace("{prompt}", prompt) + "<|im_end|>\n<|im_start|>assistant\n"
            )  # fmt: skip
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
            with torch.no_grad():
                hidden = model(input_ids=ids, position_ids=positions, **seen).last_hidden_state
                told.append(network(hidden[ids == special])[0])
        expected.append(torch.stack(told))
    label, reward = load_reward(name, **asked)
    output = reward(prompts=PROMPTS, images=PICTURES, **({"reference": sources} if sources else {}))
    assert label == name and output.rewards == pytest.approx(
        [float(t[:, 0].mean()) for t in expected], abs=1e-4
    )
    assert np.ptp(output.rewards) > 1e-3
    assert output.breakdown["sigma_0"] == pytest.approx([float(t[0, 1]) for t in expected], rel=1e-4)
    if sources:
        alone = reward(prompts=PROMPTS, images=PICTURES, reference=[None, *sources[1:]])
        assert alone.rewards[0] is None and alone.rewards[1:] == pytest.approx(output.rewards[1:], rel=1e-4)
        with pytest.raises(ImageRLError, match="needs the column reference"):
            reward(prompts=PROMPTS, images=PICTURES)
    (tmp_path / "0.txt").write_text("{prompt}")
    with pytest.raises(ImageRLError, match=r"0\.txt must hold \{prompt\} and, once, <\|Reward\|>"):
        load_reward(name, **asked)
    (tmp_path / "0.txt").write_text(questions[0])
    with pytest.raises(ImageRLError, match="holds no model with 3 reward heads"):
        load_reward(name, **{**asked, "questions": [str(tmp_path / "0.txt")] * 3})


# ---- judges and names ----------------------------------------------------------------------------------------


def test_unified_reward_is_the_mean_of_two_scores_in_words() -> None:
    rubric = load_rubric("unified_reward")
    assert not rubric.has_form and not rubric.system and rubric.fields == []
    value, parts = rubric.score("Alignment Score (1-5): 4.6\nCoherence Score (1-5): 1\nStyle Score (1-5): 3")
    assert parts == pytest.approx({"alignment": 0.9, "style": 0.5}) and value == pytest.approx(0.7)
    for answer, text in [
        ("fine", "gave no marks"),
        ("alignment score (1-5): 7\nstyle score (1-5): 1", "gave 7.0"),
    ]:
        with pytest.raises(ValueError, match=text):
            rubric.score(answer)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_reward_with_settings_that_it_takes(name: str) -> None:
    base, _ = PRESETS[name]
    assert base in REWARDS
    needed = {"edit_reward": {"weights": "w", "questions": []}, "hpsv3": {"questions": []}}.get(name, {})
    more = {"endpoint": "http://127.0.0.1:1/v1"} if base == "judge" else {}
    assert check_reward(RewardSpec(name, settings={**needed, **more})) == name
    with pytest.raises(ImageRLError, match="has no setting 'colour'"):
        check_reward(RewardSpec(name, settings={**needed, **more, "colour": 1}))
