"""A GLM-Image model by its sizes alone: for what memory training it takes, before any weights are here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from imagerl.models.glm_image.loading import MODELS, load_other, load_prompts, read_sampling
from imagerl.models.glm_image.policy import GlmImagePolicy
from imagerl.models.glm_image.prompts import PromptEncoder


class GlmOutline:
    """Implements `models.base.Outline`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prompts: PromptEncoder = load_prompts(folder)

    def policy(self) -> GlmImagePolicy:
        """Return the policy, whose parameters have shapes only."""
        import diffusers
        import transformers
        from accelerate import init_empty_weights

        parts: dict[str, Any] = {}
        with init_empty_weights(include_buffers=False):
            for name, (kind, library, _) in MODELS.items():
                if library == "diffusers":
                    model = getattr(diffusers, kind)
                    config = model.load_config(self.folder / name, local_files_only=True)
                    parts[name] = model.from_config(config)
                else:
                    model = getattr(transformers, kind)
                    config = model.config_class.from_pretrained(self.folder / name, local_files_only=True)
                    parts[name] = model(config)
                parts[name].requires_grad_(False).eval()
        for name, (_, library, _) in MODELS.items():
            if library != "diffusers":
                parts[name].tie_weights()  # not above: there each name is given an empty tensor of its own
        parts |= {name: load_other(self.folder, name) for name in ("processor", "tokenizer", "scheduler")}
        policy = GlmImagePolicy(SimpleNamespace(**parts), *read_sampling(self.folder))
        policy.trainable.requires_grad_(True).eval()
        policy.decoder.eval()
        return policy
