"""A split of the emoji with its pretrained models, and one cell of the grid on it."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.alignment import data as alignment_data
from benchmarks.alignment.training import Data
from benchmarks.alignment.training import diverged
from benchmarks.alignment.training import embed
from benchmarks.alignment.training import evaluate
from benchmarks.alignment.training import init
from benchmarks.alignment.training import Settings
from benchmarks.alignment.training import train

PRETRAINED = 'pretrained'
MATCHED = 'SAM, matched'


class Cell(NamedTuple):
  """One method at one place of the grid; ``radius`` is the rho that it is given."""

  split: str
  method: str
  learning_rate: float | None = None
  rho: float | None = None
  radius: float | None = None


class Problem:
  """A split for every seed, its batches, and its pretrained models."""

  def __init__(self, kind: str, settings: Settings, seeds: tuple[int, ...]):
    emoji = alignment_data.load()
    self.groups, self.batch = emoji.group, settings.batch
    self.data = Data(jnp.asarray(emoji.text), jnp.asarray(emoji.images))
    self.splits = [alignment_data.split(kind, emoji.names, seed) for seed in seeds]
    self.styles = self.splits[0].tune_styles
    self.tune_batches = self._batches('tune', settings, settings.steps, seeds)
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    fresh = jax.vmap(lambda key: init(key, self.data, settings))(keys)
    pretrain = self._batches('pretrain', settings, settings.pretrain_steps, seeds)
    rate = settings.pretrain_rate
    self.pretrained = train('Adam', self.data, fresh, pretrain, rate, 0.0).params

  def run(self, cell: Cell) -> tuple[Any, dict[str, Any]]:
    """The tuned params of all seeds, and the cell as a row of the results."""
    params, row = self.pretrained, cell._asdict()
    if cell.method != PRETRAINED:
      method = 'SAM' if cell.method == MATCHED else cell.method
      out = train(
        method,
        self.data,
        params,
        self.tune_batches,
        cell.learning_rate,
        cell.radius or 0.0,
      )
      params = out.params
      for name in ('loss', 'factor', 'shrink'):
        row[name] = _numbers(getattr(out, name))
      row['diverged'] = [diverged(loss, self.batch) for loss in row['loss']]
    for part in ('validation', 'test'):
      concepts = np.stack([getattr(split, part) for split in self.splits])
      scores = evaluate(self.data, params, concepts, self.styles)
      row[part] = {name: _numbers(x) for name, x in scores._asdict().items()}
    return params, row

  def embed_test(self, params: Any) -> tuple[np.ndarray, np.ndarray]:
    """The first seed's test concepts in the common space: names and pictures."""
    first = jax.tree.map(lambda leaf: leaf[0], params)
    concepts = self.splits[0].test
    pictures = self.data.images[self.styles[-1], concepts]
    return (
      np.asarray(embed(first['text'], self.data.text[concepts])),
      np.asarray(embed(first['image'], pictures)),
    )

  def test_groups(self) -> np.ndarray:
    """The Unicode group of the same concepts."""
    return self.groups[self.splits[0].test]

  def _batches(self, part, settings, steps, seeds):
    drawn = [
      alignment_data.batches(
        getattr(split, part),
        getattr(split, f'{part}_styles'),
        batch=settings.batch,
        steps=steps,
        seed=seed,
      )
      for split, seed in zip(self.splits, seeds, strict=True)
    ]
    return tuple(np.stack(arrays) for arrays in zip(*drawn, strict=True))


def _numbers(values: Any) -> list[float]:
  return [float(f'{value:.6g}') for value in np.asarray(values)]
