"""The protocol of the paper's Tables 1 to 3 on pictures of emoji and their names.

Run `python -m benchmarks.alignment`. Two small heads on frozen features, one for the
pictures and one for the names, learn CLIP's contrastive loss: they are pretrained with
Adam on one part of the data and tuned on another with SGD, Adam, SAM and Monge SAM,
the last two on the same fine grid of radii. Then SAM is run once more at the mean
radius of Monge SAM. Hyperparameters are chosen on validation concepts, and all that is
reported of generalisation is measured on test concepts. After a kill the same command
goes on from there.
"""

from collections.abc import Iterator
import functools
import json
from pathlib import Path
from typing import Any
from typing import NamedTuple

from benchmarks.alignment import data as alignment_data
from benchmarks.alignment import embeddings
from benchmarks.alignment.figure import draw
from benchmarks.alignment.problem import best
from benchmarks.alignment.problem import Cell
from benchmarks.alignment.problem import PRETRAINED
from benchmarks.alignment.problem import Problem
from benchmarks.alignment.report import report
from benchmarks.alignment.training import Settings
from benchmarks.common import grid as grids
from benchmarks.common.command import make_parser
from benchmarks.common.command import publish
from benchmarks.common.environment import describe
from benchmarks.common.storage import CLOCKS
from benchmarks.common.storage import folder_for
from benchmarks.common.storage import run_once
from benchmarks.common.terminal import progress

# A factor of √2, and of ∜2 where methods are at their best and begin to diverge.
# No method is best aligned at an end of its grid; at the largest rate SGD diverges.
RHOS = (0.1, 0.2, 0.28, 0.4, 0.56, 0.8, 0.95, 1.1)
RHOS += (1.35, 1.6, 1.9, 2.2, 2.7, 3.2, 4.5)
SGD_RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
ADAM_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
SEEDS = (0, 1, 2, 3, 4)


class Grid(NamedTuple):
  """What is run.

  Attributes:
    rhos: radii of SAM and of Monge SAM.
    sgd_rates: learning rates of SGD, SAM and Monge SAM.
    adam_rates: those of Adam.
    seeds: each sets division, initial weights and batches, the same for all methods.
  """

  rhos: tuple[float, ...] = RHOS
  sgd_rates: tuple[float, ...] = SGD_RATES
  adam_rates: tuple[float, ...] = ADAM_RATES
  seeds: tuple[int, ...] = SEEDS


def cells(kind: str, grid: Grid) -> Iterator[Cell]:
  """All cells of a split but those of the matched radius, which need the others."""
  yield Cell(kind, PRETRAINED)
  for rate in grid.sgd_rates:
    yield Cell(kind, 'SGD', rate)
  for rate in grid.adam_rates:
    yield Cell(kind, 'Adam', rate)
  for method in ('SAM', 'Monge SAM'):
    for rate in grid.sgd_rates:
      for rho in grid.rhos:
        yield Cell(kind, method, rate, rho, rho)


def matched(row: dict[str, Any]) -> Cell:
  """SAM with the mean radius, over steps and seeds, that Monge SAM had in this row."""
  radius = grids.matched_radius(row['rho'], row['shrink'])
  return Cell(row['split'], grids.MATCHED, row['learning_rate'], row['rho'], radius)


def experiment(settings: Settings, grid: Grid, folder: Path) -> list[dict[str, Any]]:
  """The rows of all cells; those that the folder lacks are run."""
  problem = functools.cache(lambda kind: Problem(kind, settings, grid.seeds))
  per_split = len(list(cells('', grid))) + len(grid.rhos) * len(grid.sgd_rates)
  rows = []
  with progress(per_split * len(alignment_data.SPLITS)) as tell:

    def run(cell):
      at = [f'{value:g}' for value in cell[2:4] if value is not None]
      tell(f'{cell.split}, {cell.method} {", ".join(at)}')
      path = folder / f'{"-".join([*cell[:2], *at]).replace(" ", "-")}.json'
      rows.append(run_once(path, lambda: problem(cell.split).run(cell)[1]))
      return rows[-1]

    for kind in alignment_data.SPLITS:
      done = [run(cell) for cell in cells(kind, grid)]
      for row in done:
        if row['method'] == grids.MONGE:
          run(matched(row))
  return rows


def main(argv: list[str] | None = None) -> None:
  """Runs what is missing, prints the tables, and writes numbers and pictures."""
  parser = make_parser('alignment', __doc__)
  parser.add_argument('--quick', action='store_true', help='a few steps, to see it run')
  parser.add_argument('--report', action='store_true', help='from the stored numbers')
  args = parser.parse_args(argv)
  settings, grid = Settings(), Grid()
  if args.quick:
    settings = settings._replace(steps=25, pretrain_steps=25, hidden=8, width=8)
    grid = Grid((0.1, 6.4), (0.1, 0.3), (1e-3,), (0, 1))
  stem = args.out / 'alignment'
  if args.report:
    results = json.loads(stem.with_suffix('.json').read_text())
  else:
    results = _train(settings, grid, args.out / 'alignment_runs')
  draw(results, stem.with_suffix('.png'))
  _draw_embeddings(results, args.out / 'alignment_embeddings.png')
  publish(stem, results, report(results))


def _train(settings: Settings, grid: Grid, runs: Path) -> dict[str, Any]:
  """The whole experiment; goes on from what a run of the same settings has left."""
  told = {**settings._asdict(), 'alpha': 1.0, 'seeds': grid.seeds}
  rows = experiment(settings, grid, folder_for(runs, 'alignment', told))
  clocks = [[row.pop(clock) for clock in CLOCKS] for row in rows]
  return {
    'environment': describe(),
    'settings': {**told, **grid._asdict()},
    'seconds': sum(wall for wall, _ in clocks),
    'rows': rows,
  }


def _draw_embeddings(results: dict[str, Any], path: Path) -> None:
  """Trains the chosen cells again, for the embeddings of the first seed."""
  stored, split = results['settings'], embeddings.SPLIT
  settings = Settings(**{name: stored[name] for name in Settings._fields})
  problem = Problem(split, settings, tuple(stored['seeds']))
  panels = []
  for method in embeddings.METHODS:
    row = best(results['rows'], split, method)
    params, row = problem.run(Cell(**{name: row[name] for name in Cell._fields}))
    panels.append((method, row['test']['knn'][0], *problem.embed_test(params)))
  embeddings.draw(panels, problem.test_groups(), path)


if __name__ == '__main__':
  main()
