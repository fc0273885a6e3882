"""Frozen features of emoji pictures and of their names, split by concept."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

FEATURES = Path(__file__).parent / 'data' / 'emoji_feats_256_128_i8.npz'
STYLES = ('Noto', 'OpenMoji')
VALIDATION = 200
TRAIN = 1300
SPLITS = ('half', 'style')


class Emoji(NamedTuple):
  """The concepts that are drawn in both styles; one row a concept in every field.

  Attributes:
    text: float32 ``[N, 128]``, features of the name.
    images: float32 ``[2, N, 256]``, features of the picture, for each of ``STYLES``.
    names: ``[N]`` strings.
    group: int ``[N]``, one of the nine groups that Unicode sorts emoji into.
  """

  text: np.ndarray
  images: np.ndarray
  names: np.ndarray
  group: np.ndarray


class Split(NamedTuple):
  """Which concepts, rows of :class:`Emoji`, serve what.

  Attributes:
    pretrain: concepts to pretrain on.
    tune: concepts to fine-tune on.
    validation: concepts on which hyperparameters are chosen.
    test: concepts on which results are measured.
    pretrain_styles: indices into ``STYLES`` of the drawings to pretrain on.
    tune_styles: those to fine-tune on, to choose on and to measure on.
  """

  pretrain: np.ndarray
  tune: np.ndarray
  validation: np.ndarray
  test: np.ndarray
  pretrain_styles: tuple[int, ...]
  tune_styles: tuple[int, ...]


def load() -> Emoji:
  """Reads the features, scaled by one global standard deviation each.

  The file numbers concepts by their place in Unicode's list, of which it lacks a few,
  and has one row of text a concept that it does have: the row is the rank of the
  number, not the number.
  """
  with np.load(FEATURES) as file:
    images = file['img'] * file['img_scale']
    text = file['txt'] * file['txt_scale']
    present, concept = np.unique(file['concept'], return_inverse=True)
    style, group, names = file['style'], file['group'], file['text']
  assert len(present) == len(text)
  row = np.full((len(STYLES), len(text)), -1)
  for i in range(len(STYLES)):
    row[i, concept[style == i]] = np.flatnonzero(style == i)
  both = (row >= 0).all(axis=0)
  images, text = images / images.std(), text / text.std()
  return Emoji(
    text=text[both].astype(np.float32),
    images=images[row[:, both]].astype(np.float32),
    names=names[both],
    group=group[row[0, both]].astype(int),
  )


def split(kind: str, concepts: int, seed: int) -> Split:
  """Divides the concepts at random.

  Args:
    kind: ``half``: pretrain on one half of the training concepts, tune on the other,
      in both styles. ``style``: pretrain on the Noto drawings of all of them, tune on
      the OpenMoji drawings, a shift of domain.
    concepts: how many there are.
    seed: of the division; validation and test are the same for both kinds.

  Returns:
    The :class:`Split`.
  """
  order = np.random.default_rng(seed).permutation(concepts)
  train, validation, test = np.split(order, [TRAIN, TRAIN + VALIDATION])
  if kind == 'half':
    pretrain, tune = np.split(train, 2)
    return Split(pretrain, tune, validation, test, (0, 1), (0, 1))
  if kind == 'style':
    return Split(train, train, validation, test, (0,), (1,))
  raise ValueError(f'`kind` must be one of {SPLITS}, got {kind!r}.')


def batches(
  concepts: np.ndarray, styles: tuple[int, ...], *, batch: int, steps: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Concepts and styles of the pictures for every step, ``[steps, batch]`` each.

  A batch holds no concept twice, or a name would be its own wrong answer. The concepts
  come in epochs, each picture in a style drawn at random.
  """
  rng = np.random.default_rng([seed, steps])
  per_epoch = len(concepts) // batch
  epochs = -(-steps // per_epoch)
  order = [rng.permutation(concepts)[: per_epoch * batch] for _ in range(epochs)]
  chosen = np.concatenate(order).reshape(-1, batch)[:steps]
  return chosen, rng.choice(styles, size=chosen.shape)
