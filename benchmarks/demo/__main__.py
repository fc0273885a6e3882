"""Adam, SAM and Monge SAM on real handwritten digits, some of them mislabelled.

Run `python -m benchmarks.demo`. A small convolutional net learns from 500 of the
digits that scikit-learn ships; a fifth of their labels are wrong, as in the noise
experiments of the SAM paper, so that a net that fits all of them generalises badly.
All methods have the same grid of radii. SAM is run once more at the mean radius that
Monge SAM has really used: is Monge SAM more than SAM with a smaller radius?
"""

import argparse
from collections.abc import Iterable
from collections.abc import Iterator
import json
from pathlib import Path
import statistics
import time
from typing import Any
from typing import NamedTuple

from rich.console import Console

from benchmarks.common.environment import describe
from benchmarks.common.progress import progress_bar
from benchmarks.common.tables import markdown
from benchmarks.common.tables import show
from benchmarks.demo.data import split_digits
from benchmarks.demo.figure import draw
from benchmarks.demo.report import findings
from benchmarks.demo.report import report
from benchmarks.demo.training import optimizers
from benchmarks.demo.training import Settings
from benchmarks.demo.training import start
from benchmarks.demo.training import train

RESULTS = Path(__file__).parents[1] / 'results'
RHOS = (0.05, 0.08, 0.125, 0.2, 0.32, 0.5, 0.8, 1.25, 2.0, 3.2)
SEEDS = (0, 1, 2)
MATCHED = 'SAM, matched'


class Cell(NamedTuple):
  """One line of the table.

  Attributes:
    method: a key of ``optimizers``, or ``MATCHED``.
    rho: its place on the grid; None for Adam.
    radius: the ``rho`` given to the method; differs from ``rho`` where matched.
  """

  method: str
  rho: float | None
  radius: float | None


def experiment(
  settings: Settings, rhos: Iterable[float], seeds: Iterable[int], rounds: int
) -> dict[str, Any]:
  """Trains every method at every radius, with a progress bar, and times their steps.

  Args:
    settings: those of the training.
    rhos: the grid of radii.
    seeds: each sets split, wrong labels, initial weights and order of the batches.
    rounds: how many times the methods are timed, in turns.

  Returns:
    ``rows``, one a cell with its runs and their summary, and ``best``: the rho of each
    method that has the highest mean validation accuracy.
  """
  rhos, seeds = tuple(rhos), tuple(seeds)
  txs = optimizers(settings.learning_rate)
  splits = {
    seed: split_digits(
      seed,
      train=settings.train,
      validation=settings.validation,
      wrong=settings.wrong,
    )
    for seed in seeds
  }
  cells = [Cell('Adam', None, None)]
  cells += [Cell(method, rho, rho) for method in ('SAM', 'Monge SAM') for rho in rhos]
  rows = []
  with progress_bar() as progress:
    task = progress.add_task('', total=(len(cells) + len(rhos)) * len(seeds))

    def run(cell):
      runs = []
      tx = txs['SAM' if cell.method == MATCHED else cell.method]
      for seed in seeds:
        at = '' if cell.rho is None else f', rho {cell.rho:g}'
        progress.update(task, description=f'{cell.method}{at}, seed {seed}')
        runs.append(train(settings, tx, cell.radius, seed, splits[seed]))
        progress.advance(task)
      return _row(cell, runs)

    rows += map(run, cells)
    rows += map(run, list(_matched(rows)))
    progress.update(task, description='timing')
    milliseconds = _time_in_turns(settings, txs, splits[seeds[0]], rounds)
  for row in rows:
    method = 'SAM' if row['method'] == MATCHED else row['method']
    row['time'] = milliseconds[method] / milliseconds['Adam']
  return {'rows': rows, 'best': _best(rows), 'step_ms': milliseconds}


def main(argv: list[str] | None = None) -> None:
  """Trains, prints the table and what it shows, and writes numbers and picture."""
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks.demo', description=__doc__
  )
  parser.add_argument('--quick', action='store_true', help='a few steps, to see it run')
  parser.add_argument('--out', type=Path, default=RESULTS, help='where results go')
  args = parser.parse_args(argv)
  settings, rhos, seeds, rounds = Settings(), RHOS, SEEDS, 15
  if args.quick:
    settings = settings._replace(train=100, validation=50, epochs=2, width=4)
    rhos, seeds, rounds = (0.1, 1.0), (0, 1), 1
  began = time.perf_counter()
  results = experiment(settings, rhos, seeds, rounds)
  results = {
    'environment': describe(),
    'settings': {**settings._asdict(), 'alpha': 1.0, 'rhos': rhos, 'seeds': seeds},
    'seconds': time.perf_counter() - began,
    **results,
  }
  results['findings'] = findings(results)
  args.out.mkdir(parents=True, exist_ok=True)
  (args.out / 'demo.json').write_text(json.dumps(results, indent=2) + '\n')
  (args.out / 'demo.md').write_text(markdown(report(results)))
  draw(results, args.out / 'demo.png')
  console = Console()
  show(report(results), console)
  console.print(f'Training took {results["seconds"]:.0f} s', highlight=False)
  for name in ('demo.png', 'demo.md', 'demo.json'):
    console.print(f'Written: {args.out / name}', highlight=False)


def _row(cell: Cell, runs: list[Any]) -> dict[str, Any]:
  """A cell with its runs, and mean and standard deviation over the seeds."""
  row: dict[str, Any] = cell._asdict()
  for name in runs[0]._fields:
    values = [getattr(run, name) for run in runs]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    row[name] = {'mean': statistics.mean(values), 'sd': spread, 'runs': values}
  return row


def _matched(rows: list[dict[str, Any]]) -> Iterator[Cell]:
  """SAM with the mean radius that Monge SAM has had at each rho."""
  for row in rows:
    if row['method'] == 'Monge SAM':
      yield Cell(MATCHED, row['rho'], row['rho'] * row['shrink']['mean'])


def _best(rows: list[dict[str, Any]]) -> dict[str, float | None]:
  """The rho of each method with the highest mean accuracy on the validation images."""
  best: dict[str, dict[str, Any]] = {}
  for row in rows:
    leader = best.setdefault(row['method'], row)
    if row['validation']['mean'] > leader['validation']['mean']:
      best[row['method']] = row
  return {method: row['rho'] for method, row in best.items()}


def _time_in_turns(settings, txs, split, rounds, steps=20):
  """Median milliseconds a step; in turns, so that a slow moment hits all methods."""
  x, y = (part[: settings.batch] for part in split.train)
  loops = {}
  for method, tx in txs.items():
    _, loops[method] = start(settings, tx, None if method == 'Adam' else 0.1, seed=0)
  seconds: dict[str, list[float]] = {method: [] for method in loops}
  for _ in range(rounds):
    for method, step in loops.items():
      begin = time.perf_counter()
      for _ in range(steps):
        norm, _ = step(x, y)
      norm.block_until_ready()
      seconds[method].append((time.perf_counter() - begin) / steps)
  return {method: 1000 * statistics.median(times) for method, times in seconds.items()}


if __name__ == '__main__':
  main()
