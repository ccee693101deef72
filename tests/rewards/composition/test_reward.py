"""Composition: exact on drawings, the right questions to detectors and colour models, and what is refused."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from imagerl.rewards.clip.models import ClipModel
from imagerl.rewards.composition import reward as composition
from imagerl.rewards.composition.detectors import ClipColours, OpenVocabularyDetector
from imagerl.rewards.composition.reward import CompositionReward
from imagerl.rewards.composition.rule import Found
from imagerl.rewards.composition.tiny import GREY, GROUNDS, INKS, SHAPE_COLOURS, find_words
from imagerl.rewards.composition.tiny import SHAPES as FOUND_SHAPES
from imagerl.rl.data.tiny import shapes as tiny_shapes
from imagerl.rl.data.tiny import world as tiny_world
from imagerl.rl.data.tiny.pictures import check_pictures
from imagerl.rl.data.tiny.shapes import COLOURS, SHAPES, TAGS, Shape, answer, draw, metadata, shape_set
from imagerl.rl.types import ImageRLError, RewardOutput


def judge(images: Sequence[Image.Image], wanted: Sequence[Any], **settings: Any) -> RewardOutput:
    columns = {name: [line.get(name) for line in wanted] for name in ("include", "exclude", "tag")}
    return CompositionReward("shapes", **settings)(images=images, **columns)


def test_the_palettes_are_those_of_the_worlds() -> None:
    assert (INKS, GROUNDS) == (tiny_world.INKS, tiny_world.BACKGROUNDS)
    assert (SHAPE_COLOURS, GREY, FOUND_SHAPES) == (COLOURS, tiny_shapes.GREY, SHAPES)


def test_every_true_drawing_is_right_and_every_wrong_one_wrong() -> None:
    """Of all six tags; wrong ones miss a shape, have one too many, another colour, or another place."""
    rng = random.Random(0)
    right, wrong = [], []
    for number in range(60):
        line = rng.choice(metadata("train")[TAGS[number % 6]])
        shapes = answer(rng, line)
        right.append((draw(shapes), line))
        wrong.append((draw(shapes[:-1]), line))
        if line["tag"] == "counting":
            free = next((c, r) for c in range(4) for r in range(2) if (c, r) not in [s.cell for s in shapes])
            wrong.append((draw([*shapes, replace(shapes[0], cell=free)]), line))
        if line["tag"] in ("colors", "color_attr"):
            other = rng.choice([name for name in COLOURS if name != shapes[0].colour])
            wrong.append((draw([replace(shapes[0], colour=other), *shapes[1:]]), line))
        if line["tag"] == "position":
            a, b = shapes
            wrong.append((draw([replace(a, cell=b.cell), replace(b, cell=a.cell)]), line))
        if line["tag"] == "single_object":
            name = rng.choice([name for name in SHAPES if name != shapes[0].name])
            wrong.append((draw([replace(shapes[0], name=name)]), line))
    output = judge(*zip(*right, strict=True))
    assert set(output.rewards) == set(output.breakdown["exact"]) == {1.0}
    assert set(judge(*zip(*wrong, strict=True)).rewards) == {0.0}


def test_parts_and_partial_credit() -> None:
    line = {
        "tag": "color_attr",
        "include": [
            {"class": "square", "count": 1, "color": "red"},
            {"class": "circle", "count": 1, "color": "blue"},
        ],
    }
    shapes = [Shape("square", "red", (0, 0)), Shape("circle", "green", (2, 1))]
    output = judge([draw(shapes)], [line], credit="partial")
    assert list(output.rewards) == [0.5]
    assert {name: list(values) for name, values in output.breakdown.items()} == {
        "correct": [0.0],
        "exact": [0.0],
        "fulfilled": [0.5],
        "fault_missing": [0.0],
        "fault_colour": [0.5],
        "fault_position": [0.0],
        "fault_too_many": [0.0],
        "tag_color_attr": [0.0],
    }


def test_more_than_asked_for_is_correct_but_not_exact() -> None:
    line = {"tag": "single_object", "include": [{"class": "square", "count": 1}]}
    square, other = Shape("square", "red", (0, 0)), Shape("cross", "red", (2, 0))
    for more, exact in (([], 1.0), ([other], 0.0), ([replace(square, cell=(2, 1))], 0.0)):
        output = judge([draw([square, *more])], [line])
        assert (output.rewards[0], output.breakdown["exact"][0]) == (1.0, exact)
        assert judge([draw([square, *more])], [line], credit="exact").rewards[0] == exact


def test_shapes_set_has_the_format_and_its_truth_is_right() -> None:
    train, heldout = shape_set("train"), shape_set("heldout")
    assert {p.text for p in train}.isdisjoint(p.text for p in heldout)
    assert [len({p.text for p in part}) for part in (train, heldout)] == [399, 133]
    assert [prompt.columns["tag"] for prompt in heldout[:6]] == list(TAGS)
    assert heldout[0].text == shape_set("heldout", 7)[6].text  # the one single object held out, again
    output = judge([tiny_shapes.truth(p) for p in heldout], [p.columns for p in heldout])
    assert set(output.rewards) == set(output.breakdown["exact"]) == {1.0}
    with pytest.raises(ImageRLError, match="no split 'test'"):
        shape_set("test")


def test_words_of_the_tiny_world() -> None:
    """All honest pictures are right; the wrong ink, no word, two words and other grounds are not."""
    pictures = check_pictures(20)
    columns = {name: [p.prompt.columns[name] for p in pictures] for name in ("include", "exclude", "tag")}
    output = CompositionReward("tiny_world")(images=[p.image for p in pictures], **columns)
    by_kind: dict[str, list[float]] = {}
    for picture, value in zip(pictures, output.rewards, strict=True):
        by_kind.setdefault(picture.kind, []).append(float(value or 0))
    means = {kind: sum(values) / len(values) for kind, values in by_kind.items()}
    assert means["honest"] == means["one letter wrong"] == 1.0
    for kind in ("wrong ink", "blank", "noise", "saturated", "text over everything", "word repeated"):
        assert means[kind] == 0.0, kind
    assert means["another prompt's picture"] < 0.2


def test_a_word_has_a_place() -> None:
    picture = tiny_world.render(tiny_world.Scene("CAT", "red", "pink", tiny_world.FONTS[0]))
    (word,) = find_words(picture, ["word"])["word"]
    left, top, right, bottom = word.box
    assert word.colour == "red"
    assert abs((left + right) / 2 - 32) <= 1.5 and abs((top + bottom) / 2 - 16) <= 1.5
    assert 30 <= right - left <= 42


def test_samples_without_a_specification_have_no_value() -> None:
    output = CompositionReward("shapes")(
        images=[draw([])] * 2, include=[None, [{"class": "cross", "count": 1}]]
    )
    assert list(output.rewards) == [None, 0.0]
    assert output.breakdown["fault_missing"] == [None, 1.0]
    assert output.reason
    with pytest.raises(ImageRLError, match="needs the column include"):
        CompositionReward("shapes")(images=[draw([])])
    with pytest.raises(ImageRLError, match="credit must be whole, exact, partial"):
        CompositionReward("shapes", credit="half")


class FakeDetector:
    """Finds what it is told to, and keeps the questions."""

    def __init__(self, found: dict[str, list[Found]]) -> None:
        self.found = found
        self.asked: list[list[list[str]]] = []

    def __call__(
        self, images: Sequence[Image.Image], classes: Sequence[Sequence[str]]
    ) -> list[dict[str, list[Found]]]:
        self.asked.append([list(names) for names in classes])
        return [{name: self.found.get(name, []) for name in names} for names in classes]


def colour_model() -> ClipModel:
    """Features: a picture's mean colour; a caption's colour, by name."""
    rgb = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0), "white": (255, 255, 255)}

    def pictures(images: Sequence[Image.Image]) -> torch.Tensor:
        means = [image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) for image in images]
        return torch.nn.functional.normalize(torch.tensor(means).float(), dim=-1)

    def captions(texts: Sequence[str]) -> torch.Tensor:
        named = [next((c for name, c in rgb.items() if name in text), (1, -1, -1)) for text in texts]
        return torch.nn.functional.normalize(torch.tensor(named).float(), dim=-1)

    return ClipModel(3, 1.0, 0.0, pictures, captions)


@pytest.fixture
def photographs(monkeypatch: pytest.MonkeyPatch) -> FakeDetector:
    """A picture, red on the left and blue on the right, in which a cup and a dog are found."""
    fake = FakeDetector({"cup": [Found((0, 0, 50, 50), 0.8)], "dog": [Found((50.0, 0.0, 99.7, 50.0), 0.35)]})
    monkeypatch.setattr(composition, "OpenVocabularyDetector", lambda *_: fake)
    monkeypatch.setattr(composition, "load_clip", lambda *_: colour_model())
    return fake


def halves() -> Image.Image:
    picture = Image.new("RGB", (100, 50), (255, 0, 0))
    picture.paste((0, 0, 255), (50, 0, 100, 50))
    return picture


def test_a_detector_and_a_colour_model_together(photographs: FakeDetector) -> None:
    include = [
        {"class": "cup", "count": 1, "color": "red"},
        {"class": "dog", "count": 1, "color": "blue", "position": ["right of", 0]},
    ]
    wrong = [{**include[0], "color": "blue"}, {"class": "cat", "count": 1}]
    reward = CompositionReward("a/folder", clip="m")
    output = reward(
        images=[halves()] * 2, include=[include, wrong], exclude=[None, [{"class": "dog", "count": 1}]]
    )
    assert list(output.rewards) == [1.0, 0.0]
    assert output.breakdown["fault_colour"] == [0.0, pytest.approx(1 / 3)]
    assert output.breakdown["fault_too_many"] == [0.0, pytest.approx(1 / 3)]
    assert photographs.asked == [[["cup", "dog"], ["cup", "cat", "dog"]]]


def test_counting_has_a_threshold_of_its_own(photographs: FakeDetector) -> None:
    include = [[{"class": "dog", "count": 1}]] * 2
    reward = CompositionReward("a/folder", counting_threshold=0.5)
    assert list(
        reward(images=[halves()] * 2, include=include, tag=["single_object", "counting"]).rewards
    ) == [1.0, 0.0]


def test_colours_need_a_model_and_a_name(photographs: FakeDetector) -> None:
    red = [[{"class": "cup", "count": 1, "color": "red"}]]
    with pytest.raises(ImageRLError, match="a red cup is asked for: name a colour model in clip"):
        CompositionReward("a/folder")(images=[halves()], include=red)
    red[0][0]["color"] = "mauve"
    with pytest.raises(ImageRLError, match="'mauve' is none of the colours"):
        CompositionReward("a/folder", clip="m")(images=[halves()], include=red)


def test_colours_of_crops() -> None:
    colours = ClipColours(colour_model())
    boxes = [Found((0, 0, 50, 50)), Found((60, 10, 90, 40)), Found((70, 20, 70, 20)), Found((-5, -5, 10, 10))]
    assert colours(halves(), boxes, "cup") == ["red", "blue", "blue", "red"]


def owlv2(folder: Path) -> str:
    """OWLv2 with random weights."""
    from transformers import Owlv2Config, Owlv2ForObjectDetection, Owlv2Processor
    from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

    from tools.tiny.clip_model import build_tokenizer

    tokenizer = build_tokenizer(["a photo of a cup", "a photo of a dog"] * 4, 270)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = sizes | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    vision = sizes | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = Owlv2ForObjectDetection(Owlv2Config(text_config=text, vision_config=vision, projection_dim=16))
    for parameter in model.box_head.dense2.parameters():  # each patch gives the box around itself
        torch.nn.init.zeros_(parameter)
    model.save_pretrained(folder)
    tokenizer.model_max_length = 16
    processor = Owlv2ImageProcessorPil(size={"height": 32, "width": 32})
    Owlv2Processor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    return str(folder)


def grounding_dino(folder: Path) -> str:
    """Grounding DINO with random weights. It knows phrases by BERT's ids, so the tokenizer has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        BertConfig,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoProcessor,
        PreTrainedTokenizerFast,
        SwinConfig,
    )
    from transformers.models.grounding_dino.image_processing_pil_grounding_dino import (
        GroundingDinoImageProcessorPil,
    )

    ids = {
        "[PAD]": 0,
        "[UNK]": 100,
        "[CLS]": 101,
        "[SEP]": 102,
        ".": 1012,
        "?": 1029,
        "a": 5,
        "cup": 6,
        "dog": 7,
    }
    plain = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    plain.post_processor = processors.BertProcessing(("[SEP]", 102), ("[CLS]", 101))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, **special)
    sizes: dict[str, Any] = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = BertConfig(vocab_size=1100, hidden_size=16, max_position_embeddings=32, **sizes)
    swin = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=["stage2", "stage3", "stage4"],
    )
    layers: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 6, "d_model": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    torch.manual_seed(0)
    config = GroundingDinoConfig(backbone_config=swin, text_config=text, max_text_len=32, **layers, **heads)
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    processor = GroundingDinoImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64})
    GroundingDinoProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("build", [owlv2, grounding_dino], ids=lambda build: build.__name__)
def test_a_detector_of_transformers_gives_boxes_of_the_picture(build: Any, tmp_path: Path) -> None:
    detector = OpenVocabularyDetector(build(tmp_path), threshold=0.0, max_overlap=0.99, batch_size=2)
    found = detector([halves(), halves().resize((40, 80))], [["cup", "dog"], ["dog"]])
    assert [sorted(one) for one in found] == [["cup", "dog"], ["dog"]]
    for objects in [*found[0].values(), *found[1].values()]:
        assert objects
        assert all(0 < one.confidence <= 1 and len(one.box) == 4 for one in objects)
        assert [one.confidence for one in objects] == sorted(
            (one.confidence for one in objects), reverse=True
        )
    assert max(one.box[2] for one in found[0]["dog"]) > 40 >= max(one.box[2] for one in found[1]["dog"])
    assert max(one.box[3] for one in found[1]["dog"]) <= 80
    alone = detector([halves()], [["dog"]])[0]["dog"]
    assert [one.confidence for one in alone] == pytest.approx(
        [one.confidence for one in found[0]["dog"]], abs=1e-4
    )
    nothing = OpenVocabularyDetector(str(tmp_path), threshold=1.0, max_overlap=0.5)
    assert nothing([halves()], [["cup"]]) == [{"cup": []}]


def test_a_detector_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ImageRLError, match=r"there is no folder \./owl; correct detector"):
        CompositionReward("./owl")
    with pytest.raises(ImageRLError, match="cannot be loaded") as caught:
        CompositionReward(str(tmp_path))
    assert len(str(caught.value).splitlines()) == 1
