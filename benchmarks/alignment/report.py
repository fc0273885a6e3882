"""The paper's three tables from the results of `benchmarks.alignment`."""

from collections.abc import Mapping
from collections.abc import Sequence
import statistics
from typing import Any

from benchmarks.alignment.problem import best
from benchmarks.alignment.problem import choose
from benchmarks.alignment.problem import choose_stable
from benchmarks.alignment.problem import CRITERIA
from benchmarks.alignment.problem import has_diverged
from benchmarks.alignment.problem import mean
from benchmarks.alignment.problem import PRETRAINED
from benchmarks.alignment.problem import Row
from benchmarks.alignment.problem import table_2_rho
from benchmarks.common.grid import MATCHED
from benchmarks.common.grid import paired
from benchmarks.common.grid import spread
from benchmarks.common.tables import Document
from benchmarks.common.tables import Table

PAPER = {PRETRAINED: 0.351, 'SGD': 0.387, 'Adam': 0.388, 'SAM': 0.405}
PAPER['Monge SAM'] = 0.446
METHODS = (*PAPER, MATCHED)
SPLITS = {
  'half': 'pretrained on one half of the training concepts, tuned on the other',
  'style': 'pretrained on Noto drawings, tuned on OpenMoji drawings',
}
NOTE = (
  'Mean ± standard deviation over the seeds; each sets the division of the concepts,'
  ' the initial weights and the batches. Alignment is mutual kNN of names and pictures,'
  ' k = 8; recall@1 is the mean of both directions; the test loss has all test concepts'
  ' in one batch, the training loss is the mean of the last 20 batches. n is the'
  ' gradient norm, α = 1. "SAM, matched" is SAM with the mean radius that Monge SAM'
  ' had at this learning rate and ρ. A run has diverged if its training loss ends'
  ' above 0.85 ln 128 = 4.12 or is not finite, a cell (†) if most of its seeds have;'
  ' such a cell is not chosen.'
)
DIFFERENCE = (
  'Differences are mean ± standard error, paired by seed; a star marks those above two'
  ' standard errors.'
)


def report(results: Mapping[str, Any]) -> Document:
  """Tables 1 to 3 of the paper, and what the controls add, by split."""
  rows, settings = results['rows'], results['settings']
  made: list[str | Table] = [_setting(results), NOTE]
  for split, what in SPLITS.items():
    made += [
      _table_1(rows, split, what),
      _table_2(rows, split, settings),
      _table_3(rows, split, settings),
      _reach(rows, split, settings),
      _best(rows, split),
      _cell_by_cell(rows, split),
    ]
  return [*made, DIFFERENCE]


def _table_1(rows: Sequence[Row], split: str, what: str) -> Table:
  """Best alignment of each method, chosen on the validation concepts."""
  lines = []
  for method in METHODS:
    row = best(rows, split, method)
    tuned = 'loss' in row
    lines.append(
      [
        method,
        f'{PAPER[method]:.3f}' if method in PAPER else '',
        _spread(row['test']['knn']),
        _spread(row['test']['recall'], 100, 1),
        _spread(row['test']['loss'], 1, 2),
        f'{mean(row["loss"]):.2f}' if tuned else '',
        _number(row['learning_rate']),
        _number(row['rho']),
        f'{mean(row["factor"]):.2f}' if tuned else '',
      ]
    )
  caption = f'Table 1, {split} ({what}): best alignment, chosen on validation concepts'
  head = ['method', 'paper', 'alignment', 'recall@1 %', 'test loss', 'train loss']
  return Table(caption, [*head, 'lr', 'ρ', '√(1+n²)'], lines)


def _table_2(rows: Sequence[Row], split: str, settings: Mapping[str, Any]) -> Table:
  """Final training loss at one radius over the learning rates."""
  rates, rho = settings['sgd_rates'], table_2_rho(rows, split, settings['rhos'])
  lines = []
  for method in ('SAM', 'Monge SAM', MATCHED):
    at = {r['learning_rate']: r for r in choose(rows, split, method) if r['rho'] == rho}
    lines.append([method, *(_loss(at[rate]) for rate in rates)])
  caption = (
    f'Table 2, {split}: final training loss at ρ = {rho:g}, the smallest at which SAM'
    ' diverges at most of the learning rates at which SGD does not'
  )
  return Table(caption, ['method', *(f'lr {rate:g}' for rate in rates)], lines)


def _table_3(rows: Sequence[Row], split: str, settings: Mapping[str, Any]) -> Table:
  """Final training loss over learning rate and radius."""
  lines, counts = [], []
  for method in ('SAM', 'Monge SAM', MATCHED):
    of_method = choose(rows, split, method)
    stable = choose_stable(rows, split, method)
    failed = sum(map(has_diverged, stable))
    counts.append(f'{method} {failed} of {len(stable)}')
    for rate in settings['sgd_rates']:
      at = {row['rho']: row for row in of_method if row['learning_rate'] == rate}
      cells = [_loss(at[rho]) for rho in settings['rhos']]
      lines.append([method, f'{rate:g}', *cells])
  caption = (
    f'Table 3, {split}: final training loss; † diverged, in cells at learning rates at'
    f' which SGD does not diverge: {", ".join(counts)}'
  )
  return Table(caption, ['method', 'lr', *(f'{r:g}' for r in settings['rhos'])], lines)


def _reach(rows: Sequence[Row], split: str, settings: Mapping[str, Any]) -> Table:
  """The largest rho of the grid that does not diverge, by learning rate."""
  rates = settings['sgd_rates']
  found = [_largest(rows, split, method) for method in ('SAM', 'Monge SAM')]
  lines = [
    [method, *(_number(largest.get(rate)) for rate in rates)]
    for method, largest in zip(('SAM', 'Monge SAM'), found, strict=True)
  ]
  sam, monge = found
  both = {rate: f'{monge[rate] / sam[rate]:.1f}' for rate in sam if rate in monge}
  lines.append(['ratio', *(both.get(rate, '') for rate in rates)])
  head = ['method', *(f'lr {rate:g}' for rate in rates)]
  return Table(f'Control, {split}: the largest ρ without divergence', head, lines)


def _largest(rows: Sequence[Row], split: str, method: str) -> dict[float, float]:
  largest: dict[float, float] = {}
  for row in choose(rows, split, method):
    if not has_diverged(row):
      rate = row['learning_rate']
      largest[rate] = max(row['rho'], largest.get(rate, 0.0))
  return largest


def _best(rows: Sequence[Row], split: str) -> Table:
  """Each method at its own best, by each of the criteria, on the test concepts."""
  lines = []
  for by in CRITERIA:
    chosen = {method: best(rows, split, method, by) for method in METHODS}
    for other in ('SAM', MATCHED):
      pair = (chosen[method]['test'][by] for method in ('Monge SAM', other))
      lines.append(
        [
          {'knn': 'alignment', 'recall': 'recall@1', 'loss': 'test loss'}[by],
          _at(chosen['Monge SAM'], by),
          other,
          _at(chosen[other], by),
          paired(*pair).text(4),
        ]
      )
  caption = (
    f'Control, {split}: each method at its own best learning rate and ρ, chosen on'
    ' validation concepts by the measure that is shown'
  )
  return Table(caption, ['measure', 'Monge SAM', 'other', '', 'difference'], lines)


def _cell_by_cell(rows: Sequence[Row], split: str) -> Table:
  """Monge SAM against SAM at the same rho, and at the same mean radius."""

  def at(method):
    stable = choose_stable(rows, split, method)
    return {(row['learning_rate'], row['rho']): row for row in stable}

  monge, lines = at('Monge SAM'), []
  for method in ('SAM', MATCHED):
    pairs = [(row, at(method)[place]) for place, row in monge.items()]
    apart = sum(has_diverged(a) != has_diverged(b) for a, b in pairs)
    gaps = [abs(mean(a['test']['knn']) - mean(b['test']['knn'])) for a, b in pairs]
    lines.append([method, f'{apart} of {len(pairs)}', f'{statistics.median(gaps):.3f}'])
  caption = f'Control, {split}: Monge SAM and another method in the same cells'
  head = ['other', 'only one diverges', 'median difference in alignment']
  return Table(caption, head, lines)


def _setting(results: Mapping[str, Any]) -> str:
  s = results['settings']
  return (
    f'Two heads ({s["hidden"]} hidden, {s["width"]} out) on frozen features of emoji'
    f' and their names, batch {s["batch"]}, {s["pretrain_steps"]} steps of Adam, then'
    f' {s["steps"]} of tuning; {len(s["seeds"])} seeds, {len(results["rows"])} cells,'
    f' {results["seconds"]:.0f} s on {results["environment"]["device"]}.'
  )


def _at(row: Row, by: str) -> str:
  rate, rho = _number(row['learning_rate']), _number(row['rho'])
  return f'{_spread(row["test"][by])} (lr {rate}, ρ {rho})'


def _loss(row: Row) -> str:
  return f'{mean(row["loss"]):.2f}{"†" if has_diverged(row) else ""}'


def _spread(values: Sequence[float], scale: float = 1, digits: int = 3) -> str:
  return f'{scale * mean(values):.{digits}f} ± {scale * spread(values):.{digits}f}'


def _number(value: float | None) -> str:
  return '' if value is None else f'{value:g}'
