"""The protocol of the paper's Tables 1 to 3 on pictures of emoji and their names.

Run `python -m benchmarks.alignment`. Two small heads on frozen features, one for the
pictures and one for the names, learn CLIP's contrastive loss: they are pretrained with
Adam on one part of the data and tuned on another with SGD, Adam, SAM and Monge SAM,
the last two on the same fine grid of radii. Then SAM is run once more at the mean
radius of Monge SAM. Hyperparameters are chosen on validation concepts, and all that is
reported of generalisation is measured on test concepts. An interrupted run is taken up
where it was.
"""

import argparse
from collections.abc import Callable
from collections.abc import Iterator
import json
from pathlib import Path
import time
from typing import Any
from typing import NamedTuple

import numpy as np
from rich.console import Console

from benchmarks.alignment import data as alignment_data
from benchmarks.alignment import embeddings as alignment_embeddings
from benchmarks.alignment import figure as alignment_figure
from benchmarks.alignment.problem import Cell
from benchmarks.alignment.problem import MATCHED
from benchmarks.alignment.problem import PRETRAINED
from benchmarks.alignment.problem import Problem
from benchmarks.alignment.report import markdown
from benchmarks.alignment.report import show
from benchmarks.alignment.select import best
from benchmarks.alignment.training import Settings
from benchmarks.common.environment import describe
from benchmarks.common.progress import progress_bar

RESULTS = Path(__file__).parents[1] / 'results'
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
  radius = row['rho'] * float(np.mean(row['shrink']))
  return Cell(row['split'], MATCHED, row['learning_rate'], row['rho'], radius)


def experiment(
  settings: Settings,
  grid: Grid,
  rows: list[dict[str, Any]],
  store: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
  """Runs every cell that ``rows`` lacks, and stores the rows after each."""
  rows = list(rows)
  done = {tuple(row[name] for name in Cell._fields[:4]) for row in rows}
  per_split = len(list(cells('', grid))) + len(grid.rhos) * len(grid.sgd_rates)
  with progress_bar() as progress:
    total = per_split * len(alignment_data.SPLITS)
    task = progress.add_task('', total=total, completed=len(rows))
    for kind in alignment_data.SPLITS:
      progress.update(task, description=f'{kind}, pretraining')
      problem = Problem(kind, settings, grid.seeds)

      def run(cell, problem=problem):
        if cell[:4] in done:
          return
        at = ', '.join(f'{value:g}' for value in cell[2:4] if value is not None)
        progress.update(task, description=f'{cell.split}, {cell.method} {at}')
        rows.append(problem.run(cell)[1])
        store(rows)
        progress.advance(task)

      for cell in cells(kind, grid):
        run(cell)
      for row in list(rows):
        if row['split'] == kind and row['method'] == 'Monge SAM':
          run(matched(row))
  return rows


def compact(results: dict[str, Any]) -> str:
  """JSON with a line for each row, and for each other entry."""
  lines = [f'{json.dumps(name)}: {json.dumps(x)}' for name, x in results.items()]
  rows = ',\n  '.join(map(json.dumps, results['rows']))
  lines[list(results).index('rows')] = f'"rows": [\n  {rows}\n ]'
  return '{\n ' + ',\n '.join(lines) + '\n}\n'


def main(argv: list[str] | None = None) -> None:
  """Trains, prints tables and findings, and writes numbers and pictures."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.alignment')
  parser.description = __doc__
  parser.add_argument('--quick', action='store_true', help='a few steps, to see it run')
  parser.add_argument('--report', action='store_true', help='from the stored numbers')
  parser.add_argument('--out', type=Path, default=RESULTS, help='where results go')
  args = parser.parse_args(argv)
  settings, grid = Settings(), Grid()
  if args.quick:
    settings = settings._replace(steps=25, pretrain_steps=25, hidden=8, width=8)
    grid = Grid((0.1, 6.4), (0.1, 0.3), (1e-3,), (0, 1))
  args.out.mkdir(parents=True, exist_ok=True)
  path, partial = args.out / 'alignment.json', args.out / 'alignment.partial.json'
  if args.report:
    results = json.loads(path.read_text())
  else:
    results = _train(settings, grid, partial)
    path.write_text(compact(results))
    partial.unlink()
  (args.out / 'alignment.md').write_text(markdown(results))
  alignment_figure.draw(results, args.out / 'alignment.png')
  _draw_embeddings(results, args.out / 'alignment_embeddings.png')
  console = Console()
  show(results, console)
  for name in ('.json', '.md', '.png', '_embeddings.png'):
    console.print(f'Written: {args.out / "alignment"}{name}', highlight=False)


def _train(settings: Settings, grid: Grid, partial: Path) -> dict[str, Any]:
  """The whole experiment; takes up what a run of the same settings has left."""
  described = {**settings._asdict(), 'alpha': 1.0, **grid._asdict()}
  described = json.loads(json.dumps(described))
  results = {'environment': describe(), 'settings': described, 'seconds': 0.0}
  rows = []
  if partial.exists():
    left = json.loads(partial.read_text())
    if left['settings'] == described:
      results['seconds'], rows = left['seconds'], left['rows']
  began = time.perf_counter() - results['seconds']

  def store(rows):
    results['rows'], results['seconds'] = rows, time.perf_counter() - began
    fresh = partial.with_suffix('.new')
    fresh.write_text(json.dumps(results))
    fresh.replace(partial)

  store(experiment(settings, grid, rows, store))
  return results


def _draw_embeddings(results: dict[str, Any], path: Path) -> None:
  """Trains the chosen cells again, for the embeddings of the first seed."""
  stored, split = results['settings'], alignment_embeddings.SPLIT
  settings = Settings(**{name: stored[name] for name in Settings._fields})
  problem = Problem(split, settings, tuple(stored['seeds']))
  panels = []
  for method in alignment_embeddings.METHODS:
    row = best(results['rows'], split, method)
    params, row = problem.run(Cell(**{name: row[name] for name in Cell._fields}))
    panels.append((method, row['test']['knn'][0], *problem.embed_test(params)))
  alignment_embeddings.draw(panels, problem.test_groups(), path)


if __name__ == '__main__':
  main()
