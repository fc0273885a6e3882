"""The picture of Figure 2: the maximum from above, and the shares that stay."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.common import style

EXTENT = 5.4
LEAVES = '#495057'


def draw_maxima(
  numbers: dict[str, Any],
  paths: dict[tuple[str, float], np.ndarray],
  closed_form: tuple[np.ndarray, dict[str, np.ndarray]],
  titles: tuple[list[str], str],
  file: Path,
) -> None:
  """Writes a row a ρ and a column a method, and the sweep beside them.

  Args:
    numbers: of `figure_2.measure`.
    paths: ``[samples, steps + 1, 2]`` for each method and ρ.
    closed_form: a grid of ρ, and the share on it for each method.
    titles: one a ρ, and that of the sweep.
    file: the picture.
  """
  style.use()
  fig = plt.figure(figsize=(13.6, 7.6), layout='constrained')
  left, right = fig.subfigures(1, 2, width_ratios=(1.62, 1))
  bands = left.subfigures(len(titles[0]), 1)
  for band, title, rho in zip(
    bands, titles[0], numbers['settings']['rhos'], strict=True
  ):
    band.suptitle(title, x=0.02, ha='left', fontsize=11.5)
    rows = [row for row in numbers['rows'] if row['rho'] == rho]
    for ax, row in zip(band.subplots(1, len(rows)), rows, strict=True):
      _draw_from_above(ax, numbers['settings'], row, paths[row['method'], rho])
  ax = right.subplots()
  _draw_sweep(ax, numbers, closed_form)
  ax.set_title(titles[1], loc='left', fontsize=11.5)
  fig.savefig(file)
  plt.close(fig)


def _draw_from_above(ax, settings, row, path):
  axis = np.linspace(-EXTENT, EXTENT, 241)
  r = np.hypot(*np.meshgrid(axis, axis))
  ax.contourf(
    axis, axis, 5 * np.sinc(r / np.pi), 24, cmap='Greys_r', vmin=-8, vmax=5, zorder=0
  )
  colour = style.COLOURS[row['method']]
  stay = np.linalg.norm(path[:, -1], axis=-1) < settings['stays']
  ax.plot(*path[~stay].T, color=LEAVES, linewidth=0.5, alpha=0.55, zorder=2)
  ax.plot(*path[stay].T, color=colour, linewidth=0.9, alpha=0.9, zorder=3)
  ax.plot(*path[~stay, -1].T, 'o', color=LEAVES, markersize=2.2, zorder=3)
  ax.plot(*path[stay, 0].T, 'o', color=colour, markersize=2.6, zorder=4)
  ax.add_patch(plt.Circle((0, 0), row['basin'], fill=False, color=colour, zorder=5))
  ax.add_patch(
    plt.Circle(
      (0, 0), settings['region'], fill=False, color='black', linestyle=':', zorder=5
    )
  )
  ax.set_aspect('equal')
  ax.set_xlim(-EXTENT, EXTENT)
  ax.set_ylim(-EXTENT, EXTENT)
  ax.set_xticks([])
  ax.set_yticks([])
  for spine in ax.spines.values():
    spine.set_visible(False)
  ax.set_xlabel(
    f'{row["method"]}: {row["share"]:.1%} stay', color=colour, weight='bold'
  )


def _draw_sweep(ax, numbers, closed_form):
  grid, curves = closed_form
  sweep = numbers['sweep']
  for name, curve in curves.items():
    colour = style.COLOURS[name]
    ax.plot(grid, 100 * curve, color=colour, linewidth=1.6)
    ax.plot(sweep['rho'], 100 * np.array(sweep[name]), 'o', color=colour, label=name)
  for rho in numbers['settings']['rhos']:
    ax.axvline(rho, color='#adb5bd', linewidth=1, linestyle='--', zorder=0)
  ax.plot([], [], color='#6c757d', linewidth=1.6, label='basin, closed form')
  ax.plot([], [], color='black', linestyle=':', label='region of the samples')
  ax.set_xlabel('radius ρ')
  ax.set_ylabel(f'runs that stay at the maximum, % of {numbers["settings"]["samples"]}')
  ax.set_xlim(0, grid[-1])
  ax.set_ylim(-2, 103)
  ax.legend(loc='upper left')
