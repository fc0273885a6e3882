"""What the numbers of `benchmarks.alignment` say, in sentences made from them."""

from collections.abc import Mapping
from collections.abc import Sequence
import statistics
from typing import Any

from benchmarks.alignment.problem import MATCHED
from benchmarks.alignment.select import best
from benchmarks.alignment.select import choose
from benchmarks.alignment.select import choose_stable
from benchmarks.alignment.select import has_diverged
from benchmarks.alignment.select import mean
from benchmarks.alignment.select import paired
from benchmarks.alignment.select import Row
from benchmarks.alignment.select import table_2_rho

SPLITS = ('half', 'style')


def findings(results: Mapping[str, Any]) -> list[str]:
  """What agrees with the paper, what does not, and what the controls add."""
  rows, settings = results['rows'], results['settings']
  claims = [
    claim
    for split in SPLITS
    for claim in (
      _sharpness_helps(rows, split),
      _monge_is_best(rows, split),
      _survives(rows, split, settings),
      _diverges_less(rows, split),
    )
  ]
  said = []
  for verdict, head in ((True, 'Agrees with the paper'), (False, 'Does not agree')):
    texts = [text for agrees, text in claims if agrees is verdict]
    said.append(f'{head}: {"; ".join(texts) or "nothing"}.')
  said.append(
    'Divergence is counted at the learning rates at which SGD does not diverge. What'
    ' the paper has no control for: '
    + '; '.join(
      control(rows, split)
      for split in SPLITS
      for control in (_reach, _at_matched_radius)
    )
    + '.'
  )
  factors = [mean(row['factor']) for row in rows if row['method'] == 'Monge SAM']
  said.append(
    'In the runs of Monge SAM the mean of √(1+n²) is between'
    f' {min(factors):.2f} and {max(factors):.2f} (median'
    f' {statistics.median(factors):.2f}).'
  )
  return said


def _sharpness_helps(rows: Sequence[Row], split: str) -> tuple[bool, str]:
  """Table 1: SAM and Monge SAM are better aligned than SGD and Adam."""
  knn = {m: mean(best(rows, split, m)['test']['knn']) for m in ('SGD', 'Adam', 'SAM')}
  monge = mean(best(rows, split, 'Monge SAM')['test']['knn'])
  agrees = min(knn['SAM'], monge) > max(knn['SGD'], knn['Adam'])
  return agrees, (
    f'({split}) alignment of SAM {knn["SAM"]:.3f} and Monge SAM {monge:.3f} against SGD'
    f' {knn["SGD"]:.3f} and Adam {knn["Adam"]:.3f}'
  )


def _monge_is_best(rows: Sequence[Row], split: str) -> tuple[bool, str]:
  """Table 1: Monge SAM is better aligned than SAM, by more than chance."""
  chosen = [best(rows, split, method) for method in ('Monge SAM', 'SAM')]
  gap, error = paired(*chosen, 'knn')
  sizes = 'more' if abs(gap) > 2 * error else 'not more'
  return gap > 2 * error, (
    f'({split}) Monge SAM’s best alignment minus SAM’s is {gap:+.4f}, {sizes} than two'
    f' standard errors ({error:.4f} each), the paper has +.041'
  )


def _survives(
  rows: Sequence[Row], split: str, settings: Mapping[str, Any]
) -> tuple[bool, str]:
  """Table 2: at some radius SAM diverges at most learning rates, Monge at none."""
  rho = table_2_rho(rows, split, settings['rhos'])
  failed = {}
  for method in ('SAM', 'Monge SAM'):
    at = [row for row in choose_stable(rows, split, method) if row['rho'] == rho]
    failed[method] = sum(map(has_diverged, at))
  agrees = 2 * failed['SAM'] > len(at) and failed['Monge SAM'] == 0
  return agrees, (
    f'({split}) at ρ = {rho:g} SAM diverges at {failed["SAM"]} of {len(at)} learning'
    f' rates, Monge SAM at {failed["Monge SAM"]}'
  )


def _diverges_less(rows: Sequence[Row], split: str) -> tuple[bool, str]:
  """Table 3: SAM diverges in more cells than Monge SAM."""
  failed = {
    method: [has_diverged(row) for row in choose_stable(rows, split, method)]
    for method in ('SAM', 'Monge SAM')
  }
  sam, monge = sum(failed['SAM']), sum(failed['Monge SAM'])
  return sam > monge, (
    f'({split}) SAM diverges in {sam} and Monge SAM in {monge} of'
    f' {len(failed["SAM"])} cells, the paper has 11 and 2 of 12'
  )


def _reach(rows: Sequence[Row], split: str) -> str:
  """The largest rho that does not diverge, by learning rate."""
  reach = []
  for method in ('SAM', 'Monge SAM'):
    largest: dict[float, float] = {}
    for row in choose(rows, split, method):
      if not has_diverged(row):
        rate = row['learning_rate']
        largest[rate] = max(row['rho'], largest.get(rate, 0.0))
    reach.append(largest)
  ratios = [reach[1][rate] / reach[0][rate] for rate in reach[0] if rate in reach[1]]
  ratios = ratios or [float('nan')]
  return (
    f'({split}) the largest ρ without divergence is {min(ratios):.1f} to'
    f' {max(ratios):.1f} times as large with Monge SAM, by learning rate'
  )


def _at_matched_radius(rows: Sequence[Row], split: str) -> str:
  """Monge SAM against SAM at its radius, over the grid and at the best of each."""

  def at(method):
    of_method = choose_stable(rows, split, method)
    return {(row['learning_rate'], row['rho']): row for row in of_method}

  monge, counts, gaps = at('Monge SAM'), [], []
  for method in ('SAM', MATCHED):
    other = at(method)
    counts.append(sum(has_diverged(monge[k]) != has_diverged(other[k]) for k in monge))
    gaps.append(
      statistics.median(
        abs(mean(monge[k]['test']['knn']) - mean(other[k]['test']['knn']))
        for k in monge
      )
    )
  gap, error = paired(best(rows, split, 'Monge SAM'), best(rows, split, MATCHED), 'knn')
  return (
    f'({split}) Monge SAM and SAM differ in whether they diverge in {counts[0]} of'
    f' {len(monge)} cells at the same ρ and in {counts[1]} at the same mean radius, and'
    f' in alignment by {gaps[0]:.3f} and {gaps[1]:.3f} (median); the best alignment of'
    f' Monge SAM minus that of SAM at matched radii is {gap:+.4f} ± {error:.4f}'
  )
