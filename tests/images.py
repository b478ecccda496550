"""Images that tests make up."""
import numpy as np
from PIL import Image

from sources import ArraySource


def plain(color, size=(6, 5)):
    return Image.new('RGB', size, color)


def noise(n, size=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def noise_source(n, size=16):
    return ArraySource(noise(n, size), np.arange(n) % 2, None, 'noise')
