"""The losses of the paper's Figures 1 to 5, and runs of the methods on them.

Each method is what a user would write, `optax.chain(msam(rho), optax.sgd(lr))`; a run
is a `lax.scan` over its updates.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from msam_optax import adaptive
from msam_optax import asam
from msam_optax import fisher_sam
from msam_optax import msam
from msam_optax import sam

# Of `valley`: the saddle, and the two minima whose Hessian has the least trace.
SADDLE = np.zeros(2)
FLATTEST = np.array([[1.0, 1.0], [-1.0, -1.0]])

# How near is near: to the saddle, to a flattest minimum, and to the valley's floor in
# |1 - w₁w₂|, the root of the loss.
NEAR = 0.25
LEVELS = (0.01, 0.1, 0.5, 1, 2, 4, 8, 16, 32, 64)


def monge_over_asam(rho: float, eta: float = 0.01) -> optax.GradientTransformation:
  """The Monge metric over that of ASAM, all coordinates weights."""
  return msam(rho, base=adaptive(eta, weights=True))


METHODS: dict[str, Callable[..., optax.GradientTransformation]] = {
  'GD': lambda rho: optax.identity(),
  'SAM': sam,
  'Monge SAM': msam,
  'Fisher SAM': functools.partial(fisher_sam, eta=1.0),
  'ASAM': functools.partial(asam, eta=0.01, weights=True),
  'Monge over ASAM': monge_over_asam,
}


def valley(w: Any) -> Any:
  """``(1 − w₁w₂)²``: two valleys of minima with a saddle between them, at 0."""
  return (1 - w[0] * w[1]) ** 2


def ripple(w: jax.Array) -> jax.Array:
  """``5 sin(r)/r`` for ``r = ‖w‖``: a maximum at 0, a ring of minima at r ≈ 4.49."""
  squared = jnp.sum(w**2)
  r = jnp.sqrt(jnp.where(squared > 0, squared, 1.0))
  return jnp.where(squared > 0, 5 * jnp.sin(r) / r, 5.0)


def parabola(w: jax.Array) -> jax.Array:
  """``w²``."""
  return jnp.sum(w**2)


def trajectory(
  loss: Callable[[jax.Array], jax.Array],
  method: optax.GradientTransformation,
  start: jax.Array,
  *,
  lr: float,
  steps: int,
) -> jax.Array:
  """``[steps + 1, n]``: where gradient descent with a method goes from a start."""
  tx = optax.with_extra_args_support(optax.chain(method, optax.sgd(lr)))
  grad = jax.grad(loss)

  def step(carry, _) -> tuple[Any, Any]:
    w, state = carry
    updates, state = tx.update(grad(w), state, w, grad_fn=grad)
    w = optax.apply_updates(w, updates)
    return (w, state), w

  _, path = jax.lax.scan(step, (start, tx.init(start)), length=steps)
  return jnp.concatenate([start[None], path])


def trajectories(
  loss: Callable[[jax.Array], jax.Array],
  method: optax.GradientTransformation,
  starts: np.ndarray,
  *,
  lr: float,
  steps: int,
) -> np.ndarray:
  """``[starts, steps + 1, n]``: the trajectory from each of many starts."""
  run = functools.partial(trajectory, loss, method, lr=lr, steps=steps)
  return np.asarray(jax.jit(jax.vmap(run))(jnp.asarray(starts)))


def distances(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """How far points ``[..., 2]`` are from the saddle and a flattest minimum."""
  from_flattest = np.linalg.norm(w[..., None, :] - FLATTEST, axis=-1).min(axis=-1)
  return np.linalg.norm(w - SADDLE, axis=-1), from_flattest


def place(w: np.ndarray) -> str:
  """Where on `valley` a point is, in words."""
  from_saddle, from_flattest = distances(w)
  if from_saddle < NEAR:
    return 'at the saddle'
  if from_flattest < NEAR:
    return 'near the flattest minimum'
  return 'on the valley' if abs(1 - w[0] * w[1]) < NEAR else 'elsewhere'


def draw_valley(ax, x_range, y_range) -> None:
  """Draws contours of the loss."""
  x, y = np.meshgrid(np.linspace(*x_range, num=301), np.linspace(*y_range, num=301))
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
