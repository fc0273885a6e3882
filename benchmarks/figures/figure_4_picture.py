"""The picture of Figure 4: maps of stability, and the stable areas against ρ."""

from pathlib import Path
from typing import Any

from matplotlib.colors import LinearSegmentedColormap
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.common import style
from benchmarks.figures.valley import mark_points

# The eigenvalues at which the colours end.
LIMIT = 4.0
UNSTABLE = ('#868e96', '#e9ecef', '#f8f9fa')


def draw_stability(
  numbers: dict[str, Any],
  maps: dict[tuple[str, float], np.ndarray],
  title: str,
  file: Path,
) -> None:
  """Writes a row of maps a method, a column a ρ, and the areas below.

  Args:
    numbers: of `figure_4.measure`.
    maps: the smaller eigenvalues over the plane for each method and ρ.
    title: what the maps show.
    file: the picture.
  """
  style.use()
  rhos = numbers['settings']['rhos']
  methods = list(dict.fromkeys(method for method, _ in maps))
  fig = plt.figure(figsize=(13, 10.4), layout='constrained')
  fig.suptitle(title, fontsize=12.5, x=0.01, ha='left')
  upper, lower = fig.subfigures(2, 1, height_ratios=(1.8, 1))
  axes = upper.subplots(len(methods), len(rhos), sharex=True, sharey=True)
  for line, method in zip(axes, methods, strict=True):
    for ax, rho in zip(line, rhos, strict=True):
      image = _draw_map(ax, numbers, method, rho, maps[method, rho])
    bar = upper.colorbar(image, ax=list(line), extend='both', aspect=16, pad=0.01)
    bar.set_label('smaller eigenvalue of A')
    line[0].set_ylabel(method, color=style.COLOURS[method], weight='bold', fontsize=14)
  for ax, rho in zip(axes[0], rhos, strict=True):
    ax.set_title(f'ρ = {rho:g}')
  left, right = lower.subplots(1, 2)
  _draw_areas(left, numbers, 'saddle', 'stable area round the saddle')
  _draw_areas(right, numbers, 'minimum', 'stable area round a flattest minimum')
  left.legend(loc='upper left')
  fig.savefig(file)
  plt.close(fig)


def _draw_map(ax, numbers, method, rho, values):
  extent = numbers['settings']['extent']
  colour = style.COLOURS[method]
  stops = zip((0, 0.3, 0.5, 0.5, 0.6, 1), _stops(colour), strict=True)
  image = ax.imshow(
    values,
    origin='lower',
    extent=(-extent, extent, -extent, extent),
    cmap=LinearSegmentedColormap.from_list(method, list(stops)),
    vmin=-LIMIT,
    vmax=LIMIT,
    interpolation='bilinear',
  )
  axis = np.linspace(-extent, extent, 2 * len(values) + 1)[1::2]
  ax.contour(axis, axis, values, [0], colors=[colour], linewidths=1.6)
  mark_points(ax, size=8)
  (row,) = (
    row
    for row in numbers['rows']
    if (row['method'], row['rho'], row['form']) == (method, rho, 'fixed radius')
  )
  ax.text(
    -0.93 * extent,
    0.93 * extent,
    f'saddle {row["saddle"]:.2f}\nminimum {row["minimum"]:.2f}',
    va='top',
    fontsize=10,
    bbox={'facecolor': 'white', 'alpha': 0.85, 'edgecolor': 'none', 'pad': 2.5},
  )
  ax.grid(visible=False)
  ax.set_xticks([-2, -1, 0, 1, 2])
  ax.set_yticks([-2, -1, 0, 1, 2])
  return image


def _stops(colour):
  """Greys for what repels, the method's colour for what attracts."""
  light = LinearSegmentedColormap.from_list('', ['white', colour])(0.3)
  middle = LinearSegmentedColormap.from_list('', ['white', colour])(0.6)
  return (*UNSTABLE, light, middle, colour)


def _draw_areas(ax, numbers, name, label):
  for method in dict.fromkeys(row['method'] for row in numbers['sweep']):
    for form, look in (('fixed radius', '-o'), ('exact', ':')):
      rows = [
        row
        for row in numbers['sweep']
        if (row['method'], row['form']) == (method, form)
      ]
      ax.plot(
        [row['rho'] for row in rows],
        [row[name] for row in rows],
        look,
        color=style.COLOURS[method],
        label=f'{method}, {"as in the paper" if form != "exact" else "exact Jacobian"}',
      )
  ax.set_xlabel('radius ρ')
  ax.set_title(label, loc='left', fontsize=11.5)
  ax.set_ylim(bottom=0)
