"""Figure 6 of the paper: out of a bad global minimum, or not.

Run `python -m benchmarks.bad_minimum`. A small residual net is first driven to a bad
minimum: it fits correctly labelled pictures of clothes, all of them, and as many other
pictures with wrong labels. From there it is fine-tuned on the right ones, at a small
learning rate, with SGD, SAM and Monge SAM, and with Monge SAM whose α begins at 0, so
that it first reaches as far as SAM. Controls: SAM with the mean radius that
Monge SAM has really had, and LE-SAM, whose radius is Monge SAM's with a hard edge.

Every finished run is stored at once: after a kill the same command goes on from there.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.bad_minimum import methods
from benchmarks.bad_minimum import training
from benchmarks.bad_minimum.figure import draw
from benchmarks.bad_minimum.problem import split_fashion
from benchmarks.bad_minimum.report import report
from benchmarks.bad_minimum.report import summarize
from benchmarks.bad_minimum.settings import FULL
from benchmarks.bad_minimum.settings import QUICK
from benchmarks.bad_minimum.settings import Settings
from benchmarks.bad_minimum.settings import SMOKE
from benchmarks.common import grid
from benchmarks.common.command import make_parser
from benchmarks.common.command import publish
from benchmarks.common.environment import describe
from benchmarks.common.storage import folder_for
from benchmarks.common.storage import run_once
from benchmarks.common.terminal import progress

SETTINGS = {'quick': QUICK, 'full': FULL, 'smoke': SMOKE}


def main(argv: list[str] | None = None) -> None:
  """Runs what is missing, prints the tables, writes numbers and picture."""
  parser = make_parser('bad_minimum', __doc__)
  size = parser.add_mutually_exclusive_group()
  size.add_argument('--full', action='store_true', help='larger: hours on two cores')
  size.add_argument('--smoke', action='store_true', help='tiny: only to see it run')
  parser.add_argument(
    '--runs', type=Path, help='where finished runs are kept (OUT/bad_minimum_runs)'
  )
  args = parser.parse_args(argv)
  name = 'full' if args.full else 'smoke' if args.smoke else 'quick'
  settings = SETTINGS[name]
  told = {'environment': describe(), 'setting': name, 'settings': settings._asdict()}
  folder = runs_folder(args.runs or args.out / 'bad_minimum_runs', name, settings)
  with progress(len(settings.seeds) * (3 + 5 * len(settings.rhos))) as tell:
    results = {**told, **experiment(settings, folder, tell)}
  stem = args.out / ('bad_minimum_full' if args.full else 'bad_minimum')
  draw(results, stem.with_suffix('.png'))
  publish(stem, results, report(results))


def runs_folder(parent: Path, name: str, settings: Settings) -> Path:
  """Where runs are stored: a run does not depend on the grid of radii that it is on."""
  fixed = {key: value for key, value in settings._asdict().items() if key != 'rhos'}
  return folder_for(parent, name, fixed)


def experiment(
  settings: Settings, folder: Path, tell: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
  """Makes the starts and fine-tunes from them, as far as that is not yet stored.

  Args:
    settings: those of the experiment.
    folder: where runs are stored.
    tell: called with what is done, before each start and each run.

  Returns:
    ``starts`` and ``fresh``, one per seed: the bad start, and the same net trained in
    the same way without wrong labels; ``rows``, one per cell with its runs; and the
    ``best`` rho of each method. Starts and runs have ``seconds`` by the clock and
    ``cpu_seconds`` of all threads, compiling included.
  """
  steps = settings.epochs * (settings.train // settings.batch)
  txs = methods.optimizers(settings.learning_rate, settings.alpha, steps)
  parts = {
    seed: split_fashion(seed, train=settings.train, wrong=settings.wrong)
    for seed in settings.seeds
  }

  def make_start(seed, bad):
    name = f'{"start" if bad else "fresh"}-seed{seed}'
    tell(name)

    def compute():
      model, look = training.train_start(settings, seed, parts[seed], bad=bad)
      training.save_params(folder / f'{name}.npz', model)
      return look

    return run_once(folder / f'{name}.json', compute)

  def run(cell, seed):
    at = '' if cell.rho is None else f'-rho{cell.rho:g}'
    name = f'{cell.method}{at}-seed{seed}'.replace(', ', '-').replace(' ', '-')
    tell(name)

    def compute():
      path = folder / f'start-seed{seed}.npz'
      model = training.load_params(path, training.new_model(settings, seed))
      tx = txs[cell.method]
      return training.fine_tune(settings, tx, cell.given, seed, parts[seed], model)

    return run_once(folder / f'{name}.json', compute)

  def fill(cells):
    return [
      summarize(cell, [run(cell, seed) for seed in settings.seeds]) for cell in cells
    ]

  starts = [make_start(seed, True) for seed in settings.seeds]
  fresh = [make_start(seed, False) for seed in settings.seeds]
  two_pass = (grid.SAM, grid.MONGE, methods.LE_SAM, methods.ANNEALED)
  rows = fill(grid.cells(methods.SGD, two_pass, settings.rhos))
  rows += fill(grid.matched(rows))
  best = grid.best_rhos(rows)
  return {'starts': starts, 'fresh': fresh, 'rows': rows, 'best': best}


if __name__ == '__main__':
  main()
