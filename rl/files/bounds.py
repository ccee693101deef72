"""The values that several sections of recipes and several rewards share, with bounds that no run means to pass."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

Steps = Annotated[int, Field(ge=1, le=10_000_000)]
Every = Annotated[int, Field(ge=0, le=10_000_000)]  # steps between two of something; 0: never
Count = Annotated[int, Field(ge=1, le=2**16)]  # samples or prompts at a time
FlowSteps = Annotated[int, Field(ge=1, le=1000)]  # or whatever else is done one after the other
Threads = Annotated[int, Field(ge=1, le=1024)]
Workers = Annotated[int, Field(ge=0, le=1024)]
Gpus = Annotated[float, Field(ge=0, le=64)]  # of an actor; a part of one is shared
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
LearningRate = Annotated[float, Field(ge=1e-12, le=10)]
Guidance = Annotated[float, Field(ge=0, le=100)]
Share = Annotated[float, Field(ge=0, le=1)]
Coefficient = Annotated[float, Field(ge=0, le=1e6)]
Factor = Annotated[float, Field(ge=-1e6, le=1e6)]
Positive = Annotated[float, Field(ge=1e-12, le=1e6)]


def _place(path: str) -> str:
    if not path.strip():
        raise ValueError("it is blank; name a folder, such as runs/mine")
    if path[0] == "~":
        raise ValueError(
            "~ is not expanded here, it would become a folder of that name; write the whole path"
        )
    whole = Path(os.path.abspath(path))
    if whole == whole.parent:
        raise ValueError(f"{path} is the root of the file system; name a folder below it")
    return path


OutputDir = Annotated[str, AfterValidator(_place)]  # a folder that a run fills
