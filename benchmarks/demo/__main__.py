"""Adam, SAM and Monge SAM on real handwritten digits, some of them mislabelled.

Run `python -m benchmarks.demo`. A small convolutional net learns from 500 of the
digits that scikit-learn ships; a fifth of their labels are wrong, as in the noise
experiments of the SAM paper, so that a net that fits all of them generalises badly.
All methods have the same grid of radii. SAM is run once more at the mean radius that
Monge SAM has really used: is Monge SAM more than SAM with a smaller radius?
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
import time
from typing import Any

import jax

from benchmarks.common import grid
from benchmarks.common.command import make_parser
from benchmarks.common.command import publish
from benchmarks.common.environment import describe
from benchmarks.common.tables import Document
from benchmarks.common.tables import Table
from benchmarks.common.terminal import progress
from benchmarks.common.timing import milliseconds
from benchmarks.demo.figure import draw
from benchmarks.demo.training import optimizers
from benchmarks.demo.training import Settings
from benchmarks.demo.training import split_digits
from benchmarks.demo.training import start
from benchmarks.demo.training import train

RHOS = (0.05, 0.08, 0.125, 0.2, 0.32, 0.5, 0.8, 1.25, 2.0, 3.2)
SEEDS = (0, 1, 2)
TIMED = 20  # steps each time
ADAM, SAM, MONGE, MATCHED = 'Adam', grid.SAM, grid.MONGE, grid.MATCHED
HEAD = ('method', 'rho', 'radius', 'test %', 'validation', '√(1+α²n²)', 'rise', 'time')
PAIRS = ((SAM, ADAM), (MONGE, ADAM), (MONGE, SAM), (MONGE, MATCHED))
NOTE = (
  'Accuracies are mean ± standard deviation over the seeds, on correctly labelled'
  ' images. radius is the mean ‖δ‖, rise is ℓ(w+δ) − ℓ(w), n the gradient norm, α = 1;'
  ' radius, rise and √(1+α²n²) are means over all steps of training. time is the time'
  ' per step relative to Adam, the median of interleaved rounds, once per method. "SAM,'
  ' matched" is SAM with the mean radius that Monge SAM had at this rho. A star marks'
  ' the rho with the best mean validation accuracy.'
)


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
    ``rows``, one per cell with its runs and their summary, and ``best``: the rho of
    each method that has the highest mean validation accuracy.
  """
  rhos, seeds = tuple(rhos), tuple(seeds)
  txs = optimizers(settings.learning_rate)
  sizes = {name: getattr(settings, name) for name in ('train', 'validation', 'wrong')}
  splits = {seed: split_digits(seed, **sizes) for seed in seeds}
  cells = grid.cells(ADAM, (SAM, MONGE), rhos)
  with progress((len(cells) + len(rhos)) * len(seeds) + 1) as tell:

    def run(cell):
      runs = []
      tx = txs[_method(cell.method)]
      for seed in seeds:
        at = '' if cell.rho is None else f', rho {cell.rho:g}'
        tell(f'{cell.method}{at}, seed {seed}')
        runs.append(train(settings, tx, cell.given, seed, splits[seed])._asdict())
      return grid.summarize(cell, runs)

    rows = [run(cell) for cell in cells]
    rows += [run(cell) for cell in grid.matched(rows)]
    tell('timing')
    x, y = (part[: settings.batch] for part in splits[seeds[0]].train)
    loops = {name: _loop(settings, name, tx, x, y) for name, tx in txs.items()}
    times = milliseconds(loops, rounds, TIMED)
  for row in rows:
    row['time'] = times[_method(row['method'])] / times[ADAM]
  return {'rows': rows, 'best': grid.best_rhos(rows), 'step_ms': times}


def main(argv: list[str] | None = None) -> None:
  """Trains, prints the tables, and writes numbers and picture."""
  parser = make_parser('demo', __doc__)
  parser.add_argument('--quick', action='store_true', help='a few steps, to see it run')
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
  args.out.mkdir(parents=True, exist_ok=True)
  draw(results, args.out / 'demo.png')
  publish(args.out / 'demo', results, report(results))


def report(results: Mapping[str, Any]) -> Document:
  """All cells, and how the methods differ."""
  settings = results['settings']
  caption = (
    f'{settings["train"]} handwritten digits, {settings["wrong"]:.0%} of them'
    f' mislabelled, {settings["epochs"]} epochs, {len(settings["seeds"])} seeds;'
    f' {results["seconds"]:.0f} s of training.'
  )
  lines = [_cells(results, row) for row in results['rows']]
  return [caption, Table('', HEAD, lines), NOTE, *grid.differences(results, PAIRS)]


def _cells(results: Mapping[str, Any], row: grid.Row) -> list[str]:
  """One line of the table; Adam has neither rho nor rise."""
  radius, rise = '', ''
  if row['rho'] is not None:
    shrink = row['shrink']['mean'] if row['method'] == MONGE else 1.0
    radius, rise = f'{row["given"] * shrink:.3f}', f'{row["rise"]["mean"]:.3f}'
  return [
    row['method'],
    grid.star_rho(results, row),
    radius,
    grid.percent(row['test']),
    grid.percent(row['validation']),
    f'{row["factor"]["mean"]:.2f}',
    rise,
    f'{row["time"]:.2f}',
  ]


def _method(name: str) -> str:
  """The transformation of a row: matched or not, it is SAM's."""
  return SAM if name == MATCHED else name


def _loop(settings: Settings, name: str, tx, x, y) -> Callable[[], None]:
  _, step = start(settings, tx, None if name == ADAM else 0.1, seed=0)

  def loop():
    norms = [step(x, y)[0] for _ in range(TIMED)]
    jax.block_until_ready(norms)

  return loop


if __name__ == '__main__':
  main()
