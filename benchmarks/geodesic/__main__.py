"""Straight and geodesic probes: where they are, and how far the loss rises to them.

Run `python -m benchmarks.geodesic`. On two landscapes of the paper, `(1 − w₁w₂)²` and
`5 sin(r)/r`, with α = 1: the straight probe of Monge SAM, the geodesic in one and in
two steps, and the curve itself by SciPy. The rise to the end of the curve is at most
`ρ/α`. That is computed in float64. Then a small net is trained with each of them: see
`training`.
"""

from collections.abc import Callable
from pathlib import Path
import time
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy import integrate

from benchmarks.common import style
from benchmarks.common.command import make_parser
from benchmarks.common.command import publish
from benchmarks.common.environment import describe
from benchmarks.common.tables import Table
from benchmarks.demo.training import Settings
from benchmarks.figures import landscapes
from benchmarks.geodesic import training
from msam_optax import geodesic
from msam_optax import landscape
from msam_optax import LOCAL
from msam_optax import Metric
from msam_optax import monge
from msam_optax import perturb

ALPHA = 1.0
DRAWN_RHO = 2.0  # on the map
EXACT, STRAIGHT = 'geodesic', 'straight'
METRICS: dict[str, Metric] = {
  STRAIGHT: monge(ALPHA),
  'one step': geodesic(1, ALPHA),
  'two steps': geodesic(2, ALPHA),
}
LOOKS: dict[str, dict[str, Any]] = {
  STRAIGHT: {'color': '#d95f02', 'marker': 'o'},
  'one step': {'color': '#7b3294', 'marker': '^'},
  'two steps': {'color': '#1b9e77', 'marker': 's'},
  EXACT: {'color': '#1b6ca8'},
}


class Scene(NamedTuple):
  """A landscape, and what is shown of it.

  Attributes:
    title: the loss.
    loss: ``[2] -> scalar``.
    starts: ``[n, 2]``, the points on the map; the first also has the curves of rises.
    extent: the map, ``((x, x), (y, y))``.
  """

  title: str
  loss: Callable[[Any], Any]
  starts: tuple[tuple[float, float], ...]
  extent: tuple[tuple[float, float], tuple[float, float]]


SCENES = (
  Scene(
    '(1 − w₁w₂)²',
    landscapes.valley,
    ((2.0, 0.3), (1.0, 0.5), (-1.5, 0.5), (-1.2, -0.3)),
    ((-2.4, 2.9), (-1.4, 1.5)),
  ),
  Scene(
    '5 sin(r)/r',
    landscapes.ripple,
    ((3.0, 0.8), (-2.0, 2.4), (-1.1, -2.9), (4.4, -2.3)),
    ((-4.4, 6.6), (-3.9, 3.6)),
  ),
)


def probe(metric: Metric, loss: Callable[[Any], Any], w: Any, rho: float) -> jax.Array:
  """``w + ρ · direction``."""
  grad_fn = jax.grad(loss)
  ascent, _ = metric.ascend(
    grad_fn(w), metric.init(w), w, space=LOCAL, rho=rho, grad_fn=grad_fn
  )
  return perturb(w, ascent, rho)


def curve(
  loss: Callable[[Any], Any], w: np.ndarray, rho: float, points: int
) -> np.ndarray:
  """``[points, 2]``: the geodesic from ``w``, of the length ``ρ``, by SciPy."""
  grad, hessian = jax.jit(jax.grad(loss)), jax.jit(jax.hessian(loss))

  def slopes(time, y):
    x, v = y[:2], y[2:]
    g, H = np.asarray(grad(x)), np.asarray(hessian(x))
    return np.concatenate([v, -(ALPHA**2) * (v @ H @ v) * g / (1 + ALPHA**2 * g @ g)])

  g = np.asarray(grad(w))
  norm = np.linalg.norm(g)
  start = np.concatenate([w, rho * g / (norm * np.hypot(1, ALPHA * norm))])
  times = np.linspace(0, 1, points)
  return (
    integrate.solve_ivp(slopes, (0, 1), start, t_eval=times, rtol=1e-9, atol=1e-10)
    .y[:2]
    .T
  )


def measure(scene: Scene, rhos: np.ndarray) -> dict[str, Any]:
  """The rise to every probe from the first start of a scene, at each radius."""
  w = jnp.asarray(scene.starts[0])
  rise = lambda end: scene.loss(end) - scene.loss(w)

  def rises(metric):
    of_rho = lambda rho: rise(probe(metric, scene.loss, w, rho))
    return jax.jit(jax.vmap(of_rho))(rhos).tolist()

  # A longer geodesic goes on where a shorter one ends.
  ends = curve(scene.loss, np.asarray(w), rhos[-1], len(rhos) + 1)[1:]
  return {
    'loss': scene.title,
    'start': scene.starts[0],
    'rho': rhos.tolist(),
    'rise': {
      **{name: rises(metric) for name, metric in METRICS.items()},
      EXACT: jax.vmap(rise)(ends).tolist(),
    },
  }


def table(scene: dict[str, Any]) -> Table:
  """The rises at some of the radii."""
  names = (STRAIGHT, 'one step', 'two steps', EXACT)
  rows = [
    [f'{rho:g}', *(f'{scene["rise"][name][i]:.3f}' for name in names), f'{rho:g}']
    for i, rho in enumerate(scene['rho'])
    if round(2 * rho, 6) % 1 == 0
  ]
  x, y = scene['start']
  title = f'Rise of {scene["loss"]} from ({x:g}, {y:g})'
  return Table(title, ['ρ', *names, 'bound ρ/α'], rows)


def draw(scenes: list[dict[str, Any]], file: Path) -> None:
  """A row per landscape: the map with all probes, and the rises."""
  style.use()
  fig, axes = plt.subplots(
    len(SCENES),
    2,
    figsize=(13.2, 9.0),
    width_ratios=(1.5, 1),
    layout='constrained',
  )
  for (left, right), scene, numbers in zip(axes, SCENES, scenes, strict=True):
    _draw_map(left, scene)
    _draw_rises(right, numbers)
  axes[0, 0].legend(loc='lower left', frameon=True, framealpha=0.95, edgecolor='none')
  fig.savefig(file)
  plt.close(fig)


def _draw_map(ax, scene):
  x, y = (np.linspace(*ends, num=241) for ends in scene.extent)
  shown = landscape.loss_slice(
    scene.loss, jnp.zeros(2), [jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])], [x, y]
  )
  values = np.asarray(shown.values).T
  ax.contourf(x, y, np.arcsinh(values), 24, cmap='Greys', zorder=0, alpha=0.7)
  for i, start in enumerate(scene.starts):
    w = np.array(start)
    path = curve(scene.loss, w, DRAWN_RHO, 65)
    name = {'label': EXACT} if i == 0 else {}
    ax.plot(*path.T, color=LOOKS[EXACT]['color'], zorder=3, **name)
    for method, metric in METRICS.items():
      end = np.asarray(probe(metric, scene.loss, jnp.asarray(w), DRAWN_RHO))
      look, name = LOOKS[method], {'label': method} if i == 0 else {}
      if method == STRAIGHT:
        ax.plot(*np.stack([w, end]).T, color=look['color'], linewidth=1.4, zorder=2)
      ax.plot(*end, linestyle='none', markersize=6, zorder=4, **look, **name)
    ax.plot(*w, 'o', color='white', markeredgecolor='black', zorder=5)
  ax.set_aspect('equal')
  ax.grid(visible=False)
  ax.set_xlim(scene.extent[0])
  ax.set_ylim(scene.extent[1])
  ax.set_xlabel('w₁')
  ax.set_ylabel('w₂')
  ax.set_title(f'{scene.title}: probes at ρ = {DRAWN_RHO:g}', loc='left', fontsize=11.5)


def _draw_rises(ax, numbers):
  rho = np.array(numbers['rho'])
  for name, rise in numbers['rise'].items():
    ax.plot(rho, rise, color=LOOKS[name]['color'], label=name)
  bound = rho / ALPHA
  ax.plot(rho, bound, color='black', linestyle=':', label='bound ρ/α')
  low = min(0.0, *(min(rise) for rise in numbers['rise'].values()))
  ax.set_ylim(1.1 * low - 0.05 * bound[-1], 1.25 * bound[-1])
  ax.set_xlim(0, rho[-1])
  ax.set_xlabel('radius ρ')
  x, y = numbers['start']
  ax.set_ylabel(f'rise of the loss from ({x:g}, {y:g})')
  ax.legend(loc='upper left')


def main(argv: list[str] | None = None) -> None:
  """Measures, draws and prints."""
  parser = make_parser('geodesic', __doc__)
  parser.add_argument('--quick', action='store_true', help='coarse, to see it run')
  args = parser.parse_args(argv)
  args.out.mkdir(parents=True, exist_ok=True)
  stem = args.out / 'geodesic'
  settings, methods = Settings(), training.METHODS
  radii, seeds, count = training.RHOS, training.SEEDS, 60
  if args.quick:
    settings = settings._replace(train=100, validation=50, epochs=2, width=4)
    methods, radii, seeds, count = methods[:2], (0.5,), (0, 1), 6
  jax.config.update('jax_enable_x64', True)
  rhos = np.linspace(0, 3, count + 1)[1:]
  scenes = [measure(scene, rhos) for scene in SCENES]
  draw(scenes, stem.with_suffix('.png'))
  jax.config.update('jax_enable_x64', False)
  began = time.perf_counter()
  rows = training.experiment(settings, methods, radii, seeds)
  results = {
    'environment': describe(),
    'alpha': ALPHA,
    'scenes': scenes,
    'settings': {**settings._asdict(), 'seeds': seeds},
    'rows': rows,
    'seconds': time.perf_counter() - began,
  }
  document = [*(table(scene) for scene in scenes), *training.report(rows)]
  publish(stem, results, document)


if __name__ == '__main__':
  main()
