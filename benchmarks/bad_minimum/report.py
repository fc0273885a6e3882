"""The table of `benchmarks.bad_minimum`."""

from collections.abc import Mapping
from collections.abc import Sequence
import math
import statistics
from typing import Any

from benchmarks.bad_minimum.findings import STAYED
from benchmarks.common.tables import Report

Row = Mapping[str, Any]

NUMBERS = (
  *('train', 'validation', 'test', 'lowest', 'factor', 'shrink', 'radius'),
  *('median_slope', 'largest_slope', 'seconds', 'cpu_seconds'),
)
HEAD = (
  *('method', 'rho', 'radius', 'train %', 'lowest', 'validation %', 'test %'),
  *('√(1+α²n²)', 'n median', 'n largest'),
)
NARROW = ('method', 'rho', 'radius', 'train %', 'lowest', 'test %', '√(1+α²n²)')
NOTE = (
  'Accuracies in per cent, mean ± standard error over the seeds. train: on the rightly'
  ' labelled images, which are fine-tuned on; lowest: the lowest such accuracy seen in'
  f' a run (below {100 * STAYED:.0f} % it has left the valley). n is the norm of the'
  ' gradient of a batch; radius (mean ‖δ‖) and √(1+α²n²) are means over all steps, n'
  ' median and n largest are over the steps of a run; all are means over the seeds.'
  ' "SAM, matched" is SAM with the mean radius that Monge SAM has had at this rho;'
  ' LE-SAM has the radius min(ρ, ρ/(αn)). The rho with the best mean validation'
  ' accuracy is marked *.'
)


def summarize(cell: Mapping[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
  """A cell with its runs: mean and standard error of each number, and all curves."""
  row: dict[str, Any] = dict(cell)
  for name in NUMBERS:
    values = [run[name] for run in runs]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    row[name] = {
      'mean': statistics.mean(values),
      'se': spread / math.sqrt(len(values)),
      'runs': values,
    }
  row['curves'] = [run['curves'] for run in runs]
  return row


def best_rhos(rows: list[dict[str, Any]]) -> dict[str, float | None]:
  """The rho of each method with the highest mean accuracy on the validation images."""
  best: dict[str, dict[str, Any]] = {}
  for row in rows:
    leader = best.setdefault(row['method'], row)
    if row['validation']['mean'] > leader['validation']['mean']:
      best[row['method']] = row
  return {method: row['rho'] for method, row in best.items()}


def report(results: Mapping[str, Any], columns: Sequence[str] = HEAD) -> Report:
  """The table, what it shows, and what it was measured with."""
  s, machine = results['settings'], results['environment']
  caption = (
    f'ResNet-8 (width {s["width"]}) on Fashion-MNIST: {s["train"]} rightly labelled'
    f' images, fine-tuned for {s["epochs"]} epochs with SGD (learning rate'
    f' {s["learning_rate"]:g}, batch {s["batch"]}) from a start that also fits'
    f' {s["wrong"]} wrong labels; {len(s["seeds"])} seeds,'
    f' {results["setting"]} setting.'
  )
  took = (
    f'It took {_minutes(results, "cpu_seconds")} minutes of processor time and'
    f' {_minutes(results, "seconds")} by the clock, on {machine["cores"]} cores'
    f' ({machine["device"]}, {machine["machine"]}; JAX {machine["jax"]}, Optax'
    f' {machine["optax"]}, Flax {machine["flax"]}), which may have had other work, too.'
  )
  rows = [dict(zip(HEAD, _cells(results, row), strict=True)) for row in results['rows']]
  lines = [[row[column] for column in columns] for row in rows]
  return Report(caption, columns, lines, NOTE, [*results['findings'], took])


def _minutes(results: Mapping[str, Any], clock: str) -> str:
  """What making the starts and fine-tuning took, all runs together."""
  starts = sum(look[clock] for look in [*results['starts'], *results['fresh']])
  runs = sum(sum(row[clock]['runs']) for row in results['rows'])
  return f'{(starts + runs) / 60:.0f}'


def _cells(results: Mapping[str, Any], row: Row) -> list[str]:
  """One line of the table; SGD has neither rho nor radius."""
  rho, radius = '', ''
  if row['rho'] is not None:
    best = '* ' if results['best'][row['method']] == row['rho'] else ''
    rho = f'{best}{row["rho"]:g}'
    radius = f'{row["radius"]["mean"]:.3f}'
  return [
    row['method'],
    rho,
    radius,
    _percent(row['train']),
    f'{100 * row["lowest"]["mean"]:.1f}',
    _percent(row['validation']),
    _percent(row['test']),
    f'{row["factor"]["mean"]:.2f}',
    f'{row["median_slope"]["mean"]:.2f}',
    f'{row["largest_slope"]["mean"]:.1f}',
  ]


def _percent(number: Mapping[str, float]) -> str:
  return f'{100 * number["mean"]:.1f} ± {100 * number["se"]:.1f}'
