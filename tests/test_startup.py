"""What a command imports: every package here costs a start of seconds, and drawing needs none of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.micro import micro_folder

UNUSED = (
    *(
        "aiohttp",
        "cv2",
        "datasets",
        "deepspeed",
        "matplotlib",
        "onnxruntime",
        "open_clip",
        "openai",
        "paddleocr",
    ),
    *("pandas", "rapidocr", "ray", "rich", "sklearn", "tensorboard", "timm", "torchvision", "trl", "wandb"),
)


@pytest.mark.slow
def test_drawing_imports_nothing_that_it_does_not_use(tmp_path: Path) -> None:
    micro_folder(tmp_path / "model")
    command = ["sample", "a red word", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    code = f"""
import json, sys
from imagerl.rl.commands.cli import main
try:
    main({command!r})
except SystemExit as ended:
    assert not ended.code
found = sorted({{name.partition(".")[0] for name in sys.modules}})
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = json.loads(done.stdout.splitlines()[-1])
    assert "torch" in imported and [name for name in UNUSED if name in imported] == []
