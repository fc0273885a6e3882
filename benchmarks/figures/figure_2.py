"""Figure 2: which runs stay at a maximum, that of `5 sin(r)/r`.

Setting of the paper: 200 samples uniform around the maximum, 200 steps, learning rate
0.05, ρ in {0.2, 1}. Left open: the region of the samples, here the disc r < 1.5, which
is wider than the largest ρ. "Stays" means r < 0.5 at the end; runs end nearer to 0
than 0.1 or near the ring of minima at r ≈ 4.49, so that any such bound does.

The runs are radial: the probe lies ρφ closer to 0 or across it, with φ = 1 for SAM and
φ = 1/√(1 + ℓ'(r)²) for Monge SAM (α = 1), and a small step leads inwards if it lies
across. A run stays, then, if `r √(1 + α²ℓ'(r)²) < ρ`, which gives the radius r* of the
basin and the share (r*/1.5)². So the shares depend on the region of the samples, but
the ratio of two methods' shares does not, as long as it holds both basins.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.figures.figure_2_picture import draw_maxima
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


def measure(*, quick: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
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


def findings(numbers: dict[str, Any]) -> list[str]:
  """What the numbers say, a sentence a ρ."""
  return [
    f'ρ = {rho:g}: {stay["SAM"]} of {numbers["settings"]["samples"]} runs of SAM stay'
    f' at the maximum, {stay["Monge SAM"]} of Monge SAM'
    for rho in numbers['settings']['rhos']
    for stay in [{r['method']: r['stay'] for r in numbers['rows'] if r['rho'] == rho}]
  ]


def table(numbers: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
  """Columns and rows of what is printed."""
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
  return ['method', 'ρ', 'stay', 'share', 'closed form', 'basin r*'], rows


def draw(numbers: dict[str, Any], paths: dict[str, Any], file: Path) -> None:
  """Writes the trajectories from above and the share that stays against ρ."""
  grid = np.linspace(0, SWEEP[-1] + 0.1, 400)
  curves = {name: share(grid, _alpha(name)) for name in SHOWN}
  rho = SETTINGS['rhos'][-1]
  ratio = share(rho, SETTINGS['alpha']) / share(rho, 0.0)
  *titles, sweep_title = [
    *findings(numbers),
    f'ρ = {rho:g}: Monge SAM’s basin has {ratio:.0%} of the area of SAM’s',
  ]
  draw_maxima(numbers, paths, (grid, curves), (titles, sweep_title), file)


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
