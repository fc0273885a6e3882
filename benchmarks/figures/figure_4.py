"""Figure 4: where the flow of SAM and that of Monge SAM attract, on `(1 − w₁w₂)²`.

The paper draws the smaller eigenvalue of A_ρ(w) (its eq. 10, the radius held fixed)
over the plane for several ρ; a point is stable where it is positive. Left open: which
ρ, and what "around" a point means. Here ρ is 0.1, 0.25, 0.5 and 1 (that of the other
figures), the plane is the square [−2, 2]², and each of its points belongs to the
nearest of saddle and the two flattest minima ±(1, 1). Areas are in units of the plane,
counted on a grid; that around a minimum is the mean of both, that around the saddle is
counted within 2ρ of it in each coordinate, on a grid as many cells wide. `core` is the
stable share of the disc of radius 1/2 around the same point.

Beside the paper's form stands the exact Jacobian of `w ↦ ∇ℓ(w + δ(w))`, and a sweep
over ρ. Both are statements about a smooth flow: where the gradient is zero, on the
whole valley, δ jumps, and a run can slide along it from side to side and end at a
minimum at which A_ρ is unstable. With ρ = 1 nearly all of Figure 5's runs do that end
at the flattest minima.
"""

import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.colors import LinearSegmentedColormap
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.common import style
from benchmarks.common.tables import Table
from benchmarks.figures.landscapes import distances
from benchmarks.figures.landscapes import FLATTEST
from benchmarks.figures.landscapes import mark_points
from benchmarks.figures.landscapes import valley
from msam_optax import euclidean
from msam_optax import monge
from msam_optax.sharpness import stability

SETTINGS = {
  'rhos': (0.1, 0.25, 0.5, 1.0),
  'alpha': 1.0,
  'extent': 2.0,
  'core': 0.5,
  'cells': 240,
}
METRICS = {'SAM': euclidean(), 'Monge SAM': monge()}
FORMS = {'fixed radius': True, 'exact': False}
SWEEP = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
# The eigenvalues at which the colours end.
LIMIT = 4.0
UNSTABLE = ('#868e96', '#e9ecef', '#f8f9fa')


def plane(cells: int, extent: float) -> np.ndarray:
  """``[cells, cells, 2]``: midpoints of the cells, never on an axis (cells is even)."""
  axis = extent * ((np.arange(cells) + 0.5) * 2 / cells - 1)
  return np.stack(np.meshgrid(axis, axis), axis=-1)


@functools.partial(jax.jit, static_argnames=('method', 'form'))
def smaller_eigenvalues(
  points: jax.Array, rho: float, *, method: str, form: str
) -> jax.Array:
  """``[n, n]``: that of A_ρ at points ``[n, n, 2]``."""

  def at(w):
    return stability(valley, w, METRICS[method], rho, fixed_radius=FORMS[form])[0]

  return jax.vmap(jax.vmap(at))(points)


def study(
  method: str, form: str, rho: float, cells: int
) -> tuple[dict[str, Any], np.ndarray]:
  """The stable areas at one ρ, and the map that they are counted on."""

  def look(extent):
    points = plane(cells, extent)
    values = smaller_eigenvalues(jnp.asarray(points), rho, method=method, form=form)
    return np.asarray(values), (2 * extent / cells) ** 2, *distances(points)

  values, cell, from_saddle, from_flattest = look(SETTINGS['extent'])
  stable, core = values > 0, SETTINGS['core']
  row = {
    'method': method,
    'form': form,
    'rho': rho,
    'saddle': 0.0,
    'minimum': cell * np.sum(stable & (from_saddle >= from_flattest)) / len(FLATTEST),
    'saddle_core': np.mean(stable[from_saddle < core]),
    'minimum_core': np.mean(stable[from_flattest < core]),
  }
  near, cell, from_saddle, from_flattest = look(min(2 * rho, SETTINGS['extent']))
  row['saddle'] = cell * np.sum((near > 0) & (from_saddle < from_flattest))
  return {key: _plain(value) for key, value in row.items()}, values


def measure(*, quick: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
  """The areas for each ρ, method and form, a sweep of them, and maps to be drawn."""
  cells = 100 if quick else SETTINGS['cells']
  rows, sweep, maps = [], [], {}
  for form, rho, method in itertools.product(FORMS, SWEEP, METRICS):
    shown = rho in SETTINGS['rhos']
    if quick and not shown:
      continue
    row, values = study(method, form, rho, cells)
    sweep.append(row)
    if shown:
      rows.append(row)
      maps[method, form, rho] = values
  return {'settings': SETTINGS, 'rows': rows, 'sweep': sweep}, maps


def table(numbers: dict[str, Any]) -> Table:
  """What is printed."""
  rows = [
    [
      row['form'],
      f'{row["rho"]:g}',
      row['method'],
      *(f'{row[name]:.3f}' for name in ('saddle', 'minimum')),
      *(f'{row[name]:.1%}' for name in ('saddle_core', 'minimum_core')),
    ]
    for row in numbers['rows']
  ]
  columns = ['A_ρ', 'ρ', 'method', 'area at saddle', 'at a minimum']
  return Table('', [*columns, 'of core at saddle', 'at a minimum'], rows)


def _plain(value):
  return value if isinstance(value, str) else float(value)


def draw(numbers: dict[str, Any], maps: dict[Any, np.ndarray], file: Path) -> None:
  """Writes a row of maps per method, a column per ρ, and the areas below."""
  style.use()
  rhos, methods = numbers['settings']['rhos'], list(METRICS)
  fig = plt.figure(figsize=(13, 10.4), layout='constrained')
  title = 'Where the flow attracts: A_ρ with the radius held fixed'
  fig.suptitle(title, fontsize=12.5, x=0.01, ha='left')
  [[upper], [lower]] = fig.subfigures(2, 1, squeeze=False, height_ratios=(1.8, 1))
  axes = upper.subplots(len(methods), len(rhos), sharex=True, sharey=True)
  for line, method in zip(axes, methods, strict=True):
    images = [
      _draw_map(ax, numbers, method, rho, maps[method, 'fixed radius', rho])
      for ax, rho in zip(line, rhos, strict=True)
    ]
    bar = upper.colorbar(images[-1], ax=list(line), extend='both', aspect=16, pad=0.01)
    bar.set_label('smaller eigenvalue of A')
    line[0].set_ylabel(method, color=style.COLOURS[method], weight='bold', fontsize=14)
  for ax, rho in zip(axes[0], rhos, strict=True):
    ax.set_title(f'ρ = {rho:g}')
  left, right = lower.subplots(1, 2)
  _draw_areas(left, numbers, 'saddle', 'stable area around the saddle')
  _draw_areas(right, numbers, 'minimum', 'stable area around a flattest minimum')
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
