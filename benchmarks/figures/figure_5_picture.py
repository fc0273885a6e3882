"""The picture of Figure 5: trajectories with marginals of their ends, and shares."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from mpl_toolkits.axes_grid1 import make_axes_locatable
import numpy as np

from benchmarks.common import style
from benchmarks.figures.valley import draw_valley
from benchmarks.figures.valley import mark_points

# A little more than the grid of starts.
EXTENT = 3.4
BINS = np.linspace(-EXTENT, EXTENT, 35)
COLUMNS = 3


def draw_ends(
  numbers: dict[str, Any], paths: dict[str, np.ndarray], title: str, file: Path
) -> None:
  """Writes a panel a method, and bars with the shares.

  Args:
    numbers: of `figure_5.measure`.
    paths: ``[starts, steps + 1, 2]`` for each method.
    title: what the picture shows.
    file: the picture.
  """
  style.use()
  fig = plt.figure(figsize=(16, 8.7), layout='constrained')
  fig.suptitle(title, fontsize=13, x=0.01, ha='left')
  left, right = fig.subfigures(1, 2, width_ratios=(3, 1))
  panels = left.subfigures(-(-len(paths) // COLUMNS), COLUMNS).flat
  for panel, row in zip(panels, numbers['rows'], strict=True):
    _draw_joint(panel, row['method'], paths[row['method']])
  _draw_shares(right.subplots(), numbers['rows'])
  fig.savefig(file)
  plt.close(fig)


def _draw_joint(panel, name, path):
  colour = style.COLOURS[name]
  ax = panel.subplots()
  draw_valley(ax, (-EXTENT, EXTENT), (-EXTENT, EXTENT))
  mark_points(ax, size=9, zorder=3)
  ax.plot(*path.transpose(2, 1, 0), color=colour, linewidth=0.6, alpha=0.55, zorder=2)
  ax.plot(
    *path[:, -1].T,
    'o',
    color=colour,
    markersize=5,
    markeredgecolor='white',
    markeredgewidth=0.6,
    zorder=5,
  )
  divider = make_axes_locatable(ax)
  top = divider.append_axes('top', '17%', pad=0.04, sharex=ax)
  side = divider.append_axes('right', '17%', pad=0.04, sharey=ax)
  w1, w2 = np.clip(path[:, -1].T, -EXTENT, EXTENT)
  top.hist(w1, BINS, color=colour)
  side.hist(w2, BINS, color=colour, orientation='horizontal')
  for marginal in (top, side):
    marginal.set_axis_off()
  top.set_ylim(0, 50)
  side.set_xlim(0, 50)
  top.set_title(name, color=colour, weight='bold', loc='left')


def _draw_shares(ax, rows):
  """Per method three bars on each other: saddle, flattest minima, elsewhere."""
  names = [row['method'] for row in rows]
  colours = [style.COLOURS[name] for name in names]
  start = np.zeros(len(rows))
  for key, label, alpha in (
    ('saddle', 'at the saddle', 1.0),
    ('flattest', 'near a flattest minimum', 0.45),
    ('elsewhere', 'elsewhere', 0.12),
  ):
    share = np.array([row[key] for row in rows])
    bars = ax.barh(names, share, left=start, color=colours, height=0.72)
    for bar, value in zip(bars, share, strict=True):
      bar.set_alpha(alpha)
      if value:
        ax.text(
          bar.get_x() + bar.get_width() / 2,
          bar.get_y() + bar.get_height() / 2,
          str(value),
          ha='center',
          va='center',
          color='white' if alpha == 1 else 'black',
          weight='bold',
        )
    ax.barh(names[:1], 0, color='black', alpha=alpha, label=label)
    start = start + share
  ax.invert_yaxis()
  ax.grid(visible=False)
  ax.spines['bottom'].set_visible(False)
  ax.spines['left'].set_visible(False)
  ax.set_xticks([])
  ax.tick_params(left=False)
  ax.legend(loc='upper center', bbox_to_anchor=(0.4, -0.01))
  ax.set_title(f'where {start[0]:g} runs end', loc='left', fontsize=11.5)
