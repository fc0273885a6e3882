"""The paper's three tables from the results of `benchmarks.alignment`."""

from collections.abc import Mapping
from collections.abc import Sequence
import statistics
from typing import Any
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.alignment.findings import findings
from benchmarks.alignment.problem import MATCHED
from benchmarks.alignment.problem import PRETRAINED
from benchmarks.alignment.select import best
from benchmarks.alignment.select import choose
from benchmarks.alignment.select import choose_stable
from benchmarks.alignment.select import CRITERIA
from benchmarks.alignment.select import has_diverged
from benchmarks.alignment.select import mean
from benchmarks.alignment.select import paired
from benchmarks.alignment.select import Row
from benchmarks.alignment.select import table_2_rho

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
  ' has had at this learning rate and ρ. A run has diverged if its training loss ends'
  ' above .85 ln 128 = 4.12 or is not finite, a cell (†) if most of its seeds have, and'
  ' then it is not chosen.'
)


class Table(NamedTuple):
  """A table to be printed or written: its caption, head and rows of strings."""

  caption: str
  head: Sequence[str]
  rows: Sequence[Sequence[str]]


def tables(results: Mapping[str, Any]) -> list[Table]:
  """Tables 1 to 3 of the paper, and what the other criteria choose, by split."""
  rows, settings = results['rows'], results['settings']
  made = []
  for split, what in SPLITS.items():
    made += [
      _table_1(rows, split, what),
      _table_2(rows, split, settings),
      _table_3(rows, split, settings),
      _table_4(rows, split),
    ]
  return made


def markdown(results: Mapping[str, Any]) -> str:
  """Everything, for reading on the web."""
  lines = ['# Cross-modal alignment: the paper’s Tables 1 to 3', '']
  lines += [_setting(results), '', ' '.join(findings(results)), '', NOTE, '']
  for table in tables(results):
    lines += [f'**{table.caption}**', '', _line(table.head)]
    lines += [_line([':--'] + ['--:'] * (len(table.head) - 1))]
    lines += [*map(_line, table.rows), '']
  lines += ['![Loss and alignment](alignment.png)', '']
  lines += ['![Embeddings](alignment_embeddings.png)', '']
  return '\n'.join(lines)


def show(results: Mapping[str, Any], console: Console) -> None:
  """Prints the same."""
  console.print(_setting(results), highlight=False, markup=False)
  for table in tables(results):
    console.print(f'\n{table.caption}', highlight=False, markup=False)
    printed = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in table.head:
      align = 'left' if column == table.head[0] else 'right'
      printed.add_column(column, justify=align, no_wrap=True)
    for row in table.rows:
      printed.add_row(*row)
    console.print(printed)
  console.print(NOTE, highlight=False, markup=False)
  for sentence in findings(results):
    console.print(f'• {sentence}', highlight=False, markup=False)


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


def _table_4(rows: Sequence[Row], split: str) -> Table:
  """Each method at its own best, by each of the criteria, on the test concepts."""
  lines = []
  for by in CRITERIA:
    chosen = {method: best(rows, split, method, by) for method in METHODS}
    for other in ('SAM', MATCHED):
      gap, error = paired(chosen['Monge SAM'], chosen[other], by)
      lines.append(
        [
          {'knn': 'alignment', 'recall': 'recall@1', 'loss': 'test loss'}[by],
          _at(chosen['Monge SAM'], by),
          other,
          _at(chosen[other], by),
          f'{gap:+.4f} ± {error:.4f}',
        ]
      )
  caption = (
    f'Control, {split}: each method at its own best learning rate and ρ, chosen on'
    ' validation concepts by the measure that is shown (difference ± standard error,'
    ' paired by seed)'
  )
  return Table(caption, ['measure', 'Monge SAM', 'other', '', 'difference'], lines)


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
  sd = statistics.stdev(values) if len(values) > 1 else 0.0
  return f'{scale * mean(values):.{digits}f} ± {scale * sd:.{digits}f}'


def _number(value: float | None) -> str:
  return '' if value is None else f'{value:g}'


def _line(cells: Sequence[str]) -> str:
  return f'| {" | ".join(cells)} |'
