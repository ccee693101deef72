"""Named evaluation suites: which rewards measure what. Plain recipe entries."""

from __future__ import annotations

from typing import Any

SUITES: dict[str, list[dict[str, Any]]] = {
    "clip": [{"name": "clip", "model": "tiny_clip"}],
    "ocr": [{"name": "ocr", "mode": "recognise"}, {"name": "colours"}],
}
