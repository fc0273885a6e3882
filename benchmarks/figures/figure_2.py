"""Figure 2: which runs stay at a maximum, that of `5 sin(r)/r`.

Setting of the paper: 200 samples uniform around the maximum, 200 steps, learning rate
0.05, ρ in {0.2, 1}. Left open: the region of the samples, here the disc r < 1.5, which
is wider than the largest ρ. "Stays" means r < 0.5 at the end; runs end nearer to 0
than 0.1 or near the ring of minima at r ≈ 4.49, so that any such bound does.

The runs are radial: the probe is ρφ closer to 0 or across it, with φ = 1 for SAM and
φ = 1/√(1 + ℓ'(r)²) for Monge SAM (α = 1), and a small step leads inwards if it is
across. A run stays, then, if `r √(1 + α²ℓ'(r)²) < ρ`, which gives the radius r* of the
basin and the share (r*/1.5)². So the shares depend on the region of the samples, but
the ratio of two methods' shares does not, as long as it holds both basins.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.patches import Circle
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.common import style
from benchmarks.common.tables import Table
from benchmarks.figures.landscapes import METHODS
from benchmarks.figures.landscapes import ripple
from benchmarks.figures.landscapes import trajectories
from benchmarks.figures.landscapes import trajectory

SETTINGS = {
  'samples': 200,
  'region': 1.5,
  'stays': 0.5,
  'seed': 0,
  'rhos': (0.2, 1.0),
  'alpha': 1.0,
  'lr': 0.05,
  'steps': 200,
}
SHOWN = ('SAM', 'Monge SAM')
SWEEP = tuple(round(0.1 * i, 1) for i in range(1, 19))
EXTENT = 5.4
LEAVES = '#495057'


def samples() -> np.ndarray:
  """``[samples, 2]``: uniform in the disc."""
  u, angle = jax.random.uniform(
    jax.random.key(SETTINGS['seed']), (2, SETTINGS['samples'])
  )
  r = SETTINGS['region'] * np.sqrt(np.asarray(u))
  angle = 2 * np.pi * np.asarray(angle)
  return np.stack([r * np.cos(angle), r * np.sin(angle)], axis=-1)


def basin(rho: Any, alpha: float) -> Any:
  """``r*``: from nearer than this a method flows to the maximum; at most 2."""
  r = np.linspace(1e-6, 2, 20001)
  slope = 5 * (np.cos(r) / r - np.sin(r) / r**2)
  # Increasing, as r and |slope| are: up to r ≈ 2.08.
  return np.interp(rho, r * np.hypot(1, alpha * slope), r)


def share(rho: Any, alpha: float) -> Any:
  """The share of the disc that is in the basin."""
  return np.minimum(basin(rho, alpha) / SETTINGS['region'], 1) ** 2


def measure(*, quick: bool = False) -> tuple[dict[str, Any], dict[Any, Any]]:
  """The shares that stay, for the paper's ρ and a sweep, and paths for the picture."""
  starts = samples()
  lr, steps = SETTINGS['lr'], SETTINGS['steps']
  paths = {
    (name, rho): trajectories(ripple, METHODS[name](rho), starts, lr=lr, steps=steps)
    for name in SHOWN
    for rho in SETTINGS['rhos']
  }
  rows = [_describe(name, rho, path) for (name, rho), path in paths.items()]
  rhos = SWEEP[::6] if quick else SWEEP
  sweep = {
    'rho': rhos,
    **{name: _sweep(name, rhos, starts).tolist() for name in SHOWN},
  }
  return {'settings': SETTINGS, 'rows': rows, 'sweep': sweep}, paths


def table(numbers: dict[str, Any]) -> Table:
  """What is printed."""
  rows = [
    [
      row['method'],
      f'{row["rho"]:g}',
      str(row['stay']),
      f'{row["share"]:.1%}',
      f'{row["share_of_closed_form"]:.1%}',
      f'{row["basin"]:.3f}',
    ]
    for row in numbers['rows']
  ]
  return Table('', ['method', 'ρ', 'stay', 'share', 'closed form', 'basin r*'], rows)


def stays(ends: np.ndarray) -> np.ndarray:
  """Whether points ``[..., 2]`` are at the maximum."""
  return np.linalg.norm(ends, axis=-1) < SETTINGS['stays']


def _alpha(name):
  return 0.0 if name == 'SAM' else SETTINGS['alpha']


def _describe(name, rho, path):
  stay = stays(path[:, -1])
  return {
    'method': name,
    'rho': rho,
    'stay': int(stay.sum()),
    'share': float(stay.mean()),
    'share_of_closed_form': float(share(rho, _alpha(name))),
    'basin': float(basin(rho, _alpha(name))),
  }


def _sweep(name, rhos, starts):
  """The share that stays at each ρ, in one compiled run."""

  def ends(rho):
    run = functools.partial(
      trajectory,
      ripple,
      METHODS[name](rho),
      lr=SETTINGS['lr'],
      steps=SETTINGS['steps'],
    )
    return jax.vmap(lambda start: run(start)[-1])(jnp.asarray(starts))

  return stays(np.asarray(jax.jit(jax.vmap(ends))(jnp.asarray(rhos)))).mean(axis=-1)


def draw(numbers: dict[str, Any], paths: dict[Any, Any], file: Path) -> None:
  """Writes a row per ρ and a column per method, and the sweep beside them."""
  style.use()
  fig = plt.figure(figsize=(13.6, 7.6), layout='constrained')
  [[left, right]] = fig.subfigures(1, 2, squeeze=False, width_ratios=(1.62, 1))
  rhos = SETTINGS['rhos']
  for band, rho in zip(left.subfigures(len(rhos), 1), rhos, strict=True):
    band.suptitle(f'ρ = {rho:g}', x=0.02, ha='left', fontsize=11.5)
    rows = [row for row in numbers['rows'] if row['rho'] == rho]
    for ax, row in zip(band.subplots(1, len(rows)), rows, strict=True):
      _draw_from_above(ax, numbers['settings'], row, paths[row['method'], rho])
  ax = right.subplots()
  _draw_sweep(ax, numbers)
  ratio = share(rhos[-1], SETTINGS['alpha']) / share(rhos[-1], 0.0)
  title = f'Monge SAM’s basin over SAM’s at ρ = {rhos[-1]:g}: {ratio:.0%}'
  ax.set_title(title, loc='left', fontsize=11.5)
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
  ax.add_patch(Circle((0, 0), row['basin'], fill=False, color=colour, zorder=5))
  ax.add_patch(
    Circle(
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


def _draw_sweep(ax, numbers):
  grid, sweep = np.linspace(0, SWEEP[-1] + 0.1, 400), numbers['sweep']
  for name in SHOWN:
    colour = style.COLOURS[name]
    ax.plot(grid, 100 * share(grid, _alpha(name)), color=colour, linewidth=1.6)
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
