"""A grid of methods and radii: its cells, what a cell comes to, and who is better.

A row is a cell with its runs: for every number of interest a summary of the values of
all seeds, in the same order for every row, so that rows are compared seed by seed.
"""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import math
import statistics
from typing import Any
from typing import NamedTuple

from benchmarks.common.tables import Table

SAM, MONGE, MATCHED = 'SAM', 'Monge SAM', 'SAM, matched'
CHOSEN = 'chosen'
DIFFERENCES = (
  'Differences in points, mean ± standard error, paired by seed; a star marks those'
  ' above two standard errors. The last line has each method at its own best rho.'
)
Row = Mapping[str, Any]


class Cell(NamedTuple):
  """A method at a place of the grid.

  Attributes:
    method: its name.
    rho: its place on the grid; None for a method without a radius.
    given: the ``rho`` given to the method; differs from ``rho`` where matched.
  """

  method: str
  rho: float | None = None
  given: float | None = None


class Difference(NamedTuple):
  """A mean difference, paired by seed, and its standard error."""

  mean: float
  error: float

  def text(self, digits: int = 1) -> str:
    """With a star where the mean is more than two standard errors from zero."""
    star = ' *' if abs(self.mean) > 2 * self.error else ''
    return f'{self.mean:+.{digits}f} ± {self.error:.{digits}f}{star}'


def cells(plain: str, methods: Iterable[str], rhos: Sequence[float]) -> list[Cell]:
  """The method without a radius, and the others at each radius."""
  return [Cell(plain), *(Cell(method, rho, rho) for method in methods for rho in rhos)]


def matched(rows: Iterable[Row]) -> list[Cell]:
  """SAM with ``ρ · mean(1/√(1 + α²n²))``, the mean taken over Monge SAM's runs."""
  return [
    Cell(MATCHED, row['rho'], matched_radius(row['rho'], row['shrink']['runs']))
    for row in rows
    if row['method'] == MONGE
  ]


def matched_radius(rho: float, shrink: Sequence[float]) -> float:
  """The mean radius of Monge SAM's runs, each of which shrinks ρ by a factor."""
  return rho * statistics.mean(shrink)


def summarize(cell: Cell, runs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
  """A cell with the summary of each number of its runs."""
  values = {name: [run[name] for run in runs] for name in runs[0]}
  return cell._asdict() | {name: summary(runs) for name, runs in values.items()}


def summary(values: Sequence[float]) -> dict[str, Any]:
  """Mean, standard deviation, and standard error of the mean, with the values."""
  sd = spread(values)
  error = sd / math.sqrt(len(values))
  return {'mean': statistics.mean(values), 'sd': sd, 'se': error, 'runs': values}


def spread(values: Sequence[float]) -> float:
  """The standard deviation, of one value 0."""
  return statistics.stdev(values) if len(values) > 1 else 0.0


def percent(number: Mapping[str, float], by: str = 'sd') -> str:
  """A summary of shares in per cent, with its ``sd`` or ``se``."""
  return f'{100 * number["mean"]:.1f} ± {100 * number[by]:.1f}'


def best_rhos(rows: Iterable[Row]) -> dict[str, float | None]:
  """The rho of each method with the highest mean accuracy on the validation data."""
  best: dict[str, Row] = {}
  for row in rows:
    leader = best.setdefault(row['method'], row)
    if row['validation']['mean'] > leader['validation']['mean']:
      best[row['method']] = row
  return {method: row['rho'] for method, row in best.items()}


def star_rho(results: Mapping[str, Any], row: Row) -> str:
  """The rho of a row, with a star if it is its method's best."""
  best = '* ' if results['best'][row['method']] == row['rho'] else ''
  return '' if row['rho'] is None else f'{best}{row["rho"]:g}'


def paired(a: Sequence[float], b: Sequence[float], scale: float = 1.0) -> Difference:
  """Mean of ``a − b`` over the seeds, and its standard error."""
  gaps = [scale * (x - y) for x, y in zip(a, b, strict=True)]
  return Difference(statistics.mean(gaps), spread(gaps) / math.sqrt(len(gaps)))


def differences(
  results: Mapping[str, Any], pairs: Sequence[tuple[str, str]]
) -> tuple[Table, str]:
  """Test accuracy of one method minus that of another, in points.

  Args:
    results: ``rows``, and the ``best`` rho of each method.
    pairs: the methods that are compared, in this order.

  Returns:
    A line for each rho and one for each method at its own best, and what is shown.
  """
  rows = {(row['method'], row['rho']): row for row in results['rows']}
  best = {method: rows[method, rho] for method, rho in results['best'].items()}

  def line(name, at):
    runs = [[at(method)['test']['runs'] for method in pair] for pair in pairs]
    return [name, *(paired(*two, scale=100).text() for two in runs)]

  def at_rho(rho):
    return lambda method: rows.get((method, rho)) or rows[method, None]

  lines = [line(f'{rho:g}', at_rho(rho)) for rho in results['settings']['rhos']]
  head = ['rho', *(f'{a}\n− {b}' for a, b in pairs)]
  lines.append(line(CHOSEN, best.__getitem__))
  return Table('Differences in test accuracy', head, lines), DIFFERENCES
