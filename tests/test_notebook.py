"""The notebook and the page about the Python API, executed: every cell, and what it shows."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def executed(cells: list[str], name: str) -> Iterator[dict[str, Any]]:
    """Run cells one after the other in one namespace; yields what the last line of each shows, by MIME type."""
    import linecache

    names: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(cells):
        file = f"<{name} {number}>"
        linecache.cache[file] = (len(source), None, source.splitlines(True), file)  # as IPython does
        tree = ast.parse(source, file)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, file, "exec"), names)
        shown = None if last is None else eval(compile(ast.Expression(last.value), file, "eval"), names)
        found = {kind: getattr(shown, f"_repr_{kind}_", None) for kind in ("html", "png")}
        yield {kind: make() for kind, make in found.items() if make is not None} | {"text": repr(shown)}


def notebook() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((ROOT / "examples" / "notebook.ipynb").read_text(encoding="utf-8"))
    return document


def test_the_notebook_is_kept_without_outputs() -> None:
    document = notebook()
    assert document["nbformat"] == 4
    code = [cell for cell in document["cells"] if cell["cell_type"] == "code"]
    assert len(code) >= 6 and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = ["".join(cell["source"]) for cell in notebook()["cells"] if cell["cell_type"] == "code"]
    sample, reward, check, run, curves, evaluation, comparison = executed(cells, "notebook")
    assert sample["png"].startswith(b"\x89PNG") and reward["text"] == "None"
    assert "fails 1 of" in check["html"] and "fail  ranking" in check["text"]
    assert "step 4 of 4" in run["html"] and run["html"].count("<img") >= 5
    assert curves["html"].count("data:image/svg+xml") == 2
    assert "Against tiny" in evaluation["html"] and "contrast" in evaluation["text"]
    assert "grpo" in comparison["html"] and "report: runs/comparison/report.html" in comparison["text"]
    assert "def contrast" in (tmp_path / "runs" / "contrast" / "recipe.yaml").read_text()


@pytest.mark.slow
def test_the_page_about_the_api_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    cells = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(list(executed(cells, "api.md"))) == 2
