"""Public preference models by name: each is a reward of ours with the settings that its own scoring code has.

What a name stands for may be overridden, such as `model` by a folder. Values are those of the public code, not
scaled: give a weight to match."""

from __future__ import annotations

PRESETS: dict[str, tuple[str, dict[str, object]]] = {
    # logit_scale · cosine (arXiv 2305.01569)
    "pickscore": (
        "clip",
        {"model": "yuvalkirstain/PickScore_v1", "library": "transformers", "head": "logit"},
    ),
    # the cosine itself (arXiv 2306.09341); needs open_clip
    "hpsv2": (
        "clip",
        {"model": "ViT-H-14", "pretrained": "xswu/HPSv2/HPS_v2.1_compressed.pt", "head": "cosine"},
    ),
    # LAION's linear layers without activation on the normalised features of a picture: about 1 to 10
    "aesthetic": (
        "clip",
        {
            "model": "openai/clip-vit-large-patch14",
            "library": "transformers",
            "head": "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",
        },
    ),
    # BLIP and a network, standardised (arXiv 2304.05977)
    "image_reward": ("image_reward", {"weights": "zai-org/ImageReward/ImageReward.pt"}),
    # the mean of a reward head behind Qwen2-VL (arXiv 2508.03789); `questions` is the file with what it was asked
    "hpsv3": ("vlm", {"weights": "MizzenAI/HPSv3/HPSv3.safetensors", "base": "Qwen/Qwen2-VL-7B-Instruct"}),
    # two such heads behind Qwen2.5-VL, for an edit and its source (arXiv 2509.26346); `weights` and `questions` are to
    # be named
    "edit_reward": ("vlm", {"base": "Qwen/Qwen2.5-VL-7B-Instruct", "source": True}),
    # two scores of 1 to 5 in words (arXiv 2503.05236), their mean in [0, 1]; a model to serve yourself
    "unified_reward": ("judge", {"rubric": "unified_reward", "model": "UnifiedReward"}),
}
