"""Frozen features of emoji pictures and of their names, split by concept."""

from collections.abc import Sequence
from pathlib import Path
import re
from typing import NamedTuple

import numpy as np

FEATURES = Path(__file__).parents[1] / 'data' / 'emoji' / 'emoji_features.npz'
STYLES = ('Noto', 'OpenMoji')
VALIDATION = 200
TRAIN = 1300
SPLITS = ('half', 'style')
# Those of one kind differ by who, how many or which; what follows the colon says it.
KINDS = ('family', 'kiss', 'couple with heart', 'keycap')
CLOCK = re.compile('o’clock|-thirty')
WHO = re.compile(r'\b(woman and man|person|people|man|men|woman|women)\b')


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
  """Reads the features, scaled by one global standard deviation each."""
  with np.load(FEATURES) as file:
    images = file['images'] * file['image_scale']
    text = file['text'] * file['text_scale']
    names, group = file['names'], file['group']
  return Emoji(text / text.std(), images / images.std(), names, group)


def base(name: str) -> str:
  """What near duplicates have in common; other names stay as they are.

  Men, women and persons who do the same, to the left or to the right, are one, and so
  are all families, kisses, couples with a heart, keycaps and clocks.
  """
  kind = name.split(':')[0]
  if kind in KINDS:
    return kind
  if CLOCK.search(name):
    return 'clock'
  return ' '.join(WHO.sub('', name.removesuffix(': facing right')).split())


def divide(
  kin: Sequence[str], sizes: Sequence[int], rng: np.random.Generator
) -> list[np.ndarray]:
  """Parts of the given sizes, at random, in none of which one has kin in another.

  The largest families go first, each to a part in proportion to the room that is left
  in it; those without kin fill what remains.

  Args:
    kin: rows with the same entry stay together.
    sizes: of the parts; their sum is the number of rows.
    rng: the source of chance.

  Returns:
    The rows of each part, in random order.
  """
  _, family = np.unique(kin, return_inverse=True)
  order = rng.permutation(family.max() + 1)
  room, part = np.array(sizes), np.empty(len(family), int)
  for label in sorted(order, key=lambda label: -np.sum(family == label)):
    members = np.flatnonzero(family == label)
    fits = np.where(room >= len(members), room, 0)
    part[members] = chosen = rng.choice(len(sizes), p=fits / fits.sum())
    room[chosen] -= len(members)
  return [rng.permutation(np.flatnonzero(part == i)) for i in range(len(sizes))]


def split(kind: str, names: Sequence[str] | np.ndarray, seed: int) -> Split:
  """Divides the concepts at random, near duplicates (:func:`base`) always together.

  Args:
    kind: ``half``: pretrain on one half of the training concepts, tune on the other,
      in both styles. ``style``: pretrain on the Noto drawings of all of them, tune on
      the OpenMoji drawings, a shift of domain.
    names: of the concepts.
    seed: of the division; validation and test are the same for both kinds.

  Returns:
    The :class:`Split`.
  """
  rng = np.random.default_rng(seed)
  half, rest = TRAIN // 2, len(names) - TRAIN - VALIDATION
  sizes = (half, half, VALIDATION, rest)
  parts = divide([base(name) for name in names], sizes, rng)
  pretrain, tune, validation, test = parts
  if kind == 'half':
    return Split(pretrain, tune, validation, test, (0, 1), (0, 1))
  if kind == 'style':
    train = np.concatenate([pretrain, tune])
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
