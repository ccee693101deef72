"""`imagerl recipes`: the recipes that come with the package, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.reading import read_text

recipes = typer.Typer(help="List the recipes that come with ImageRL, or copy one to edit.")


@recipes.callback(invoke_without_command=True)
def listing(context: typer.Context) -> None:
    """List the recipes that come with ImageRL: the name to give to a command, and what each is for."""
    from imagerl.rl.config.recipe import shipped_recipes

    if context.invoked_subcommand is not None:
        return
    found = shipped_recipes()
    width = max(map(len, found))
    for name, path in found.items():
        print(f"{name:<{width}}  {_purpose(path)}")
    print("\nimagerl train NAME runs one; imagerl recipes copy NAME writes it into a file to edit.")


@recipes.command("copy")
def copy(
    name: Annotated[str, typer.Argument(help="as listed by: imagerl recipes")],
    to: Annotated[Path | None, typer.Argument(help="file to write; NAME.yaml here unless given")] = None,
) -> None:
    """Write a recipe into a file of your own, whole: what it extends is laid under it."""
    from imagerl.rl.config.recipe import shipped_recipes

    path = shipped_recipes().get(name.removesuffix(".yaml"))
    if path is None:
        raise ImageRLError(f'no recipe is named "{name}"; see: imagerl recipes')
    target = to or Path(path.name)
    if target.is_dir():
        target /= path.name
    if target.exists():
        raise ImageRLError(f"{target} exists; give another name: imagerl recipes copy {name} FILE")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(_whole(path), encoding="utf-8")
    print(target)


def _whole(path: Path) -> str:
    """Return a recipe's text as it is, or, where it extends another, its header over both in one."""
    import yaml

    from imagerl.rl.config.recipe import read_recipe

    text = read_text(path)
    if "\nextends:" not in text:
        return text
    header = text[: text.index("\nextends:") + 1]
    return header + yaml.safe_dump(read_recipe(path), sort_keys=False, allow_unicode=True, width=110)


def _purpose(path: Path) -> str:
    """Return what the first line of a recipe's header says."""
    return read_text(path).partition("\n")[0].lstrip("# ").rstrip(":.")
