"""Figure 4: where the flow of SAM and that of Monge SAM attract, on `(1 − w₁w₂)²`.

The paper draws the smaller eigenvalue of A_ρ(w) (its eq. 10, the radius held fixed)
over the plane for several ρ; a point is stable where it is positive. Left open: which
ρ, and what "round" a point means. Here ρ is 0.1, 0.25, 0.5 and 1 (that of the other
figures), the plane is the square [−2, 2]², and each of its points belongs to the
nearest of saddle and the two flattest minima ±(1, 1). Areas are in units of the plane,
counted on a grid; that round a minimum is the mean of both, that round the saddle is
counted within 2ρ of it in each coordinate, on a grid as many cells wide. `core` is the
stable share of the disc of radius 1/2 round the same point.

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
import numpy as np

from benchmarks.figures.figure_4_picture import draw_stability
from benchmarks.figures.landscapes import distances
from benchmarks.figures.landscapes import FLATTEST
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


def findings(numbers: dict[str, Any]) -> list[str]:
  """In how many of the ρ the areas are ordered as in the paper, a sentence a form."""
  return [f'{form.capitalize()}: {_ordering(numbers, form)}' for form in FORMS]


def table(numbers: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
  """Columns and rows of what is printed."""
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
  return [*columns, 'of core at saddle', 'at a minimum'], rows


def draw(numbers: dict[str, Any], maps: dict[str, Any], file: Path) -> None:
  """Writes the maps of the paper's form and the areas against ρ."""
  shown = {
    (method, rho): values
    for (method, form, rho), values in maps.items()
    if form == 'fixed radius'
  }
  draw_stability(numbers, shown, _ordering(numbers, 'fixed radius'), file)


def _plain(value):
  return value if isinstance(value, str) else float(value)


def _ordering(numbers, form):
  """In words: at how many ρ Monge SAM's stable area is smaller, and larger."""
  rhos = numbers['settings']['rhos']

  def gains(name):
    area = {
      (row['method'], row['rho']): row[name]
      for row in numbers['rows']
      if row['form'] == form
    }
    return np.array([area['Monge SAM', rho] - area['SAM', rho] for rho in rhos])

  return (
    'Monge SAM’s stable area is smaller round the saddle at'
    f' {np.sum(gains("saddle") < 0)} of {len(rhos)} radii, larger round the flattest'
    f' minima at {np.sum(gains("minimum") > 0)} of {len(rhos)}'
  )
