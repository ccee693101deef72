"""Who may import whom, read from the source: CONTRIBUTING.md, "Where things go"."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("rl", "models", "rewards")
MEETING = ("imagerl.api.", "imagerl.rl.commands.")  # where the three meet
READERS = tuple(
    f"imagerl.rl.files.{name}" for name in ("bounds", "importing", "mistakes", "reading", "yaml_text")
)
RAY = tuple(f"imagerl.rl.engine.{name}" for name in ("actor_thread", "cluster"))  # of rollouts and rewards
SHARED = ("imagerl.rl.types", "imagerl.rl.errors", *RAY, *READERS)
PROTOCOLS = "imagerl.models.base"  # by which training knows models
COMMON = tuple(
    f"imagerl.models.{name}" for name in ("base", "common", "families")
)  # of models: no one family
# Commands that still know one family.
OF_A_FAMILY = ("imagerl.rl.commands.tokenize",)
# Seconds each to import: only inside functions, so that `imagerl --help` and recipe errors come at once.
HEAVY = ("accelerate", "deepspeed", "diffusers", "matplotlib", "onnxruntime", "paddleocr", "paddlex")
HEAVY += ("open_clip", "peft", "rapidocr", "ray", "tensorboard", "timm", "torchvision", "transformers", "trl")
TORCH_FREE = ("imagerl.rl.config.train", "imagerl.rl.config.recipe", "imagerl.rl.errors", *READERS)
MAX_LINES = 400
MAX_ENTRIES = 16  # on the top floor of rl/

FILES = {
    ".".join(("imagerl", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
} | {f"imagerl.api.{path.stem}": path for path in sorted((ROOT / "imagerl" / "api").glob("*.py"))}


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
    return {name for name in imports if name.startswith("imagerl.") and name.count(".") > 1}


def forbidden(module: str, imports: set[str]) -> set[str]:
    """What `module` imports against the rules."""
    bare = {name for name in imports if name.split(".")[0] in PACKAGES}  # a second copy of our modules
    if module.startswith(MEETING):  # commands call the API, never the other way
        backwards = module.startswith(MEETING[0])
        families = {n for n in imports if n.startswith("imagerl.models.") and not n.startswith(COMMON)}
        bare |= families if module not in OF_A_FAMILY else set()
        return bare | {name for name in imports if backwards and name.startswith(MEETING[1])}
    if module in SHARED:
        return bare | {name for name in ours(imports) if name not in SHARED}
    package = ".".join(module.split(".")[:2])
    allowed = ("imagerl.rl", PROTOCOLS) if package == "imagerl.rl" else (package, *SHARED)
    return bare | {n for n in ours(imports) if not any(n == a or n.startswith(f"{a}.") for a in allowed)}


def room(module: str) -> str:
    """The file or folder on the top floor of `rl`, `models` or `rewards` that a module lives in."""
    return ".".join(module.split(".")[:3])


def behind_circles(graph: dict[str, set[str]]) -> set[str]:
    """What remains of a graph of imports when leaves are taken away until there are none: circles and what needs
    them."""
    graph = {name: {need for need in needs if need != name} for name, needs in graph.items()}
    while leaves := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for leaf in leaves:
            del graph[leaf]
    return set(graph)


def test_the_rules_can_fail() -> None:
    command = "imagerl.rl.commands.train"
    assert forbidden("imagerl.api.training", {command}) == {command}
    trainer, models = "imagerl.rl.training.trainer", "imagerl.models"
    qwen = f"{models}.blip3o_next.policy"
    assert forbidden(command, {qwen, f"{models}.families", f"{models}.common.hub"}) == {qwen}
    assert forbidden(trainer, {PROTOCOLS, f"{models}.families"}) == {f"{models}.families"}
    assert forbidden(trainer, {f"{models}.ar"}) == {f"{models}.ar"}
    assert forbidden(trainer, {"rl.types", "imagerl.rl.types"}) == {"rl.types"}
    assert forbidden(f"{models}.ar", {"imagerl.rl.types", f"{models}.loading"}) == set()
    others = {"imagerl.rl.algorithms.kl", "imagerl.rewards.base"}
    assert forbidden(f"{models}.ar", others) == others
    assert forbidden("imagerl.rl.types", {"imagerl.rl.config.train"}) == {"imagerl.rl.config.train"}
    lazy = ast.parse("import a\ndef f():\n    import b\nif TYPE_CHECKING:\n    import c\nelse:\n    import d")
    assert imports_of(lazy, "rl.x", True) == {"a", "d"}
    assert imports_of(lazy, "rl.x", False) == {"a", "b", "c", "d"}
    relative = ast.parse("from . import y\nfrom .z import w")
    assert imports_of(relative, "rl.x", True) >= {"rl", "rl.z"}
    assert behind_circles({"a": {"b"}, "b": {"a"}, "c": {"a"}, "d": set()}) == {"a", "b", "c"}


def test_all_packages_were_found() -> None:
    assert {name.split(".")[1] for name in FILES} == {*PACKAGES, "api"}
    assert {"imagerl.rl.types", "imagerl.rl.config.train", "imagerl.rewards.base"} <= set(FILES)


@pytest.mark.parametrize("module", FILES)
def test_layering(module: str) -> None:
    assert not forbidden(module, ALL[module])


@pytest.mark.parametrize("module", FILES)
def test_heavy_libraries_are_imported_lazily(module: str) -> None:
    heavy = {name for name in TOP[module] if name.split(".")[0] in HEAVY}
    assert not heavy


def test_no_import_cycles() -> None:
    assert not behind_circles({name: {need for need in TOP[name] if need in FILES} for name in FILES})


def test_no_import_circles_between_rooms() -> None:
    """Folders count as one, and imports inside functions or for types only count too."""
    graph: dict[str, set[str]] = {}
    for name in FILES:
        if name.count(".") > 1:
            needs = graph.setdefault(room(name), set())
            needs |= {room(need) for need in ALL[name] if need in FILES and need.count(".") > 1}
    assert not behind_circles(graph)


def test_the_top_floor_is_small() -> None:
    kept = [path for path in (ROOT / "rl").iterdir() if path.is_file() or any(path.rglob("*.py"))]
    assert len(kept) <= MAX_ENTRIES


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
