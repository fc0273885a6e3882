"""The paper's Figures 1 to 5: numbers and pictures, seconds each.

Run `python -m benchmarks.figures` for all of them or `python -m benchmarks.figures 1 4`
for some. Each has its own module, which says what the paper sets and what it
leaves open. Everything is computed in float64.
"""

from pathlib import Path
import time

import jax

from benchmarks.common.command import make_parser
from benchmarks.common.command import publish
from benchmarks.common.environment import describe
from benchmarks.figures import figure_1
from benchmarks.figures import figure_2
from benchmarks.figures import figure_3
from benchmarks.figures import figure_4
from benchmarks.figures import figure_5

FIGURES = {1: figure_1, 2: figure_2, 3: figure_3, 4: figure_4, 5: figure_5}


def main(argv: list[str] | None = None) -> None:
  """Measures, draws and prints the figures asked for."""
  parser = make_parser('figures', __doc__)
  parser.add_argument(
    'figures', nargs='*', type=int, metavar='N', help='1 to 5; all by default'
  )
  parser.add_argument('--quick', action='store_true', help='coarse, to see it run')
  args = parser.parse_args(argv)
  if unknown := set(args.figures) - set(FIGURES):
    parser.error(f'the figures are 1 to 5, got {sorted(unknown)}')
  jax.config.update('jax_enable_x64', True)
  args.out.mkdir(parents=True, exist_ok=True)
  for number in args.figures or FIGURES:
    make(number, args.out, quick=args.quick)


def make(number: int, out: Path, *, quick: bool = False) -> None:
  """Measures one figure, prints its table, and writes picture, numbers and table.

  Args:
    number: 1 to 5.
    out: the folder.
    quick: coarse grids, to see it run.
  """
  figure = FIGURES[number]
  began = time.perf_counter()
  numbers, curves = figure.measure(quick=quick)
  stem = out / f'figure_{number}'
  figure.draw(numbers, curves, stem.with_suffix('.png'))
  results = {
    'environment': describe(),
    'about': figure.__doc__,
    **numbers,
    'seconds': time.perf_counter() - began,
  }
  publish(stem, results, [figure.table(numbers)._replace(title=f'Figure {number}')])


if __name__ == '__main__':
  main()
