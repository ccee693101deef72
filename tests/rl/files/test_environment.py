"""The recipe alone decides what is computed: neither variables nor an Accelerate configuration file do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from imagerl.rl.files.environment import leave_to_the_recipe
from imagerl.rl.files.metrics import read_metrics
from tests.command import exit_code
from tests.micro import micro_folder
from tests.small_run import write_recipe

ROOT = Path(__file__).parents[3]

SETTINGS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_DYNAMO_BACKEND": "EAGER",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "nowhere.json",
    "ACCELERATE_TORCH_DEVICE": "meta",
    "FSDP_VERSION": "2",
    "DS_ACCELERATOR": "hpu",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
    "TORCHINDUCTOR_MAX_AUTOTUNE": "1",
    "PYTORCH_TUNABLEOP_ENABLED": "1",
    "NVIDIA_TF32_OVERRIDE": "1",
    "CUBLAS_EMULATE_SINGLE_PRECISION": "1",
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
    "ATEN_CPU_CAPABILITY": "default",
    "DIFFUSERS_ATTN_BACKEND": "flash",
    "TRANSFORMERS_SDPA_FORCE_GQA": "1",
}
OPERATIONAL = (
    *(
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "OMP_NUM_THREADS",
        "CUDA_VISIBLE_DEVICES",
        "HF_HOME",
    ),
    *(
        "TORCHELASTIC_RUN_ID",
        "TORCH_NCCL_BLOCKING_WAIT",
        "NCCL_ALGO",
        "GLOO_SOCKET_IFNAME",
        "DEEPSPEED_TIMEOUT",
    ),
    *("TORCH_HOME", "TORCH_EXTENSIONS_DIR", "TORCH_LOGS", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_CUDA_ARCH_LIST"),
    *("TORCH_DISTRIBUTED_DEBUG", "TRANSFORMERS_OFFLINE", "DIFFUSERS_VERBOSITY", "ACCELERATE_LOG_LEVEL"),
    *("DEEPSEEK_API_KEY", "TORCHLIGHT"),  # no family of ours
)


def test_settings_go_and_what_is_operational_stays() -> None:
    environment = {**SETTINGS, **dict.fromkeys(OPERATIONAL, "1")}
    assert leave_to_the_recipe(environment) == sorted(SETTINGS)
    assert sorted(environment) == sorted(OPERATIONAL)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environment")
    micro_folder(folder / "model")
    return write_recipe(folder, "run.steps=1", "run.sample_every=0", "eval.size=2", "monitors.pictures=false")


@pytest.fixture(scope="module")
def undisturbed(recipe: Path) -> float:
    assert exit_code(["train", str(recipe), f"run.output_dir={recipe.parent / 'undisturbed'}"]) == 0
    return grad_norm(recipe.parent / "undisturbed")


def grad_norm(run: Path) -> float:
    return next(float(line["grad_norm"]) for line in read_metrics(run) if "grad_norm" in line)


@pytest.mark.parametrize(
    "name", [name for name in SETTINGS if name.startswith("ACCELERATE") and "DEEPSPEED" not in name]
)
def test_a_variable_changes_no_gradient(
    recipe: Path,
    undisturbed: float,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, SETTINGS[name])
    assert exit_code(["train", str(recipe), f"run.output_dir={tmp_path / 'run'}"]) == 0
    assert undisturbed > 0 and grad_norm(tmp_path / "run") == undisturbed
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "alone decide" in line]
    assert told == f"imagerl: ignores {name}; recipe and command alone decide"


@pytest.mark.slow
def test_a_configuration_file_of_accelerate_changes_no_gradient(
    recipe: Path, undisturbed: float, tmp_path: Path
) -> None:
    (tmp_path / "accelerate").mkdir()
    config = {
        **{
            "compute_environment": "LOCAL_MACHINE",
            "distributed_type": "DEEPSPEED",
            "mixed_precision": "bf16",
        },
        **{"num_machines": 1, "num_processes": 1, "machine_rank": 0, "use_cpu": True},
        "deepspeed_config": {"gradient_accumulation_steps": 4, "zero_stage": 3, "gradient_clipping": 0.01},
        "dynamo_config": {"dynamo_backend": "EAGER"},
    }
    (tmp_path / "accelerate" / "default_config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "accelerate.commands.launch", "-m", "imagerl", "train", str(recipe)]
    environment = os.environ | {"HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, f"run.output_dir={tmp_path / 'run'}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" in ended.stderr
    assert grad_norm(tmp_path / "run") == undisturbed
