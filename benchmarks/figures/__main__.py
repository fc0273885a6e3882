"""The paper's Figures 1 to 5: numbers and pictures, seconds each.

Run `python -m benchmarks.figures` for all of them or `python -m benchmarks.figures 1 4`
for some. Each has a module of its own, which says what the paper sets and what it
leaves open. Everything is computed in float64.
"""

import argparse
import json
from pathlib import Path
import time
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from benchmarks.common.environment import describe
from benchmarks.figures import figure_1
from benchmarks.figures import figure_2
from benchmarks.figures import figure_3
from benchmarks.figures import figure_4
from benchmarks.figures import figure_5

RESULTS = Path(__file__).parents[1] / 'results'
FIGURES = {1: figure_1, 2: figure_2, 3: figure_3, 4: figure_4, 5: figure_5}


def main(argv: list[str] | None = None) -> None:
  """Measures, draws and prints the figures asked for."""
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks.figures', description=__doc__
  )
  parser.add_argument(
    'figures', nargs='*', type=int, metavar='N', help='1 to 5; all by default'
  )
  parser.add_argument('--quick', action='store_true', help='coarse, to see it run')
  parser.add_argument('--out', type=Path, default=RESULTS, help='where results go')
  args = parser.parse_args(argv)
  if unknown := set(args.figures) - set(FIGURES):
    parser.error(f'the figures are 1 to 5, got {sorted(unknown)}')
  jax.config.update('jax_enable_x64', True)
  args.out.mkdir(parents=True, exist_ok=True)
  console = Console()
  for number in args.figures or FIGURES:
    results = make(number, args.out, quick=args.quick)
    _show(number, results, console)
    for suffix in ('png', 'json'):
      console.print(f'Written: {args.out / f"figure_{number}.{suffix}"}')


def make(number: int, out: Path, *, quick: bool = False) -> dict[str, Any]:
  """Measures one figure and writes its picture and numbers.

  Args:
    number: 1 to 5.
    out: the folder.
    quick: coarse grids, to see it run.

  Returns:
    What is written as JSON.
  """
  figure = FIGURES[number]
  began = time.perf_counter()
  numbers, curves = figure.measure(quick=quick)
  results = {
    'environment': describe(),
    'about': figure.__doc__,
    'findings': figure.findings(numbers),
    **numbers,
  }
  figure.draw(numbers, curves, out / f'figure_{number}.png')
  results['seconds'] = time.perf_counter() - began
  (out / f'figure_{number}.json').write_text(json.dumps(results, indent=2) + '\n')
  return results


def _show(number, results, console):
  columns, rows = FIGURES[number].table(results)
  table = Table(title=f'Figure {number}', title_justify='left', title_style='bold')
  for column in columns:
    table.add_column(column)
  for row in rows:
    table.add_row(*row)
  console.print(table)
  for finding in results['findings']:
    console.print(f'{finding}.', highlight=False)


if __name__ == '__main__':
  main()
