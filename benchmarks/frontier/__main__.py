"""Which method, and is it worth its price? Every method on two tasks, tuned alike.

Run `python -m benchmarks.frontier`. A net of two layers learns pictures of which a
fifth are mislabelled: handwritten digits, and clothes. Every method has the same
optimizer and one number to tune, on its own grid, which is extended until the best is
not at its end, and both ends are more than a point of accuracy worse. The number is
chosen on validation data. All are compared at equal steps, and at equal gradient
evaluations: there a method with one gradient a step takes twice the steps of one with
two.

Every finished part of a grid is stored at once: after a kill the same command goes on
from there.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import statistics
from typing import Any

from benchmarks.common.command import make_parser
from benchmarks.common.command import publish
from benchmarks.common.environment import describe
from benchmarks.common.storage import folder_for
from benchmarks.common.storage import run_once
from benchmarks.common.terminal import progress
from benchmarks.frontier import problems
from benchmarks.frontier import report
from benchmarks.frontier import training
from benchmarks.frontier.figure import draw
from benchmarks.frontier.methods import Entry
from benchmarks.frontier.methods import METHODS

SEEDS = tuple(range(6))
BLOCK = 4  # Values of a number that are trained at once.
BELOW, ABOVE = 1, 3  # Blocks that a grid is extended by, to each side, at most.
BUDGETS = (report.STEPS, report.EVALUATIONS)
CARRIED = ('SAM', 'Monge SAM', 'Monge SAM, rise τ')
WIDTHS = (32, 128, 512)
Tell = Callable[[str], None]


def main(argv: list[str] | None = None) -> None:
  """Runs what is missing, prints the tables, writes numbers and picture."""
  parser = make_parser('frontier', __doc__)
  parser.add_argument('--quick', action='store_true', help='a few steps, to see it run')
  parser.add_argument(
    '--runs', type=Path, help='where finished runs are kept (OUT/frontier_runs)'
  )
  args = parser.parse_args(argv)
  tasks, methods, seeds, widths = problems.TASKS, METHODS, SEEDS, WIDTHS
  if args.quick:
    tasks = {name: task._replace(steps=8, width=8) for name, task in tasks.items()}
    few = lambda entry: entry._replace(grid=entry.grid[:BLOCK], extended=False)
    methods = {name: few(METHODS[name]) for name in ('Adam', *CARRIED)}
    seeds, widths = SEEDS[:2], (8, 16)
  parts = len(tasks) * len(BUDGETS) * len(methods) + len(CARRIED) * (len(widths) - 1)
  with progress(parts) as tell:
    results = experiment(
      tasks, methods, seeds, widths, args.runs or args.out / 'frontier_runs', tell
    )
  results = {
    'environment': describe(),
    'settings': {
      'tasks': {name: _settings(task) for name, task in tasks.items()},
      'seeds': seeds,
    },
    'methods': {
      name: {'gradients': entry.gradients, 'knob': entry.knob}
      for name, entry in methods.items()
    },
    **results,
  }
  args.out.mkdir(parents=True, exist_ok=True)
  draw(results, args.out / 'frontier.png')
  publish(args.out / 'frontier', results, report.report(results))


def experiment(
  tasks: Mapping[str, problems.Task],
  methods: Mapping[str, Entry],
  seeds: Iterable[int],
  widths: Iterable[int],
  runs: Path,
  tell: Tell = lambda text: None,
) -> dict[str, Any]:
  """Tunes every method for every task and budget.

  Args:
    tasks: what is learnt.
    methods: by name.
    seeds: of each run.
    widths: of the nets to which the best number is carried over.
    runs: where finished runs are kept.
    tell: called with what is done.

  Returns:
    ``rows``, all runs; ``best``, of each task, budget and method; and ``carried``, the
    best number of some methods in other places.
  """
  seeds = tuple(seeds)
  folders = {
    name: folder_for(runs, name, {**_settings(task), 'seeds': seeds})
    for name, task in tasks.items()
  }

  def tuned(job):
    task_name, budget, name = job
    tell(f'{task_name}, {name}, {budget}')
    task, entry = tasks[task_name], methods[name]
    steps = steps_of(task, entry, budget)
    return tune(task, name, entry, seeds, steps, folders[task_name])

  # Equal steps first: of methods with two gradients they are the others as well.
  jobs = [[(t, b, name) for t in tasks for name in methods] for b in BUDGETS]
  rows: dict[str, Any] = {t: {b: {} for b in BUDGETS} for t in tasks}
  for some in jobs:
    # What is trained is small, and keeps one core busy: two at a time.
    with ThreadPoolExecutor(max_workers=2) as pool:
      for (t, b, name), found in zip(some, pool.map(tuned, some), strict=True):
        rows[t][b][name] = found
  best = {
    task: {
      budget: {name: report.summarize(of) for name, of in by_name.items()}
      for budget, by_name in budgets.items()
    }
    for task, budgets in rows.items()
  }
  carried = carry(tasks, methods, seeds, widths, runs, rows, tell)
  return {'best': best, 'carried': carried, 'rows': rows}


def steps_of(task: problems.Task, entry: Entry, budget: str) -> int:
  """As many as a method with two gradients a step, or as many gradients."""
  if budget == report.STEPS:
    return task.steps
  return round(2 * task.steps / entry.gradients)


def tune(
  task: problems.Task,
  name: str,
  entry: Entry,
  seeds: tuple[int, ...],
  steps: int,
  folder: Path,
) -> list[dict[str, Any]]:
  """Trains on the grid of a method, extended until its best is well inside.

  Returns:
    A row for each value of the number, in order: its ``knob``, and the accuracies of
    all seeds.
  """

  def run(knobs):
    label = f'{name}, {steps} steps, {knobs[0]:g} to {knobs[-1]:g}'.replace('/', '_')
    stored = run_once(
      folder / f'{label}.json',
      lambda: training.train(task, entry, knobs, seeds, steps),
    )
    return [
      {
        'knob': knob,
        **{key: stored[key][i] for key in ('validation', 'test', 'probes')},
      }
      for i, knob in enumerate(knobs)
    ]

  found = [
    row
    for i in range(0, len(entry.grid), BLOCK)
    for row in run(entry.grid[i : i + BLOCK])
  ]
  if not entry.knob or not entry.extended:
    return found
  for side in range(max(BELOW, ABOVE)):
    below, above = report.is_closed(found)
    low, high = found[0]['knob'], found[-1]['knob']
    if not below and side < BELOW:
      found = [*run(_next(low, 1 / 2)[::-1]), *found]
    if not above and side < ABOVE and high < entry.largest:
      found = [*found, *run(_next(high, 2))]
  return found


def carry(tasks, methods, seeds, widths, runs, rows, tell) -> dict[str, Any]:
  """How far the best number of a method is from that in other places.

  Returns:
    For each method and place its best ``knob``, and ``lost``: the test accuracy there
    minus that at the number that is best for digits at the width of the task.
  """
  digits = tasks['digits']
  places = {f'digits, {digits.width}': rows['digits'][report.STEPS]}
  for width in widths:
    if width == digits.width:
      continue
    task = digits._replace(width=width)
    folder = folder_for(runs, f'digits_{width}', {**_settings(task), 'seeds': seeds})
    places[f'digits, {width}'] = {}
    for name in CARRIED:
      tell(f'digits at width {width}, {name}')
      entry = methods[name]
      places[f'digits, {width}'][name] = tune(
        task, name, entry, seeds, task.steps, folder
      )
  places['fashion, 128'] = rows['fashion'][report.STEPS]
  found: dict[str, Any] = {name: {} for name in CARRIED}
  for name in CARRIED:
    at_home = None
    for place, by_name in places.items():
      chosen = report.best(by_name[name])
      at_home = chosen['knob'] if at_home is None else at_home
      same = min(by_name[name], key=lambda row: abs(row['knob'] / at_home - 1))
      lost = statistics.mean(chosen['test']) - statistics.mean(same['test'])
      found[name][place] = {'knob': chosen['knob'], 'lost': lost}
  return found


def _next(end: float, ratio: float) -> list[float]:
  """The next block of a grid beyond an end, on the numbers 1, 2, 5, 10 ….

  They are rounded so, since 2.5 and 0.2 are as good as any.
  """
  mantissas = {1: 2, 2: 5, 5: 10} if ratio > 1 else {1: 0.5, 2: 1, 5: 2}
  values = []
  for _ in range(BLOCK):
    exponent = 10.0 ** _exponent(end)
    end = float(f'{mantissas[round(end / exponent)] * exponent:.1g}')
    values.append(end)
  return values


def _exponent(x: float) -> int:
  return int(f'{x:e}'.split('e')[1])


def _settings(task: problems.Task) -> dict[str, Any]:
  return {
    key: value.__name__ if callable(value) else value
    for key, value in task._asdict().items()
  }


if __name__ == '__main__':
  main()
