"""Who may import whom, read from the source: CONTRIBUTING.md, "Where things go"."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("rl", "models", "rewards")
COMPOSITION_ROOTS = ("rl.export",)
COMMANDS = "rl.commands."  # where the three meet
SHARED = ("rl.types", "rl.errors", "rl.reading")
# Seconds each to import: only inside functions, so that `imagerl --help` and recipe errors come at once.
HEAVY = ("accelerate", "deepspeed", "diffusers", "matplotlib", "onnxruntime", "paddleocr", "paddlex")
HEAVY += ("open_clip", "peft", "rapidocr", "ray", "tensorboard", "timm", "torchvision", "transformers", "trl")
TORCH_FREE = ("rl.config", "rl.recipe", "rl.errors", "rl.reading")
MAX_LINES = 400

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imports_of(tree: ast.AST, module: str, top_level: bool) -> set[str]:
    """Modules that a file imports; with `top_level` only what importing it runs at once."""
    found: set[str] = set()
    for node in _nodes(tree, top_level):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = module.split(".")[: -node.level]
                base = ".".join([*parent, *filter(None, [node.module])])
            found.add(base)
            found |= {name for alias in node.names if (name := f"{base}.{alias.name}") in FILES}
    return found


def _nodes(node: ast.AST, top_level: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if top_level and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if top_level and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            child = ast.Module(body=child.orelse, type_ignores=[])
        yield child
        yield from _nodes(child, top_level)


ALL = {name: imports_of(ast.parse(path.read_text()), name, False) for name, path in FILES.items()}
TOP = {name: imports_of(ast.parse(path.read_text()), name, True) for name, path in FILES.items()}


def ours(imports: set[str]) -> set[str]:
    return {name for name in imports if name.split(".")[0] in PACKAGES and name not in PACKAGES}


def forbidden(module: str, imports: set[str]) -> set[str]:
    """What `module` imports against the rules."""
    if module in COMPOSITION_ROOTS or module.startswith(COMMANDS):
        return set()
    package = module.split(".")[0]
    if module in SHARED:
        return {name for name in ours(imports) if name not in SHARED}
    allowed = ("rl",) if package == "rl" else (package, *SHARED)
    return {n for n in ours(imports) if not any(n == a or n.startswith(f"{a}.") for a in allowed)}


def test_the_rules_can_fail() -> None:
    assert forbidden("rl.trainer", {"models.ar"}) == {"models.ar"}
    assert forbidden("models.ar", {"rl.types", "models.loading"}) == set()
    assert forbidden("models.ar", {"rl.kl", "rewards.base"}) == {"rl.kl", "rewards.base"}
    assert forbidden("rl.types", {"rl.config"}) == {"rl.config"}
    lazy = ast.parse("import a\ndef f():\n    import b\nif TYPE_CHECKING:\n    import c\nelse:\n    import d")
    assert imports_of(lazy, "rl.x", True) == {"a", "d"}
    assert imports_of(lazy, "rl.x", False) == {"a", "b", "c", "d"}
    relative = ast.parse("from . import y\nfrom .z import w")
    assert imports_of(relative, "rl.x", True) >= {"rl", "rl.z"}


def test_all_packages_were_found() -> None:
    assert {name.split(".")[0] for name in FILES} == set(PACKAGES)
    assert {"rl.types", "rl.config", "rewards.base"} <= set(FILES)


@pytest.mark.parametrize("module", FILES)
def test_layering(module: str) -> None:
    assert not forbidden(module, ALL[module])


@pytest.mark.parametrize("module", FILES)
def test_heavy_libraries_are_imported_lazily(module: str) -> None:
    heavy = {name for name in TOP[module] if name.split(".")[0] in HEAVY}
    assert not heavy


def test_no_import_cycles() -> None:
    graph = {name: {n for n in TOP[name] if n in FILES and n != name} for name in FILES}
    while leaves := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for leaf in leaves:
            del graph[leaf]
    assert not graph, f"in or behind a cycle: {graph}"


@pytest.mark.parametrize("module", FILES)
def test_no_file_is_long(module: str) -> None:
    assert len(FILES[module].read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("module", TORCH_FREE)
def test_reaches_no_torch(module: str) -> None:
    """Nothing that importing the module imports in turn is torch or heavy."""
    reached, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += TOP.get(name, ())
    assert not [name for name in reached if name.split(".")[0] in ("torch", "numpy", *HEAVY)]
