"""The ground on which Figures 1, 4 and 5 draw: `(1 − w₁w₂)²` and its special points."""

import numpy as np

from benchmarks.figures.landscapes import FLATTEST
from benchmarks.figures.landscapes import SADDLE

LEVELS = (0.01, 0.1, 0.5, 1, 2, 4, 8, 16, 32, 64)


def draw_valley(ax, x_range, y_range) -> None:
  """Draws contours of the loss."""
  x, y = np.meshgrid(np.linspace(*x_range, 301), np.linspace(*y_range, 301))
  loss = (1 - x * y) ** 2
  shade = np.log10(loss + 0.03)
  ax.contourf(x, y, shade, levels=24, cmap='Greys', vmin=-1.6, vmax=7, zorder=0)
  ax.contour(x, y, loss, LEVELS, colors='#8d99a6', linewidths=0.6, zorder=1)
  ax.set_xlim(x_range)
  ax.set_ylim(y_range)
  ax.set_aspect('equal')
  ax.grid(visible=False)
  ax.set_xlabel('w₁')
  ax.set_ylabel('w₂')


def mark_points(ax, size: float = 11, zorder: float = 6) -> None:
  """Marks the saddle with a cross and the flattest minima with stars."""
  look = {'color': 'black', 'linestyle': 'none', 'zorder': zorder}
  ax.plot(*SADDLE, marker='x', markersize=0.8 * size, markeredgewidth=2, **look)
  ax.plot(*FLATTEST.T, marker='*', markersize=1.3 * size, **look)
