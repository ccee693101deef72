"""An export on the Hugging Face hub, with a card that says where it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from imagerl.rl.errors import ImageRLError, one_line

CARD = "README.md"


def model_card(provenance: Mapping[str, Any], name: str) -> str:
    """Return the model card of an export, in Markdown, from its provenance alone. `name` is the repository's."""
    from imagerl.models.common.hub import is_hub_name

    recipe, base = provenance["recipe"], str(provenance["base_model"])
    algorithm = recipe["algorithm"]["name"] if "algorithm" in recipe else "supervised fine-tuning"
    header: dict[str, object] = {
        "library_name": "imagerl",
        "pipeline_tag": "text-to-image",
        "tags": ["imagerl", algorithm.replace(" ", "-").replace("_", "-")],
    }
    if is_hub_name(base) and not Path(base).exists():  # a path of some machine is no model of the hub
        header["base_model"] = base.partition("@")[0]
    held_out = {key: value for key, value in provenance["metrics"].items() if key.startswith("eval/")}
    rows = [
        f"| `{key.removeprefix('eval/')}` | {value:.4g} |"
        for key, value in held_out.items()
        if value is not None
    ]
    proof = provenance.get("proof") or {}
    proved = " and ".join(key.removesuffix("_sha256") for key in proof if key.endswith("_sha256"))
    sampling = ", ".join(f"{key} {value:g}" for key, value in provenance["sampling"].items())
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n",
        f"# {name.rpartition('/')[2]}\n",
        f"`{base}` after {provenance['step']} steps of {algorithm}, exported by "
        f"ImageRL {provenance['versions'].get('imagerl', '')}.\n",
        "## Held-out results\n\n| metric | mean |\n|---|---|\n" + "\n".join(rows) + "\n" if rows else "",
        f"## Use\n\n```bash\nimagerl sample 'a sign that says \"RIVER\"' --model {name}\n```\n",
        f"Pictures are drawn with {sampling}, as the results above were.\n" if sampling else "",
        "## Where it comes from\n",
        f"The files repeated the {proved} of the run when they were loaded again.\n" if proved
        else "It was exported without a proof that the files repeat what the run did.\n",
        "`provenance.json` holds the SHA-256 of every file and the versions of all libraries. The recipe:\n",
        f"```yaml\n{yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)}```\n",
    ]  # fmt: skip
    return "\n".join(part for part in parts if part)


def reserve(repository: str, public: bool = False) -> None:
    """Make the repository, if it is not there yet, before time goes into an export.

    Raises ImageRLError when the hub refuses: no token, no right, an impossible name."""
    from huggingface_hub import HfApi

    with _told(repository):
        HfApi().create_repo(repository, private=not public, exist_ok=True)


def push(folder: Path, repository: str, provenance: Mapping[str, object]) -> str:
    """Write the card into an export and upload the folder in one commit. Returns its address.

    Raises ImageRLError when that fails; the folder stays."""
    from huggingface_hub import HfApi

    (folder / CARD).write_text(model_card(provenance, repository), encoding="utf-8")
    message = f"Step {provenance['step']} of {provenance['base_model']}, exported by ImageRL"
    with _told(repository, f"; {folder} is complete, upload it later: hf upload {repository} {folder}"):
        return str(
            HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message=message).commit_url
        )


@contextmanager
def _told(
    repository: str, rest: str = "; check the name, and that `hf auth login` was done"
) -> Iterator[None]:
    """Turn what the hub's client raises, from bad names to broken connections, into one line."""
    try:
        yield
    except Exception as error:
        raise ImageRLError(f"the hub does not take {repository}: {one_line(error, 200)}{rest}") from error
