"""What the numbers of `benchmarks.bad_minimum` say, in sentences made from them.

Two rules, fixed before the runs: a method differs from another where the mean
difference, paired by seed, is more than two of its standard errors; a method has left
the valley where the lowest training accuracy seen in its runs, in the mean, is
below 99 %.
"""

from collections.abc import Mapping
import math
import statistics
from typing import Any

from benchmarks.bad_minimum.methods import LE_SAM
from benchmarks.bad_minimum.methods import MATCHED
from benchmarks.bad_minimum.methods import MONGE
from benchmarks.bad_minimum.methods import SAM
from benchmarks.bad_minimum.methods import SGD

STAYED = 0.99
Row = Mapping[str, Any]


def findings(results: Mapping[str, Any]) -> list[str]:
  """The start, the paper's three statements, the best of each, and the controls."""
  rows = {(row['method'], row['rho']): row for row in results['rows']}
  rhos = results['settings']['rhos']
  best = {method: rows[method, rho] for method, rho in results['best'].items()}
  return [
    _start(results, rows),
    _same_rho(rows, rhos),
    _valley(rows, rhos),
    _compare_best(best),
    _pooled(results['rows'], best[MONGE]),
    _controls(rows, rhos),
    _factors(rows, rhos),
  ]


def most_different(results: Mapping[str, Any]) -> float:
  """The rho where SAM and Monge SAM differ most, none being beyond its best one."""
  rows = {(row['method'], row['rho']): row for row in results['rows']}
  end = min(results['best'][SAM], results['best'][MONGE])
  rhos = [rho for rho in results['settings']['rhos'] if rho <= end]
  return max(rhos, key=lambda rho: abs(_paired(rows[SAM, rho], rows[MONGE, rho])[0]))


def _start(results, rows) -> str:
  starts, fresh = results['starts'], results['fresh']
  mean = lambda looks, part: 100 * statistics.mean(look[part] for look in looks)
  return (
    f'The bad start fits {mean(starts, "train"):.1f} % of the right labels and'
    f' {mean(starts, "wrong"):.1f} % of the wrong ones, and is right on'
    f' {mean(starts, "test"):.1f} % of the test images; the same training without wrong'
    f' labels comes to {mean(fresh, "test"):.1f} %, and SGD from the bad start to'
    f' {_percent(rows[SGD, None])} %.'
  )


def _same_rho(rows, rhos) -> str:
  parts = [
    f'{rho:g}: {_difference(rows[SAM, rho], rows[SGD, None])},'
    f' {_difference(rows[MONGE, rho], rows[SGD, None])},'
    f' {_difference(rows[SAM, rho], rows[MONGE, rho])}'
    for rho in rhos
  ]
  return (
    'Test accuracy in points at the same rho, as SAM minus SGD, Monge SAM minus SGD,'
    f' SAM minus Monge SAM (* where above two standard errors): {"; ".join(parts)}.'
  )


def _valley(rows, rhos) -> str:
  def left(method):
    return [rho for rho in rhos if rows[method, rho]['lowest']['mean'] < STAYED]

  def first(method):
    return f'from rho {min(left(method)):g} on' if left(method) else 'at no rho'

  between = sorted(set(left(SAM)) - set(left(MONGE)))
  if between:
    verdict = 'SAM leaves and Monge SAM stays at rho ' + ', '.join(
      f'{rho:g} (lowest training accuracy'
      f' {100 * rows[SAM, rho]["lowest"]["mean"]:.1f} % and'
      f' {100 * rows[MONGE, rho]["lowest"]["mean"]:.1f} %)'
      for rho in between
    )
  else:
    verdict = 'there is no rho on the grid at which SAM leaves and Monge SAM stays'
  ends = ', '.join(
    f'{method} {100 * rows[method, max(rhos)]["train"]["mean"]:.1f} %'
    for method in (SAM, MONGE, LE_SAM, MATCHED)
  )
  return (
    f'The lowest training accuracy is below {100 * STAYED:.0f} % {first(SAM)} with SAM,'
    f' {first(MONGE)} with Monge SAM: {verdict}. Training accuracy at the end, at rho'
    f' {max(rhos):g}: {ends}.'
  )


def _compare_best(best) -> str:
  named = ', '.join(
    f'{method} {_percent(best[method])} % (rho {best[method]["rho"]:g})'
    for method in (SAM, MONGE, LE_SAM, MATCHED)
  )
  mean, error = _paired(best[MONGE], best[SAM])
  verdict = 'more' if abs(mean) > 2 * error else 'not more'
  return (
    f'At the rho chosen on validation images the test accuracy is {named}. Monge SAM'
    f' minus SAM is {mean:+.1f} points, {verdict} than two standard errors'
    f' ({error:.1f} each, paired by seed); Monge SAM minus LE-SAM'
    f' {_difference(best[MONGE], best[LE_SAM])}.'
  )


def _pooled(rows, monge) -> str:
  """The matched radii are radii of SAM, too: with them its grid is twice as fine."""
  pool = [row for row in rows if row['method'] in (SAM, MATCHED)]
  best = max(pool, key=lambda row: row['validation']['mean'])
  mean, error = _paired(monge, best)
  verdict = 'more' if abs(mean) > 2 * error else 'not more'
  return (
    'With the matched radii as further points of its grid, SAM at the radius chosen on'
    f' validation images ({best["given"]:.3g}) comes to {_percent(best)} %; Monge SAM'
    f' minus SAM is then {mean:+.1f} points, {verdict} than two standard errors'
    f' ({error:.1f} each).'
  )


def _controls(rows, rhos) -> str:
  parts = []
  for other, name in (
    (SAM, 'SAM at the same rho'),
    (MATCHED, 'SAM at its mean radius'),
    (LE_SAM, 'LE-SAM at the same rho'),
  ):
    gaps = [_paired(rows[MONGE, rho], rows[other, rho])[0] for rho in rhos]
    largest = max(gaps, key=abs)
    parts.append(
      f'{statistics.mean(map(abs, gaps)):.1f} from {name} (largest {largest:+.1f} at'
      f' rho {rhos[gaps.index(largest)]:g})'
    )
  return (
    'Over the grid, Monge SAM is in the mean so many points of test accuracy away from'
    f' its controls: {"; ".join(parts)}.'
  )


def _factors(rows, rhos) -> str:
  factor = {rho: rows[MONGE, rho]['factor']['mean'] for rho in rhos}
  same = [f'{rho:g}' for rho in rhos if factor[rho] < 1.05]
  where = f'rho {", ".join(same)}' if same else 'no rho of the grid'
  return (
    'The mean of √(1+α²n²) along Monge SAM is'
    f' {", ".join(f"{f:.2f} (rho {rho:g})" for rho, f in factor.items())}; it is below'
    f' 1.05, so that Monge SAM is SAM in all but name, at {where}.'
  )


def _paired(a: Row, b: Row) -> tuple[float, float]:
  """Mean and standard error of ``a − b`` in test accuracy, in points."""
  gaps = [
    100 * (x - y) for x, y in zip(a['test']['runs'], b['test']['runs'], strict=True)
  ]
  spread = statistics.stdev(gaps) if len(gaps) > 1 else 0.0
  return statistics.mean(gaps), spread / math.sqrt(len(gaps))


def _difference(a: Row, b: Row) -> str:
  mean, error = _paired(a, b)
  return f'{mean:+.1f} ± {error:.1f}{" *" if abs(mean) > 2 * error else ""}'


def _percent(row: Row) -> str:
  return f'{100 * row["test"]["mean"]:.1f} ± {100 * row["test"]["se"]:.1f}'
