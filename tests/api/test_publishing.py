"""Exports on the hub: the card that provenance makes, and what is asked of the hub's client."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml

from imagerl.api.publishing import CARD, model_card, push, reserve
from imagerl.rl.errors import ImageRLError

PROVENANCE: dict[str, Any] = {
    "step": 40,
    "base_model": "BLIP3o/BLIP3o-NEXT-SFT-3B@main",
    "recipe": {"algorithm": {"name": "dr_grpo"}, "run": {"steps": 40}},
    "metrics": {"step": 40, "loss": 0.1, "eval/ocr/exact_match": 0.7891, "eval/ocr/total": None},
    "versions": {"imagerl": "0.1.0", "torch": "2.13.0"},
    "sha256": {"model.safetensors": "0" * 64},
    "sampling": {"guidance": 2.0, "flow_steps": 30},
    "proof": {"prompts": ["a"], "tokens_sha256": "1" * 64, "pixels_sha256": "2" * 64},
}


class Hub:
    """A stand-in of the hub's client, whose repositories are folders."""

    root: Path
    refuses: str | None = None

    def create_repo(self, repository: str, private: bool, exist_ok: bool) -> None:
        if self.refuses == "create":
            raise huggingface_hub.errors.LocalTokenNotFoundError("no token;\nlog in")
        assert exist_ok
        (self.root / repository).mkdir(parents=True, exist_ok=True)
        (self.root / repository / "private").write_text(str(private))

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> SimpleNamespace:
        if self.refuses == "upload":
            raise ConnectionError("broken")
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"hub/{repo_id}: {commit_message}")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    class Own(Hub):
        root = tmp_path / "hub"

    monkeypatch.setattr(huggingface_hub, "HfApi", Own)
    return Own


def parts(card: str) -> tuple[dict[str, Any], str]:
    _, header, text = card.split("---\n", 2)
    return yaml.safe_load(header), text


def test_the_card_says_where_a_model_comes_from() -> None:
    header, text = parts(model_card(PROVENANCE, "me/signs"))
    assert header["base_model"] == "BLIP3o/BLIP3o-NEXT-SFT-3B"
    assert header["tags"] == ["imagerl", "dr-grpo"] and header["library_name"] == "imagerl"
    assert "# signs\n" in text and "after 40 steps of dr_grpo" in text and "--model me/signs" in text
    assert "| `ocr/exact_match` | 0.7891 |" in text and "ocr/total" not in text and "loss" not in text
    assert "guidance 2, flow_steps 30" in text and "repeated the tokens and pixels of the run" in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == PROVENANCE["recipe"]


def test_a_path_of_this_machine_is_no_base_model_and_a_missing_proof_is_said(tmp_path: Path) -> None:
    for base in ("tiny", str(tmp_path)):
        header, text = parts(model_card(PROVENANCE | {"base_model": base, "proof": {}}, "me/signs"))
        assert "base_model" not in header and "without a proof" in text


def test_an_export_is_uploaded_with_its_card(hub: type[Hub], tmp_path: Path) -> None:
    export = tmp_path / "export"
    export.mkdir()
    (export / "model.safetensors").write_bytes(b"weights")
    reserve("me/signs")
    assert (hub.root / "me/signs/private").read_text() == "True"
    reserve("me/signs", public=True)
    assert (hub.root / "me/signs/private").read_text() == "False"
    address = push(export, "me/signs", PROVENANCE)
    assert address == "hub/me/signs: Step 40 of BLIP3o/BLIP3o-NEXT-SFT-3B@main, exported by ImageRL"
    assert (hub.root / "me/signs/model.safetensors").read_bytes() == b"weights"
    assert (hub.root / "me/signs" / CARD).read_text() == model_card(PROVENANCE, "me/signs")


def test_what_the_hub_refuses_is_one_line(hub: type[Hub], tmp_path: Path) -> None:
    hub.refuses = "create"
    with pytest.raises(
        ImageRLError, match=r"does not take me/signs: no token; log in; check the name.*auth login"
    ):
        reserve("me/signs")
    hub.refuses = "upload"
    with pytest.raises(ImageRLError, match=r"broken; .* is complete, upload it later: hf upload me/signs"):
        push(tmp_path, "me/signs", PROVENANCE)
