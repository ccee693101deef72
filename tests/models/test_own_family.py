"""A family in a file of one's own is trained, evaluated, exported and drawn from as those of the house are."""

from __future__ import annotations

import importlib.util
import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from imagerl.models import families
from imagerl.models.common.checks import try_out
from imagerl.rl.commands.cli import main
from imagerl.rl.files.metrics import read_metrics
from imagerl.rl.types import ImageRLError, Prompt, SamplingParams
from tests.small_run import write_recipe

FAMILY = '''
"""Bytes of a prompt in, a row of colours out: no noise, no adapters, nothing but PyTorch."""
import json
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from imagerl.models.common.policy import BaseFamily, BasePolicy, PlainPrompts
from imagerl.models.common.tokens import draw_tokens
from imagerl.rl.types import Canvas, SamplingParams, TokenScores, TokenTrajectory, repeat

TOKENS, CODES = 6, 16


class Writer(nn.Module):
    def __init__(self):
        super().__init__()
        self.letters, self.tokens = nn.Linear(256, 24), nn.Embedding(CODES + TOKENS, 24)
        self.head = nn.Linear(24, CODES)

    def logits(self, prompts, tokens):
        before = self.tokens(tokens).cumsum(1).roll(1, 1) * (torch.arange(tokens.shape[1])[:, None] > 0)
        place = self.tokens.weight[CODES:]
        return self.head(torch.tanh(self.letters(prompts["letters"])[:, None] + before + place))

    def forward(self, prompts, tokens, sampling):
        prompts = repeat(prompts, len(tokens) // len(prompts["letters"]))
        logprobs = (self.logits(prompts, tokens) / sampling.temperature).log_softmax(-1)
        chosen = logprobs.gather(-1, tokens[..., None])[..., 0]
        return TokenScores(chosen, -(logprobs.exp() * logprobs).sum(-1))


class MyPolicy(BasePolicy):
    prompts = PlainPrompts(Canvas(TOKENS, (16, 48), None))

    def encode(self, prompts, to_draw=True):
        counts = [torch.bincount(torch.tensor(list(p.text.encode())), minlength=256) for p in prompts]
        return {"letters": torch.stack(counts).float() / 8}

    @torch.no_grad()
    def sample_tokens(self, prompts, uniforms, sampling):
        prompts = repeat(prompts, len(uniforms) // len(prompts["letters"]))
        tokens, logprobs = torch.zeros(uniforms.shape, dtype=torch.long), torch.zeros(uniforms.shape)
        for t in range(TOKENS):
            logits = self.trainable.logits(prompts, tokens)[:, t] / sampling.temperature
            tokens[:, t], logprobs[:, t] = draw_tokens(logits, uniforms[:, t])
        return TokenTrajectory(tokens, logprobs, torch.ones_like(tokens, dtype=torch.bool))

    def decode(self, prompts, trajectory, noise, sampling):
        grey = (trajectory.tokens / (CODES - 1)).view(-1, 1, 2, 3)
        return grey.repeat_interleave(8, 2).repeat_interleave(16, 3).expand(-1, 3, -1, -1)

    def save(self, folder, layout, base, dtype):
        Path(folder, "config.json").write_text(json.dumps({"model_type": "toy"}))
        save_model(self.trainable, Path(folder, "model.safetensors"))


class MyFamily(BaseFamily):
    layouts = {"toy": "a toy to go on with"}

    def load(self, folder, device, dtype):
        writer = Writer()
        load_model(writer, folder / "model.safetensors")
        return MyPolicy(writer.eval(), SamplingParams())

    def prompts(self, folder):
        return MyPolicy.prompts
'''


def imagerl(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family, a model of it with random weights, and a run of three steps with full weights and KL."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_family.py").write_text(FAMILY)
    spec = importlib.util.spec_from_file_location("my_family", folder / "my_family.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    (folder / "model").mkdir()
    module.MyPolicy(module.Writer(), None).save(folder / "model", "toy", folder, None)
    assert imagerl("train", str(recipe(folder))) == 0
    return folder


def recipe(folder: Path, *overrides: str) -> Path:
    own = (f"model.family={folder / 'my_family.py'}:MyFamily", "algorithm.kl_coef=0.01", "run.steps=3")
    return write_recipe(folder, *own, "optim.lr=0.05", *overrides, reward="brightness")


def test_a_family_takes_at_most_sixty_lines() -> None:
    assert sum(bool(line.strip()) for line in FAMILY.splitlines()) <= 60


def test_it_trains_and_is_evaluated(place: Path) -> None:
    steps = [record for record in read_metrics(place / "run") if "grad_norm" in record]
    assert len(steps) == 3 and all(record["grad_norm"] > 0 for record in steps)
    assert max(record["rollout/logprob_diff_max"] for record in steps) < 1e-5
    evaluated = json.loads((place / "run" / "eval" / "ocr_step_000003.json").read_text())
    assert evaluated["n"] == 4 and set(evaluated["metrics"]) == {"total", "brightness"}


def test_its_export_repeats_the_run_and_draws(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, family = tmp_path / "out", f"{place / 'my_family.py'}:MyFamily"
    assert imagerl("export", str(place / "run"), str(out)) == 0
    (_, before), (_, after) = (
        next(iter(families.load_policy(str(f), family=family).trainable.named_parameters()))
        for f in (place / "model", out)
    )
    assert not torch.equal(before, after)
    monkeypatch.chdir(tmp_path)
    assert imagerl("sample", "a red word", "--model", str(out), "--family", family) == 0
    assert len(list((tmp_path / "samples").glob("*.png"))) == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.shared_noise=true", "decoder has no noise: the same tokens always give the same picture"),
        ("rollout.decodes=2", "decodes draws several pictures of the same tokens, but this model's decoder"),
        ("algorithm.flow={name: nft}", "algorithm.flow trains denoising steps, but this model's dec"),
        (
            "rollout.token_guidance=3",
            "token_guidance is 3, but this model writes its tokens without guidance",
        ),
        ("model.lora={r: 2}", "this model takes no LoRA adapters; remove model.lora"),
        ("model.family=nobody", "model.family 'nobody' is none of blip3o_next"),
        ("model.family=my.py:X", "model.family 'my.py:X': .*my.py does not exist"),
        ("model.family=null", "type 'toy' that is of none of the families .* model.family to file.py:Class"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    settings = recipe(place, f"run.output_dir={tmp_path / 'run'}", override)
    assert imagerl("train", str(settings)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not (tmp_path / "run" / "metrics.jsonl").exists()
    assert re.search(message, error), error


def test_a_family_without_the_class_says_what_it_has(place: Path) -> None:
    with pytest.raises(ImageRLError, match=r"has no YourFamily; did you mean MyFamily\?"):
        families.find_family(f"{place / 'my_family.py'}:YourFamily")


def test_a_prompt_with_a_picture_is_refused(place: Path) -> None:
    reader = families.load_prompts(str(place / "model"), f"{place / 'my_family.py'}:MyFamily")
    with pytest.raises(ImageRLError, match="prompt 1: a prompt is empty"):
        reader.require([Prompt(0, " ")])


FORWARD = """    def forward(self, prompts, tokens, sampling):
        prompts = repeat(prompts, len(tokens) // len(prompts"""


def tried(folder: Path, model: Path, wrong: str, right: str) -> None:
    assert wrong in FAMILY
    (folder / "wrong.py").write_text(FAMILY.replace(wrong, right))
    policy = families.load_policy(str(model), family=f"{folder / 'wrong.py'}:MyFamily")
    try_out(policy, [Prompt(0, "CAT"), Prompt(1, "a red 42")], SamplingParams(), 1e-4, nullcontext)


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        (
            "def load(",
            "def open(",
            "MyFamily has no load, which models/base.py asks of a Family; write what is missing",
        ),
        (
            "def decode(",
            "def draw(",
            "MyPolicy has no decode, .* asks of a Policy; .* on BasePolicy of models/common",
        ),
        (".eval(), Samp", ".train(), Samp", "load left policy.trainable in training mode; call .eval"),
        (".eval(), Samp", ".eval().requires_grad_(False), Samp", "left no gradients on policy.trainable"),
        (
            "    def encode(",
            "    stray = nn.Linear(1, 1)\n    def parts(self): return {'eyes': self.stray.eval()}\n    def encode(",
            "load left gradients on weight of 'eyes', which is outside policy.trainable; freeze",
        ),
        (
            "for p in prompts]",
            "for p in prompts[:1]]",
            "encode returned 'letters' without a row for each of 2 prompts",
        ),
        (
            "dtype=torch.long)",
            "dtype=torch.int)",
            r"sample_tokens returned tokens \[6, 6\] int32; make it \[6, 6\] int64",
        ),
        (
            ", torch.zeros(uniforms.shape)",
            ", torch.zeros(uniforms.shape).double()",
            r"rollout_logprobs \[6, 6\] float64; make it \[6, 6\] float32",
        ),
        (", dtype=torch.bool)", ")", r"action_mask \[6, 6\] int64; make it \[6, 6\] bool"),
        (
            "draw_tokens(logits, uniforms[:, t])",
            "draw_tokens(logits, torch.rand(len(uniforms)))",
            "drew other tokens by the same uniforms for the same prompt, whose samples",
        ),
        (
            "draw_tokens(logits, uniforms[:, t])",
            "logits.argmax(1), logits.log_softmax(1).amax(1)",
            "drew the same tokens by other uniforms; draw from the distribution",
        ),
        (
            "[:, t] / sampling.temperature",
            "[:, t]",
            "must be of one distribution: the same logits, temperature and",
        ),
        (
            FORWARD,
            FORWARD.replace("    def", "    @torch.no_grad()\n    def"),
            "forward returned logprobs without grad",
        ),
        ("return TokenScores(", "return (", "forward returned a tuple; make it TokenScores"),
        (
            FORWARD,
            FORWARD.replace("= repeat(", "= (lambda r, n: {k: t.repeat(n, 1) for k, t in r.items()})("),
            "trainable.forward must score alike whether prompts have a row for each sample or for each group",
        ),
        (
            "trajectory.tokens / (CODES - 1)",
            "trajectory.tokens / 1",
            "pixels from .* bring them to .0, 1., as",
        ),
        (
            ".expand(-1, 3, -1, -1)",
            "",
            r"decode returned pictures \[1, 1, 16, 48\] float32; make it \[1, 3, 16, 48\]",
        ),
    ],
)
def test_a_mistake_is_told_with_its_method_and_its_mending(
    place: Path, tmp_path: Path, was: str, now: str, message: str
) -> None:
    with pytest.raises(ImageRLError, match=message):
        tried(tmp_path, place / "model", was, now)


def test_a_run_tries_the_family_out_before_anything_is_drawn(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tried(tmp_path, place / "model", "", "")
    (tmp_path / "wrong.py").write_text(FAMILY.replace("[:, t] / sampling.temperature", "[:, t]"))
    own = f"model.family={tmp_path / 'wrong.py'}:MyFamily", f"run.output_dir={tmp_path / 'run'}"
    assert imagerl("train", str(recipe(place, *own))) == 1
    assert "sample_tokens and trainable.forward must be of one distribution" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_export_that_forgets_how_the_run_draws_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = (
        f"run.output_dir={tmp_path / 'run'}",
        "rollout.temperature=0.7",
        "run.steps=1",
        "checkpoint.every=1",
    )
    assert imagerl("train", str(recipe(place, *more))) == 0
    assert imagerl("export", str(tmp_path / "run"), str(tmp_path / "out")) == 1
    error = capsys.readouterr().err
    assert (
        "would draw at temperature 1, the run does at 0.7: the family's save must write policy.sampling"
        in error
    )
    assert not (tmp_path / "out").exists()
