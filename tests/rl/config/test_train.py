from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from imagerl.rl.config.train import Recipe, RewardSpec, load_recipe
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.mistakes import iter_keys
from imagerl.rl.files.yaml_text import parse_yaml

MINIMAL = """\
run: {steps: 10, output_dir: runs/x}
data:
  train: {name: tiny_world, split: train}
  heldout: {name: tiny_world, split: heldout}
rewards:
  - name: ocr
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(MINIMAL)
    return file


def error(path: Path, *overrides: str, text: str | None = None) -> str:
    """The message of the refusal; always one line that begins with the file or the override."""
    if text is not None:
        path.write_text(text)
    with pytest.raises(ImageRLError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def test_defaults_are_the_published_settings(path: Path) -> None:
    recipe = load_recipe(path)
    assert (recipe.rollout.prompts_per_step, recipe.rollout.group_size) == (16, 16)
    assert (recipe.rollout.flow_steps, recipe.rollout.guidance, recipe.rollout.temperature) == (30, 2.0, 1.0)
    assert (recipe.algorithm.kl_coef, recipe.algorithm.kl_estimator) == (0.001, "k3")
    assert recipe.optim.lr == 1e-6


def test_every_key_is_described() -> None:
    keys = dict(iter_keys(Recipe))
    assert {"run.steps", "rollout.top_k", "rewards.functions.0.weight", "model.lora.r", "gold.0.name"} <= set(
        keys
    )
    assert [key for key, text in keys.items() if not text or "\n" in text] == []


def test_yaml_round_trip(path: Path) -> None:
    overrides = ["run.output_dir='no'", "optim.lr=1e-6", "rewards.0.path='1e-6'", "model.lora={r: 4}"]
    recipe = load_recipe(path, [*overrides, "optim.betas=[0.8, 0.95]"])
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe
    # Quoted for readers that follow YAML 1.1 too.
    assert yaml.safe_load(recipe.to_yaml())["run"]["output_dir"] == "no"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("-2.5E3", -2500.0),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("010", 10),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("'1e-6'", "1e-6"),
        ("null", None),
        ("", None),
        ("[1, {a: 2e0}]", [1, {"a": 2.0}]),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    parsed = parse_yaml(text, "test")
    assert parsed == value
    assert type(parsed) is type(value)


def test_overrides(path: Path) -> None:
    recipe = load_recipe(
        path, ["run.seed=7", "optim.lr=1e-3", "model.lora.r=4", "optim.betas=[0.9, 0.95]", "eval={size: 8}"]
    )
    assert (recipe.run.seed, recipe.optim.lr, recipe.eval.size) == (7, 1e-3, 8)
    assert recipe.optim.betas == (0.9, 0.95)
    assert recipe.model.lora is not None
    assert recipe.model.lora.r == 4


@pytest.mark.parametrize("section", [MINIMAL, MINIMAL.replace("rewards:", "rewards:\n  functions:")])
def test_rewards_take_the_short_and_the_long_spelling(path: Path, section: str) -> None:
    path.write_text(section)
    recipe = load_recipe(path, ["rewards.workers=0", "rewards.0.weight=0.5", "rewards.functions.0.mode=full"])
    assert recipe.rewards.workers == 0
    (ocr,) = recipe.rewards.functions
    assert (ocr.label, ocr.weight, ocr.kwargs) == ("ocr", 0.5, {"mode": "full"})
    listed = ["rewards=[{import_path: my.py:red, weight: 0.3}]", "rewards.workers=2"]
    for overrides in (listed, listed[::-1]):
        rewards = load_recipe(path, overrides).rewards
        assert (rewards.workers, [spec.label for spec in rewards.functions]) == (2, ["red"])


def test_a_later_override_wins(path: Path) -> None:
    assert load_recipe(path, ["run.seed=1", "run.seed=2"]).run.seed == 2


def test_reward_label_and_kwargs() -> None:
    spec = RewardSpec.model_validate({"import_path": "a/b.py:redness", "threshold": 3})
    assert (spec.label, spec.kwargs, spec.weight) == ("redness", {"threshold": 3}, 1.0)
    served = RewardSpec.model_validate({"url": "https://gpu-box:8123/a/clip", "batch": 8})
    assert (served.label, served.kwargs) == ("clip", {"batch": 8})


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        (
            "rollout.gruop_size=4",
            ['"rollout.gruop_size"', 'did you mean "rollout.group_size"?', "flow_steps"],
        ),
        ("group_size=4", ['"group_size"', 'did you mean "rollout.group_size"?']),
        ("runn.steps=4", ['"runn"', 'did you mean "run"?']),
        ("zzz=4", ['unknown key "zzz"; Keys of the top level: kind, run, model']),
        ("model.lora.rank=4", ['unknown key "model.lora.rank"; Keys of', "alpha"]),
        ("algorithm.name=grop", ['"algorithm.name"', '"grop"', "Allowed: grpo"]),
        ("algorithm.kl_estimator=k4", ["Allowed: k1, k2, k3"]),
        ("engine.zero_stage=5", ['"engine.zero_stage" cannot be 5', "Allowed: 0, 1, 2, 3"]),
        ("run.steps=ten", ['"run.steps" should be an integer, not "ten"']),
        ("run.steps=1.5", ['"run.steps" should be an integer, not 1.5']),
        ("run.steps=true", ['"run.steps" should be an integer, not true']),
        ("run.steps=0", ['"run.steps" should be greater than or equal to 1, not 0']),
        ("run.steps=", ['"run.steps" should be an integer, not null']),
        ("run.output_dir=5", ['"run.output_dir" should be a string (put it in quotes), not 5']),
        ("rollout.shared_noise=no", ['"rollout.shared_noise" should be true or false, not "no"']),
        ("rollout.temperature=.inf", ['"rollout.temperature" should be a number']),
        ("model.lora.target_modules=5", ['"model.lora.target_modules" should be a list or', "all-linear"]),
        ("optim.betas=[0.9]", ['"optim.betas']),
        ("optim.betas=[0.9, 1.0]", ["optim.betas must lie in [0, 1)"]),
        ("eval.suite=oct", ['did you mean "ocr"?']),
        ("run=5", ['"run" should be', "not 5"]),
        ("gold=5", ['"gold" should be a list, not 5']),
        ("lr=1", ['did you mean "optim.lr" or "algorithm.flow.lr"?']),
        ("algorithm.gamma=1", ['unknown key "algorithm.gamma"; Keys of "algorithm"']),
        ("rewards=[]", ['"rewards.functions" should be a list of at least 1, not []']),
        ("data.train.column=''", ['"data.train.column" should be a text that is not empty, not ""']),
        ("optim.betas=[0.9]", ['"optim.betas.1" is missing in [0.9]']),
        ("optim.betas=[0.1, 0.1, 0.1]", ['"optim.betas" should be a list of at most 2']),
        ("algorithm.name=ppo", ["there is no critic here", "grpo with clip: ratio and updates_per_rollout"]),
        ("algorithm.name=GRPO", ['did you mean "grpo"? Allowed: grpo']),
        ("algorithm.name=a2c", ['"algorithm.name" cannot be "a2c"; Allowed: grpo']),
        ("algorithm.learning_rate=1", ['unknown key "algorithm.learning_rate"; Keys of']),
    ],
)
def test_mistakes_name_the_key_and_the_way_out(path: Path, override: str, parts: list[str]) -> None:
    message = error(path, override)
    assert message.startswith(f'override "{override}": ')
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["engine.zero_stage=2"], "engine.zero_stage needs engine.name: deepspeed"),
        (["eval.kl=true", "engine.name=deepspeed", "engine.zero_stage=3"], "which ZeRO-3 cannot"),
        (["algorithm.region_credit=1"], "scale_rewards group changes those of the advantages"),
        (
            ["algorithm.region_credit=1", "algorithm.scale_rewards=none", "rollout.decodes=2"],
            "tokens of one picture",
        ),
        (["eval.kl=true", "algorithm.flow={}"], "eval.kl is of the tokens"),
        (["rollout.top_k=50"], "top_k and top_p must be null in training"),
        (["rollout.top_p=0.9"], "top_k and top_p must be null in training"),
        (["algorithm.kl_in=reward", "algorithm.kl_coef=0"], "algorithm.kl_coef is 0"),
        (["rewards=[]"], '"rewards.functions"'),
        (["rewards=[{name: ocr}, {name: ocr}]"], 'two rewards are called "ocr"'),
        (["rewards=[{name: a}, {import_path: 'x.py:a'}]"], 'two rewards are called "a"'),
        (["rewards.0.weight=0"], "the weights are all 0"),
        (["rewards=[{url: 'http://me:secret@host/ocr'}]"], "url should look like http://host:port/name"),
        (["rewards=[{url: 'http://host/ocr', name: ocr}]"], "exactly one of name, import_path and url"),
        (["rewards=[{name: ocr, python: /usr/bin/python3}]"], "python needs import_path"),
        (["rewards=[{url: 'http://host/ocr', runtime_env: {}}]"], "runtime_env is of the actor"),
        (["rewards=[{weight: 1.0}]"], "exactly one of name, import_path and url"),
        (["rewards=[{import_path: redness}]"], "should look like file.py:function"),
        (["rewards=[{import_path: 'x.py:exact_match'}]"], 'cannot be called "exact_match"'),
        (["gold=[{import_path: 'x.py:reward'}]"], 'cannot be called "reward"'),
        (["rewards.0.weight={}"], "needs steps from 0 on"),
        (["rewards.0.weight={-1: 1.0}"], "needs steps from 0 on"),
        (["rewards.0.weight={0: 0.0, 9: 0}"], "the weights are all 0"),
        (["rewards.0.weight={0: high}"], '"rewards.functions.0.weight"'),
        (["rewards.0.gate={by: ocr, at_least: 1}"], "which is no other reward; there is: none"),
        (
            ["rewards=[{name: a, gate: {by: c/x, at_least: 1}}, {name: b}]"],
            'the gate of "a" asks for "c/x", which is no other reward; there is: b',
        ),
        (["rewards=[{name: a, gate: {by: b}}, {name: b}]"], "exactly one of at_least and at_most"),
        (["rewards=[{name: a, gate: {by: b, above: 1}}, {name: b}]"], '"rewards.functions.0.gate.above"'),
        (["gold=[{name: a, weight: {0: 1}}]"], "enters no total; remove its gate, schedule and half"),
        (["gold=[{name: ocr}]"], "a gold metric must not be"),
        (["gold=[{name: a}, {name: a}]"], "two gold metrics"),
        (["data.train.path=x.txt"], "exactly one of name and path"),
        (["data.train={name: tiny_world}"], "needs its split"),
        (["data.train={path: x.txt, split: train}"], "a file has no splits"),
        (["data.train.size=8"], "rollout.prompts_per_step (16) is more than data.train.size (8)"),
        (["data.heldout.size=100"], "eval.size (256) is more than data.heldout.size (100)"),
        (["optim.warmup_steps=10"], "optim.warmup_steps (10) must be below the run's 10 updates"),
        (["model.lora.dropout=0.1"], "model.lora.dropout must be 0"),
        (["run.output_dir=/"], '"run.output_dir": / is the root of the file system'),
        (["run.output_dir=//../."], "is the root of the file system"),
        (["run.output_dir=' '"], '"run.output_dir": it is blank; name a folder'),
        (["run.output_dir=''"], '"run.output_dir": it is blank; name a folder'),
        (["run.output_dir=~/runs"], "~ is not expanded here"),
        (["engine.threads=1e9"], '"engine.threads" should be an integer, not 1000000000.0'),
        (["engine.threads=1000000000"], '"engine.threads" should be less than or equal to 1024'),
        (["rollout.group_size=1000000000000000000"], '"rollout.group_size" should be less than or equal to'),
        (
            ["rollout.group_size=65536", "rollout.prompts_per_step=17"],
            "is 1114112 pictures a step, more than",
        ),
        (["rewards.0.weight=1e300"], "1e300 cannot be computed with"),
        (["rewards.0.weight=1e7"], '"rewards.functions.0.weight" should be less than or equal to 1000000'),
        (["rewards.0.weight={0: -1e7}"], "should be greater than or equal to -1000000"),
        (["rewards.0.weight=1e-9"], "a weight of 1e-09 teaches nothing"),
        (["optim.lr=1e-20"], '"optim.lr" should be greater than or equal to 1e-12'),
    ],
)
def test_impossible_combinations(path: Path, overrides: list[str], part: str) -> None:
    assert part in error(path, *overrides)


def test_the_possible_neighbours_pass(path: Path) -> None:
    overrides = [
        "engine.name=deepspeed",
        "rollout.decode_chunk=4",
        "rewards=[{name: a, weight: {0: 1, 5: 0.0}}, {name: b, weight: -1.0, gate: {by: a/part, at_most: 1}}]",
    ]
    recipe = load_recipe(path, [*overrides, "optim.warmup_steps=10", "algorithm.updates_per_rollout=2"])
    assert recipe.engine.zero_stage == 1
    assert load_recipe(path, ["engine.name=deepspeed", "engine.zero_stage=3"]).engine.zero_stage == 3
    assert load_recipe(path).engine.zero_stage is None


def test_missing_sections_and_keys(path: Path) -> None:
    message = error(path, text=MINIMAL.replace("steps: 10, ", ""))
    assert '"run.steps" is missing: training steps' in message
    assert '"rewards" is missing' in error(path, text=MINIMAL.split("rewards")[0])
    message = error(path, text=MINIMAL.replace("data:", "datta:").replace("datta", "kind: train\nzzz"))
    assert 'unknown key "zzz"' in message
    without = "".join(line for line in MINIMAL.splitlines(keepends=True) if "tiny_world" not in line)
    assert '"data" is missing: the prompt sets, `train` and `heldout`' in error(
        path, text=without.replace("data:\n", "")
    )
    # The misspelt key explains the missing one.
    assert 'did you mean "run.steps"?' in error(path, text=MINIMAL.replace("steps:", "step:"))


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("run.steps", "write dotted.key=value"),
        ("=5", "write dotted.key=value"),
        ("run..steps=5", "write dotted.key=value"),
        ("run.steps=[1", 'override "run.steps=[1", line 1'),
        ("run.steps.x=5", "run.steps is an integer, there is nothing below it"),
        ("rewards.3.weight=1", "rewards.functions is a list with entries 0 to 0"),
        ("rewards.functions.x=1", "rewards.functions is a list"),
    ],
)
def test_unreadable_overrides(path: Path, override: str, part: str) -> None:
    assert part in error(path, override)


def test_an_override_is_blamed_for_its_own_mistakes_only(path: Path) -> None:
    """To blame is what the mistake goes away without, whatever else is given."""
    message = error(path, "run.seed=1", "engine.zero_stage=2", "optim.lr=1e-3")
    assert message.startswith('override "engine.zero_stage=2": engine.zero_stage needs')
    message = error(path, "run.steps=3", "run.seed=1", "optim.warmup_steps=3")
    assert message.startswith('overrides "run.steps=3" and "optim.warmup_steps=3": optim.warmup_steps (3)'), (
        message
    )
    message = error(path, "run.steps=5", "run.steps=0", "model.lora.r=2")
    assert message.startswith('override "run.steps=0": "run.steps" should be')
    message = error(path, "run.seed=1", text=MINIMAL.replace("steps: 10", "steps: 0"))
    assert message.startswith(f'{path}: "run.steps" should be')
    path.write_text(MINIMAL)
    message = error(path, "model.lora={r: 0}", "model.lora.alpha=2.0")
    assert message.startswith('override "model.lora={r: 0}": "model.lora.r"')


def test_unreadable_files(path: Path, tmp_path: Path) -> None:
    assert 'did you mean "' in error(tmp_path / "recipe.yml")
    assert "no file" in error(tmp_path / "nowhere" / "r.yaml")
    assert "cannot read" in error(tmp_path)
    assert "is empty" in error(path, text="# only a comment\n")
    assert "holds a list" in error(path, text="- 1\n")
    assert "recipe.yaml, line 3, column" in error(path, text="run:\n  steps: 1\n bad: [\n")
    assert "line 3, column 3: key 'seed' is given twice" in error(path, text="run:\n  seed: 1\n  seed: 2\n")
    assert "line 2" in error(path, text="run: 1\nbad: !!python/object:os.system {}\n")
    path.write_bytes(b"run: \xff")
    assert "not UTF-8" in error(path)
    assert 'kind "pretrain"' in error(path, text="kind: pretrain\n")


def test_usable_without_torch(path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['numpy'] = None\n"
        "from imagerl.rl.config.train import load_recipe\n"
        "from imagerl.rl.errors import ImageRLError\n"
        f"print(load_recipe({str(path)!r}, ['run.steps=3']).run.steps)\n"
        f"try: load_recipe({str(path)!r}, ['run.step=3'])\n"
        "except ImageRLError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "3"
    assert 'did you mean "run.steps"?' in second


# ---- one recipe over another -------------------------------------------------------------------------------


def test_a_recipe_extends_another(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "run: {steps: 5, output_dir: x}\nrewards: [{name: ocr}]\n"
        "algorithm: {name: grpo, scale_rewards: none, kl_coef: 0.5}\noptim: {lr: 0.1, betas: [0.5, 0.9]}\n"
        "data: {train: {name: tiny_world, split: train}, heldout: {name: tiny_world, split: heldout}}\n"
    )
    above = tmp_path / "sub" / "above.yaml"
    above.parent.mkdir()
    above.write_text(
        "extends: ../base.yaml\nrun: {steps: 7}\nalgorithm: {name: dr_grpo, kl_coef: null}\n"
        "optim: {betas: [0.1, 0.2]}\nmodel: {lora: {r: 4}}\n"
    )
    recipe = load_recipe(above, ["run.seed=3"])
    assert (recipe.run.steps, recipe.run.output_dir, recipe.run.seed) == (7, "x", 3)  # key by key
    assert recipe.optim.betas == (0.1, 0.2) and recipe.optim.lr == 0.1  # lists as wholes
    assert recipe.algorithm.name == "dr_grpo" and recipe.algorithm.scale_rewards == "none"
    assert recipe.algorithm.kl_coef == 0.0  # null: as if the base did not name it, here the row's default
    assert recipe.model.lora is not None and recipe.model.lora.r == 4
    assert "extends" not in recipe.to_yaml()
    (tmp_path / "whole.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "whole.yaml") == recipe

    above.write_text("extends: ../nowhere.yaml\n")
    with pytest.raises(ImageRLError, match="no file"):
        load_recipe(above)
    above.write_text("extends: [a]\n")
    with pytest.raises(ImageRLError, match='"extends" should be the path'):
        load_recipe(above)
    above.write_text("extends: ../base.yaml\n")
    (tmp_path / "third.yaml").write_text("extends: sub/above.yaml\n")
    with pytest.raises(ImageRLError, match="which extends another"):
        load_recipe(tmp_path / "third.yaml")
    with pytest.raises(ImageRLError, match='unknown key "extends"'):
        load_recipe(tmp_path / "base.yaml", ["extends=sub/above.yaml"])
