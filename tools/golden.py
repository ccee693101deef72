"""Numbers of short seeded runs, bit for bit, which a change of structure must leave as they are.

    python tools/golden.py write     # before the change: tests/golden.json
    python tools/golden.py check     # after it; exits with 1 and names each number that moved

Sums are added up in another order on another kind of processor, and a token drawn differently changes everything after
it: the file names the processor that made it, and `check` is exact on that one only.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden.json"
SHORT = ["run.steps=3", "engine.threads=1", "eval.size=16", "run.sample_prompts=4"]
STAGES = [f"{stage}.steps=3" for stage in ("tokenizer", "autoencoder", "generator", "decoder")]
CLOCK = ("time", "per_s", "share", "memory")  # metrics that depend on the machine's speed and size

RUNS: dict[str, tuple[str, ...]] = {
    "tiny_ocr_grpo": ("train", "recipes/tiny_ocr_grpo.yaml", *SHORT),
    "tiny_edit_grpo": ("train", "recipes/tiny_edit_grpo.yaml", *SHORT),
    "tiny_flow_grpo": ("train", "recipes/tiny_flow_grpo.yaml", *SHORT),
    "joint": ("train", "recipes/compare/joint.yaml", *SHORT),
    "hacking_demo": ("train", "recipes/hacking_demo.yaml", *SHORT),
    "tiny_sft": (
        "sft",
        "recipes/tiny_sft.yaml",
        *SHORT,
        "optim.warmup_steps=1",
        "data.train=[{data}/train]",
        "data.heldout=[{data}/heldout]",
    ),
    "tiny_pretrain": (
        "pretrain",
        "tools/tiny/tiny_pretrain.yaml",
        *STAGES,
        "decoder.pictures=64",
        "run.threads=1",
    ),
}


def main(action: str, *names: str) -> None:
    """Write or check the golden numbers, of the named runs or of all."""
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch)
        for split, count in (("train", 96), ("heldout", 16)):
            place = [
                str(data / split),
                "--split",
                split,
                "--count",
                str(count),
                "--font",
                "DejaVuSerif-Bold.ttf",
            ]
            render = [sys.executable, "-m", "tools.tiny", "render", *place]
            subprocess.run(render, cwd=ROOT, check=True, stdout=sys.stderr)
        found = {}
        for name in names or RUNS:
            found[name] = run(RUNS[name], data / name, data)
            if action == "write":
                kept = json.loads(GOLDEN.read_text())["runs"] if GOLDEN.exists() else {}
                GOLDEN.write_text(
                    json.dumps({"processor": processor(), "runs": kept | found}, indent=1) + "\n"
                )
    if action == "write":
        return
    golden = json.loads(GOLDEN.read_text())
    if golden["processor"] != processor():
        print(f"made on {golden['processor']}, this is {processor()}: numbers may differ")
    moved = [line for name in found for line in differences(name, golden["runs"][name], found[name])]
    print("\n".join(moved) or f"{len(found)} runs, every number equal")
    sys.exit(bool(moved))


def run(command: tuple[str, ...], folder: Path, data: Path) -> dict[str, Any]:
    """Return metrics of every step, held-out results and a hash of the trained weights of one command."""
    arguments = [part.replace("{data}", str(data)) for part in command]
    arguments += [f"run.output_dir={folder}"] + (["checkpoint.every=3"] if command[0] != "pretrain" else [])
    print("golden:", *arguments, file=sys.stderr)
    program = "tools.tiny" if command[0] == "pretrain" else "imagerl"
    subprocess.run([sys.executable, "-m", program, *arguments], cwd=ROOT, check=True, stdout=sys.stderr)
    lines = [json.loads(line) for line in _text(folder / "metrics.jsonl").splitlines()]
    evaluations = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("eval/*.json"))}
    return {
        "metrics": [
            {k: v for k, v in line.items() if not any(word in k for word in CLOCK)} for line in lines
        ],
        "heldout": {name: evaluation.get("per_prompt") for name, evaluation in evaluations.items()},
        "weights": weights_hash(folder),
    }


def weights_hash(folder: Path) -> str:
    """Hash names and bytes of all tensors of the last checkpoint or the finished model."""
    from safetensors import safe_open

    newest = sorted(folder.glob("checkpoints/step_*")) or [folder / "model"]
    total = sha256()
    for path in sorted(newest[-1].rglob("*.safetensors")):
        with safe_open(path, "pt") as tensors:
            for name in sorted(tensors.keys()):
                total.update(name.encode())
                total.update(tensors.get_tensor(name).contiguous().view(-1).view(_bytes()).numpy().tobytes())
    return total.hexdigest()


def differences(place: str, old: Any, new: Any) -> Iterator[str]:
    """Yield a line for each number that is not what it was."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(f"{place} {key}", old.get(key), new.get(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from differences(f"{place} {index}", one, other)
    elif old != new:
        yield f"{place}: {str(old)[:60]} -> {str(new)[:60]}"


def processor() -> str:
    """Return the model name of the first processor."""
    lines = _text(Path("/proc/cpuinfo")).splitlines()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def _bytes() -> Any:
    import torch

    return torch.uint8


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


if __name__ == "__main__":
    main(*sys.argv[1:])
