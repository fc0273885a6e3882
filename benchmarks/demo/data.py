"""Scikit-learn's handwritten digits, split at random, some training labels wrong."""

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits

CLASSES = 10


class Split(NamedTuple):
  """Images ``[n, 8, 8, 1]`` in [0, 1] with labels; only training labels are noisy."""

  train: tuple[np.ndarray, np.ndarray]
  validation: tuple[np.ndarray, np.ndarray]
  test: tuple[np.ndarray, np.ndarray]


def split_digits(seed: int, *, train: int, validation: int, wrong: float) -> Split:
  """Splits the 1,797 digits and moves a share of the training labels to other classes.

  Args:
    seed: of the permutation and of which labels become wrong.
    train: number of training images.
    validation: number of validation images; all others are for the test.
    wrong: share of the training labels that are replaced by another class.

  Returns:
    The three parts.
  """
  rng = np.random.default_rng(seed)
  images, labels = load_digits(return_X_y=True)
  order = rng.permutation(len(labels))
  x = (images[order].reshape(-1, 8, 8, 1) / 16).astype(np.float32)
  y = labels[order].astype(np.int32)
  chosen = rng.permutation(train)[: round(wrong * train)]
  noisy = y[:train].copy()
  noisy[chosen] = (noisy[chosen] + rng.integers(1, CLASSES, len(chosen))) % CLASSES
  end = train + validation
  return Split((x[:train], noisy), (x[train:end], y[train:end]), (x[end:], y[end:]))
