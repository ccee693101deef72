"""A reward that looks reasonable and is not, to see what `imagerl reward check` says of it."""

import numpy as np


def vivid(images):
    """How colourful each picture is, the most colourful one being 1."""
    colourfulness = np.array([np.asarray(image, dtype=float).std(axis=-1).mean() for image in images])
    return colourfulness / colourfulness.max()
