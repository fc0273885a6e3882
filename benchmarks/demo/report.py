"""The table of `benchmarks.demo`, and what its numbers say."""

from collections.abc import Mapping
import statistics
from typing import Any

from benchmarks.common.tables import Report

Row = Mapping[str, Any]

HEAD = ('method', 'rho', 'radius', 'test %', 'validation', '√(1+α²n²)', 'rise', 'time')
NOTE = (
  'Accuracies are mean ± standard deviation over the seeds, on rightly labelled images.'
  ' radius is the mean ‖δ‖, rise is ℓ(w+δ) − ℓ(w), n the gradient norm, α = 1; radius,'
  ' rise and √(1+α²n²) are means over all steps of training. time is that of a step,'
  ' relative to Adam, the median of interleaved rounds, once a method. "SAM, matched"'
  ' is SAM with the mean radius that Monge SAM has had at this rho. The rho with the'
  ' best mean validation accuracy is marked *.'
)


def report(results: Mapping[str, Any]) -> Report:
  """The table and what it shows, for the terminal and the README."""
  settings = results['settings']
  caption = (
    f'{settings["train"]} handwritten digits, {settings["wrong"]:.0%} of them'
    f' mislabelled, {settings["epochs"]} epochs, {len(settings["seeds"])} seeds.'
  )
  lines = [_cells(results, row) for row in results['rows']]
  return Report(caption, HEAD, lines, NOTE, results['findings'])


def findings(results: Mapping[str, Any]) -> list[str]:
  """What the numbers show, in sentences made from them."""
  rows = {(row['method'], row['rho']): row for row in results['rows']}
  best = {method: rows[method, rho] for method, rho in results['best'].items()}
  rhos = results['settings']['rhos']
  return [_compare(best), _fall_off(rows, rhos), _control(rows, rhos)]


def _compare(best: Mapping[str, Row]) -> str:
  """The methods at the rho that the validation images have chosen."""
  gaps = [
    100 * (a - b)
    for a, b in zip(
      best['Monge SAM']['test']['runs'], best['SAM']['test']['runs'], strict=True
    )
  ]
  error = statistics.stdev(gaps) / len(gaps) ** 0.5
  gap = statistics.mean(gaps)
  verdict = 'more' if abs(gap) > 2 * error else 'not more'
  return (
    'At the rho chosen on validation images the test accuracy is'
    f' {_accuracy(best["Adam"])} % with Adam, {_accuracy(best["SAM"])} % with SAM (rho'
    f' {best["SAM"]["rho"]:g}) and {_accuracy(best["Monge SAM"])} % with Monge SAM (rho'
    f' {best["Monge SAM"]["rho"]:g}). Monge SAM minus SAM is {gap:+.1f} points,'
    f' {verdict} than two standard errors ({error:.1f} each, paired by seed).'
  )


def _fall_off(rows: Mapping[tuple[str, float | None], Row], rhos) -> str:
  """The largest rho at which a method beats Adam, and the end of the grid."""
  adam, last = _mean(rows['Adam', None]), max(rhos)
  parts = []
  for method in ('SAM', 'Monge SAM'):
    above = [rho for rho in rhos if _mean(rows[method, rho]) > adam]
    parts.append(f'{max(above):g} for {method}' if above else f'none for {method}')
  ends = ' and '.join(_accuracy(rows[m, last]) + ' %' for m in ('SAM', 'Monge SAM'))
  return (
    f'The largest rho with a mean test accuracy above that of Adam is {parts[0]} and'
    f' {parts[1]}; at the end of the grid, rho {last:g}, they are at {ends}.'
  )


def _control(rows: Mapping[tuple[str, float | None], Row], rhos) -> str:
  """How far Monge SAM is from SAM, and from SAM with its mean radius."""
  same, matched = (
    [100 * abs(_mean(rows['Monge SAM', rho]) - _mean(rows[other, rho])) for rho in rhos]
    for other in ('SAM', 'SAM, matched')
  )
  return (
    'Over the grid the test accuracy of Monge SAM is'
    f' {statistics.mean(same):.1f} points (median {statistics.median(same):.1f}) from'
    f' that of SAM at the same rho, and {statistics.mean(matched):.1f} (median'
    f' {statistics.median(matched):.1f}) from that of SAM at the same mean radius, from'
    f' which it is farthest, {max(matched):.1f} points, at rho'
    f' {rhos[matched.index(max(matched))]:g}.'
  )


def _cells(results: Mapping[str, Any], row: Row) -> list[str]:
  """One line of the table; Adam has neither rho nor rise."""
  rho, radius, rise = '', '', ''
  if row['rho'] is not None:
    best = '* ' if results['best'][row['method']] == row['rho'] else ''
    rho = f'{best}{row["rho"]:g}'
    shrink = row['shrink']['mean'] if row['method'] == 'Monge SAM' else 1.0
    radius = f'{row["radius"] * shrink:.3f}'
    rise = f'{row["rise"]["mean"]:.3f}'
  return [
    row['method'],
    rho,
    radius,
    _accuracy(row),
    _accuracy(row, 'validation'),
    f'{row["factor"]["mean"]:.2f}',
    rise,
    f'{row["time"]:.2f}',
  ]


def _accuracy(row: Row, part: str = 'test') -> str:
  return f'{100 * row[part]["mean"]:.1f} ± {100 * row[part]["sd"]:.1f}'


def _mean(row: Row) -> float:
  return row['test']['mean']
