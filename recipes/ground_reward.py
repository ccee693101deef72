"""Asks for the right background alone: a reward of recipes/tiny_glm_grpo.yaml."""

import numpy as np

from imagerl.rewards.colours import BACKGROUND_TOLERANCE, estimate_background


def ground(images, background_rgb):
    """1 where the rim of a picture has the colour asked for."""
    seen = np.stack([estimate_background(np.asarray(image.convert("RGB"))) for image in images])
    return (np.linalg.norm(seen - np.asarray(background_rgb), axis=1) <= BACKGROUND_TOLERANCE).astype(float)
