"""What the runs come to: the best of each method, its useful range, the tables."""

from collections.abc import Mapping
from collections.abc import Sequence
import itertools
import math
import statistics
from typing import Any

import numpy as np

from benchmarks.common import grid
from benchmarks.common.tables import Document
from benchmarks.common.tables import Table

STEPS, EVALUATIONS = 'equal steps', 'equal gradients'
POINT = 0.01  # A method is in its useful range within a point of its best.
HEAD = (
  'method',
  'gradients',
  'tuned',
  'best',
  'range',
  'validation',
  'test %',
  '− Adam',
  '− SAM',
)
NOTE = (
  'gradients: per step, as a multiple of the gradient of a batch. best: the number with'
  ' the best mean validation accuracy, on a grid that goes on until the best is not at'
  ' its end. range: the factor over which the mean validation accuracy stays within one'
  ' point of its best; > where it does so up to the end of the grid. test: mean ±'
  ' standard deviation over the seeds. Differences are in points, paired by seed, ±'
  ' their standard error; a star marks those above two standard errors.'
)


def best(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
  """The row with the best mean validation accuracy."""
  return max(rows, key=lambda row: statistics.mean(row['validation']))


def is_closed(rows: Sequence[Mapping[str, Any]]) -> tuple[bool, bool]:
  """Whether the accuracy has fallen by a point below, and above, the best."""
  means = [statistics.mean(row['validation']) for row in rows]
  top = means.index(max(means))
  fallen = [mean < max(means) - POINT for mean in means]
  return any(fallen[:top]), any(fallen[top + 1 :])


def useful_range(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
  """The interval around the best in which it is within a point, by interpolation.

  Args:
    rows: with their ``knob``, in order, and ``validation`` accuracies.

  Returns:
    Its ends: 0 or infinity where the accuracy has not fallen by a point.
  """
  knobs = np.log([row['knob'] for row in rows])
  means = np.array([statistics.mean(row['validation']) for row in rows])
  level, top = means.max() - POINT, int(means.argmax())

  def end(indices, outside):
    for inner, outer in itertools.pairwise(indices):
      if means[outer] < level:
        share = (means[inner] - level) / (means[inner] - means[outer])
        return math.exp(knobs[inner] + share * (knobs[outer] - knobs[inner]))
    return outside

  return (
    end(range(top, -1, -1), 0.0),
    end(range(top, len(rows)), math.inf),
  )


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """The best row of a method, and its useful range."""
  chosen = best(rows)
  low, high = useful_range(rows) if chosen['knob'] else (0.0, 0.0)
  inside = max(low, rows[0]['knob']), min(high, rows[-1]['knob'])
  return {
    'knob': chosen['knob'],
    'validation': grid.summary(chosen['validation']),
    'test': grid.summary(chosen['test']),
    'probes': statistics.mean(chosen['probes']),
    'range': inside,
    'open': [low == 0.0, math.isinf(high)],
  }


def factor(summary: Mapping[str, Any]) -> float:
  """Over how large a factor a method is in its useful range, at least."""
  low, high = summary['range']
  return high / low if low else 1.0


def report(results: Mapping[str, Any]) -> Document:
  """A table for each task and budget, and one of what carries over."""
  settings = results['settings']
  document: list[Any] = [
    'A net of two layers learns pictures, a fifth of them mislabelled;'
    f' {len(settings["seeds"])} seeds, each with its own splits and wrong labels.'
  ]
  for task, budgets in results['best'].items():
    for budget, summaries in budgets.items():
      lines = [
        _line(results, name, summary, summaries) for name, summary in summaries.items()
      ]
      document.append(Table(f'{task}, {budget}', HEAD, lines))
  return [*document, NOTE, _carried(results)]


def _line(results, name, summary, summaries):
  entry = results['methods'][name]
  tuned = entry['knob']
  low_open, high_open = summary['open']
  more = '> ' if low_open or high_open else ''
  pairs = [
    '' if name == other else _difference(summary, summaries[other])
    for other in ('Adam', 'SAM')
  ]
  return [
    name,
    f'{entry["gradients"]:g}',
    tuned,
    f'{summary["knob"]:g}' if tuned else '',
    f'{more}{factor(summary):.1f}' if tuned else '',
    grid.percent(summary['validation']),
    grid.percent(summary['test']),
    *pairs,
  ]


def _difference(a, b):
  return grid.paired(a['test']['runs'], b['test']['runs'], scale=100).text()


def _carried(results: Mapping[str, Any]) -> Table:
  """The best number of some methods from task to task and from width to width."""
  carried = results['carried']
  places = list(next(iter(carried.values())))
  lines = []
  for name, found in carried.items():
    bests = [found[place]['knob'] for place in places]
    lost = [f'{100 * found[place]["lost"]:.1f}' for place in places]
    lines.append(
      [
        name,
        *(f'{b:g} (−{loss})' for b, loss in zip(bests, lost, strict=True)),
        f'{max(bests) / min(bests):.1f}',
      ]
    )
  head = ('method', *places, 'largest/smallest')
  title = (
    'The best number, and in brackets how many points of test accuracy are lost by the'
    ' one that is best for digits at width 128'
  )
  return Table(title, head, lines)
