"""The tables of `benchmarks.bad_minimum`."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from benchmarks.bad_minimum.methods import ANNEALED
from benchmarks.bad_minimum.methods import LE_SAM
from benchmarks.bad_minimum.methods import SGD
from benchmarks.common import grid
from benchmarks.common.tables import Document
from benchmarks.common.tables import Table

NUMBERS = (
  *('train', 'validation', 'test', 'lowest', 'factor', 'shrink', 'radius'),
  *('median_slope', 'largest_slope', 'seconds', 'cpu_seconds'),
)
HEAD = (
  *('method', 'rho', 'radius', 'train %', 'lowest', 'validation %', 'test %'),
  *('√(1+α²n²)', 'n median', 'n largest'),
)
PAIRS = (
  (grid.SAM, SGD),
  (grid.MONGE, SGD),
  (grid.SAM, grid.MONGE),
  (grid.MONGE, LE_SAM),
  (grid.MONGE, grid.MATCHED),
  (ANNEALED, grid.MONGE),
  (ANNEALED, grid.SAM),
)
NOTE = (
  'Accuracies in per cent, mean ± standard error over the seeds. train: on the'
  ' correctly labelled images, which are fine-tuned on; lowest: the lowest such'
  ' accuracy seen in a run (below 99 % it has left the valley). n is the norm of the'
  ' gradient of a batch; radius (mean ‖δ‖) and √(1+α²n²) are means over all steps, n'
  ' median and n largest are over the steps of a run; all are means over the seeds.'
  ' "SAM, matched" is SAM with the mean radius that Monge SAM had at this rho; LE-SAM'
  ' has the radius min(ρ, ρ/(αn)); "α from 0" goes to its α in the first half. A star'
  ' marks the rho with the best mean validation accuracy.'
)


def summarize(cell: grid.Cell, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """A cell with its runs: a summary of each number, and all curves."""
  numbers = [{name: run[name] for name in NUMBERS} for run in runs]
  return grid.summarize(cell, numbers) | {'curves': [run['curves'] for run in runs]}


def report(results: Mapping[str, Any]) -> Document:
  """The starts, all cells, how the methods differ, and what it was measured with."""
  s, machine = results['settings'], results['environment']
  caption = (
    f'ResNet-8 (width {s["width"]}) on Fashion-MNIST: {s["train"]} correctly labelled'
    f' images, fine-tuned for {s["epochs"]} epochs with SGD (learning rate'
    f' {s["learning_rate"]:g}, batch {s["batch"]}) from a start that also fits'
    f' {s["wrong"]} wrong labels; {len(s["seeds"])} seeds,'
    f' {results["setting"]} setting.'
  )
  took = (
    f'{_minutes(results, "cpu_seconds")} minutes of processor time,'
    f' {_minutes(results, "seconds")} by the clock, on {machine["cores"]} cores'
    f' ({machine["device"]}, {machine["machine"]}; JAX {machine["jax"]}, Optax'
    f' {machine["optax"]}, Flax {machine["flax"]}), which may have had other work.'
  )
  cells = Table('', HEAD, [_cells(results, row) for row in results['rows']])
  return [
    caption,
    _starts(results),
    cells,
    NOTE,
    *grid.differences(results, PAIRS),
    took,
  ]


def _starts(results: Mapping[str, Any]) -> Table:
  """What fine-tuning starts from, and the same net trained without wrong labels."""
  looks = {'bad start': 'starts', 'trained without wrong labels': 'fresh'}
  parts = {'train': 'right labels %', 'wrong': 'wrong labels %', 'test': 'test %'}
  lines = []
  for name, key in looks.items():
    numbers = [grid.summary([look[part] for look in results[key]]) for part in parts]
    lines.append([name, *(grid.percent(number, 'se') for number in numbers)])
  return Table('Before fine-tuning', ['', *parts.values()], lines)


def _minutes(results: Mapping[str, Any], clock: str) -> str:
  """What making the starts and fine-tuning took, all runs together."""
  starts = sum(look[clock] for look in [*results['starts'], *results['fresh']])
  runs = sum(sum(row[clock]['runs']) for row in results['rows'])
  return f'{(starts + runs) / 60:.0f}'


def _cells(results: Mapping[str, Any], row: grid.Row) -> list[str]:
  """One line of the table; SGD has neither rho nor radius."""
  return [
    row['method'],
    grid.star_rho(results, row),
    '' if row['rho'] is None else f'{row["radius"]["mean"]:.3f}',
    grid.percent(row['train'], 'se'),
    f'{100 * row["lowest"]["mean"]:.1f}',
    grid.percent(row['validation'], 'se'),
    grid.percent(row['test'], 'se'),
    f'{row["factor"]["mean"]:.2f}',
    f'{row["median_slope"]["mean"]:.2f}',
    f'{row["largest_slope"]["mean"]:.1f}',
  ]
