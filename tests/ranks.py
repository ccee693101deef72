"""Several processes under torchrun, each of which executes command lines one after the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = """
import json, sys
from imagerl.rl.commands.cli import main
from imagerl.rl.engine.engine import Engine
close, Engine.close = Engine.close, lambda engine: None  # DeepSpeed keeps a process group for good
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as end:
        if end.code:
            raise
"""


class Ranks:
    """So many processes, begun at once."""

    def __init__(self, place: Path, count: int, *runs: Sequence[str]) -> None:
        program = place / "ranks.py"
        program.write_text(PROGRAM)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
        self.process = subprocess.Popen(
            [*launcher, "--standalone", str(program), json.dumps(runs)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def output(self) -> str:
        return self.process.communicate(timeout=900)[0]

    def succeed(self) -> str:
        """Wait for all of them; what they printed."""
        output = self.output()
        assert self.process.returncode == 0, output
        return output
