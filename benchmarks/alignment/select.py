"""Which cell of the grid a method is judged by, and how cells compare."""

from collections.abc import Mapping
from collections.abc import Sequence
import statistics
from typing import Any

Row = Mapping[str, Any]

# What is chosen by, and whether more of it is better.
CRITERIA = {'knn': True, 'recall': True, 'loss': False}


def mean(values: Sequence[float]) -> float:
  """The mean over the seeds."""
  return statistics.fmean(values)


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


def paired(a: Row, b: Row, name: str) -> tuple[float, float]:
  """Mean over the seeds of ``a − b`` on the test concepts, and its standard error."""
  gaps = [x - y for x, y in zip(a['test'][name], b['test'][name], strict=True)]
  return mean(gaps), statistics.stdev(gaps) / len(gaps) ** 0.5
