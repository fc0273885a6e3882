"""Figure 1: one start, three ends, on `(1 − w₁w₂)²`.

Setting of the paper: start (−3/2, 1/2), ρ = 1, learning rate 0.01, 200 steps of plain
gradient descent as the base. Nothing is left open; α = 1. `place` says where a run has
ended, by the radii in `landscapes`.
"""

from pathlib import Path
from typing import Any

import matplotlib.patheffects as patheffects
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.common import style
from benchmarks.common.tables import Table
from benchmarks.figures import landscapes

SETTINGS = {'start': (-1.5, 0.5), 'rho': 1.0, 'alpha': 1.0, 'lr': 0.01, 'steps': 200}
SHOWN = ('GD', 'SAM', 'Monge SAM')


def measure(*, quick: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
  """Where each method ends, and the paths for the picture."""
  del quick  # three runs
  starts = np.array([SETTINGS['start']])
  lr, steps = SETTINGS['lr'], SETTINGS['steps']
  paths = {
    name: landscapes.trajectories(
      landscapes.valley,
      landscapes.METHODS[name](SETTINGS['rho']),
      starts,
      lr=lr,
      steps=steps,
    )[0]
    for name in SHOWN
  }
  ends = {name: _describe(path[-1]) for name, path in paths.items()}
  return {'settings': SETTINGS, 'ends': ends}, paths


def table(numbers: dict[str, Any]) -> Table:
  """What is printed."""
  columns = ['method', 'end', 'loss', 'Hessian’s trace', 'to saddle', 'to (±1, ±1)', '']
  rows = [
    [
      name,
      f'({e["point"][0]:.3f}, {e["point"][1]:.3f})',
      f'{e["loss"]:.4f}',
      f'{e["trace"]:.2f}',
      f'{e["from_saddle"]:.3f}',
      f'{e["from_flattest"]:.3f}',
      e['place'],
    ]
    for name, e in numbers['ends'].items()
  ]
  return Table('', columns, rows)


def draw(numbers: dict[str, Any], paths: dict[str, Any], file: Path) -> None:
  """Writes the three trajectories over the loss."""
  style.use()
  fig, ax = plt.subplots(figsize=(9, 7), layout='constrained')
  landscapes.draw_valley(ax, (-2.3, 0.9), (-1.75, 0.75))
  landscapes.mark_points(ax)
  outline = [patheffects.withStroke(linewidth=4, foreground='white')]
  for name, path in paths.items():
    colour = style.COLOURS[name]
    ax.plot(*path.T, color=colour, linewidth=2.4, path_effects=outline, zorder=3)
    ax.plot(*path[::10].T, 'o', color=colour, markersize=3.6, zorder=3)
    ax.plot(
      *path[-1],
      'o',
      color=colour,
      markersize=11,
      markeredgecolor='white',
      markeredgewidth=1.5,
      zorder=5,
      label=name,
    )
  ax.plot(*SETTINGS['start'], 'o', color='white', markeredgecolor='black', zorder=6)
  for text, (x, y), shift in (
    ('start', SETTINGS['start'], (0, 9)),
    ('saddle', landscapes.SADDLE, (10, 8)),
    ('flattest minimum', landscapes.FLATTEST[1], (10, -16)),
  ):
    ax.annotate(text, (x, y), shift, textcoords='offset points', zorder=7).set(
      path_effects=[patheffects.withStroke(linewidth=3, foreground='white')]
    )
  ax.legend(loc='lower right', frameon=True, framealpha=0.95, edgecolor='none')
  ax.set_title('Three methods from one start', loc='left', fontsize=11.5)
  fig.savefig(file)
  plt.close(fig)


def _describe(end):
  from_saddle, from_flattest = landscapes.distances(end)
  return {
    'point': end.tolist(),
    'loss': float(landscapes.valley(end)),
    'trace': float(2 * np.sum(end**2)),
    'from_saddle': float(from_saddle),
    'from_flattest': float(from_flattest),
    'place': landscapes.place(end),
  }
