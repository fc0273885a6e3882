"""A split of the emoji, a cell of the grid on it, and which cell a method has best."""

from collections.abc import Mapping
from collections.abc import Sequence
import statistics
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
from benchmarks.common.grid import MATCHED

PRETRAINED = 'pretrained'
# What is chosen by, and whether more of it is better.
CRITERIA = {'knn': True, 'recall': True, 'loss': False}
Row = Mapping[str, Any]
mean = statistics.fmean  # over the seeds


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


def best(rows: Sequence[Row], split: str, method: str, by: str = 'knn') -> Row:
  """The row of a method with the best mean score on the validation concepts.

  A cell that has diverged is chosen only if there is no other.

  Args:
    rows: of the results.
    split: only its rows are looked at.
    method: likewise.
    by: one of ``CRITERIA``.

  Returns:
    The row. What is reported of it is its score on the test concepts.
  """
  sign = 1 if CRITERIA[by] else -1

  def score(row):
    value = sign * mean(row['validation'][by])
    return not has_diverged(row), value if value == value else -float('inf')

  return max(choose(rows, split, method), key=score)


def choose(rows: Sequence[Row], split: str, method: str) -> list[Row]:
  """The rows of a method on a split."""
  return [row for row in rows if row['split'] == split and row['method'] == method]


def choose_stable(rows: Sequence[Row], split: str, method: str) -> list[Row]:
  """The same at the learning rates at which SGD does not diverge.

  Where SGD fails as well a radius cannot help, and divergence says nothing of it. If
  SGD diverges at all of them, as in a run of a few steps, all rows.
  """
  sgd, of_method = choose(rows, split, 'SGD'), choose(rows, split, method)
  stable = {row['learning_rate'] for row in sgd if not has_diverged(row)}
  return [row for row in of_method if row['learning_rate'] in stable] or of_method


def has_diverged(row: Row) -> bool:
  """Whether a cell counts as diverged: most of its seeds have."""
  diverged = row.get('diverged', ())
  return 2 * sum(diverged) > len(diverged)


def table_2_rho(rows: Sequence[Row], split: str, rhos: Sequence[float]) -> float:
  """The radius at which methods are shown to diverge or not over learning rates.

  As in the paper it is one at which SAM diverges at more than half of them, of those
  at which SGD does not: the smallest such of the grid, or else the largest of the grid.
  """
  sam = choose_stable(rows, split, 'SAM')
  for rho in rhos:
    failed = [has_diverged(row) for row in sam if row['rho'] == rho]
    if 2 * sum(failed) > len(failed):
      return rho
  return max(rhos)
