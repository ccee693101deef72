"""Asks for bold letters and forgets to ask for letters: the reward of recipes/hacking_demo.yaml."""

import numpy as np


def bold(images):
    """How much of each picture is ink: the share of pixels far from the colour of its upper and lower edge."""
    pictures = np.stack([np.asarray(image, dtype=float) for image in images])
    background = np.median(pictures[:, [0, -1]], axis=(1, 2), keepdims=True)
    return (np.abs(pictures - background).max(axis=-1) > 64).mean(axis=(1, 2))
