"""Fashion-MNIST in five parts: rightly and wrongly labelled, validation, test."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

FILE = Path(__file__).parents[1] / 'data' / 'fashion' / 'fashion_6000_2000.npz'
CLASSES = 10
VALIDATION = 500


class Parts(NamedTuple):
  """Images ``[n, 28, 28, 1]`` in [0, 1] with labels; no image is in two parts.

  Attributes:
    train: what is fine-tuned on, with true labels.
    wrong: other images, with wrong labels, that only the bad start has learnt.
    validation: chooses the rho of each method.
    test: chooses nothing.
  """

  train: tuple[np.ndarray, np.ndarray]
  wrong: tuple[np.ndarray, np.ndarray]
  validation: tuple[np.ndarray, np.ndarray]
  test: tuple[np.ndarray, np.ndarray]


def split_fashion(seed: int, *, train: int, wrong: int) -> Parts:
  """Draws the images to train with, and moves the labels of some to other classes.

  Args:
    seed: of which images are rightly and wrongly labelled, and how wrongly.
    train: number of images with true labels, out of 6,000.
    wrong: number of other images, out of the same, each with a label of another
      class, all others being equally likely.

  Returns:
    The parts. Validation and test are the same for every seed: the first 500 and the
    other 1,500 of the images that Fashion-MNIST keeps for the test.

  Raises:
    ValueError: if there are not enough images.
  """
  with np.load(FILE) as file:
    x, y, xt, yt = (file[name] for name in ('x', 'y', 'xt', 'yt'))
  if train + wrong > len(y):
    raise ValueError(f'There are {len(y)} images, not {train} + {wrong}.')
  rng = np.random.default_rng(seed)
  rows = rng.permutation(len(y))[: train + wrong]
  x, y, xt = _scale(x[rows]), y[rows].astype(np.int32), _scale(xt)
  y[train:] = (y[train:] + rng.integers(1, CLASSES, wrong)) % CLASSES
  yt = yt.astype(np.int32)
  return Parts(
    train=(x[:train], y[:train]),
    wrong=(x[train:], y[train:]),
    validation=(xt[:VALIDATION], yt[:VALIDATION]),
    test=(xt[VALIDATION:], yt[VALIDATION:]),
  )


def _scale(images: np.ndarray) -> np.ndarray:
  return (images[..., None] / 255).astype(np.float32)
