"""What the processes train, and the same training by hand on one device."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SHARDS = 4
STEPS = 4
RHO, ALPHA, ETA = 0.3, 0.8, 0.01
LEARNING_RATE, MOMENTUM = 0.1, 0.9


def init() -> Any:
  """The params of a small network; all dimensions are multiples of ``SHARDS``."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32) / 2
  return {
    'hidden': {'kernel': draw(4, 8), 'bias': draw(8)},
    'out': {'kernel': draw(8, 4), 'bias': draw(4)},
  }


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
  """Inputs and targets ``[32, 4]``; the targets of later shards are larger.

  So the gradients of the shards differ in length, and it shows which are averaged.
  """
  x, y = np.random.default_rng([1, step]).normal(size=(2, 32, 4))
  scale = np.repeat(np.arange(1, SHARDS + 1) / 2, 32 // SHARDS)[:, None]
  return x.astype(np.float32), (scale * y).astype(np.float32)


def loss(params: Any, data: tuple[Any, Any]) -> jax.Array:
  """The mean squared error of the network on a batch."""
  x, y = data
  h = jnp.tanh(x @ params['hidden']['kernel'] + params['hidden']['bias'][None])
  out = h @ params['out']['kernel'] + params['out']['bias'][None]
  return jnp.mean((out - y) ** 2)


def _norm(tree):
  return np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(tree)))


def _sam(w, g, rho):
  del w
  return jax.tree.map(lambda x: rho * x / _norm(g), g), _norm(g)


def _msam(w, g, rho):
  shrink = np.sqrt(1 + ALPHA**2 * _norm(g) ** 2)
  return _sam(w, g, rho / shrink)[0], _norm(g) / shrink


def _asam(w, g, rho):
  t = {
    layer: {'kernel': np.abs(leaves['kernel']) + ETA, 'bias': 1.0}
    for layer, leaves in w.items()
  }
  tg = jax.tree.map(lambda t, x: t * x, t, g)
  return jax.tree.map(lambda t, x: rho * t * x / _norm(tg), t, tg), _norm(tg)


# ``(w, g, ρ) -> (δ, slope)`` as the papers have it.
PERTURBATIONS: dict[str, Callable[[Any, Any, float], tuple[Any, Any]]] = {
  'sam': _sam,
  'msam': _msam,
  'asam': _asam,
}


def train_by_hand(method: str, shards: int, *, sync_ascent: bool) -> tuple[Any, float]:
  """A loop over the shards of each batch, in NumPy but for the gradients.

  Args:
    method: a key of ``PERTURBATIONS``.
    shards: into how many parts a batch is cut; each goes uphill on its own
    sync_ascent: or, if true, along the mean of their gradients.

  Returns:
    The params after all steps of SGD with momentum, and the slope in the last step,
    the mean over the shards.
  """
  perturb, gradient = PERTURBATIONS[method], jax.jit(jax.grad(loss))

  def take(w, data):
    g = gradient(jax.tree.map(np.float32, w), data)
    return jax.tree.map(np.float64, g)

  def mean(trees):
    return jax.tree.map(lambda *xs: np.mean(xs, axis=0), *trees)

  w = jax.tree.map(np.float64, init())
  velocity = jax.tree.map(np.zeros_like, w)
  for step in range(STEPS):
    parts = list(zip(*(np.split(a, shards) for a in batch(step)), strict=True))
    ascents = [take(w, part) for part in parts]
    if sync_ascent:
      ascents = [mean(ascents)] * shards
    rho = RHO * (1 - step / (2 * STEPS))
    deltas, slopes = zip(*(perturb(w, g, rho) for g in ascents), strict=True)
    g = mean(
      take(jax.tree.map(np.add, w, delta), part)
      for delta, part in zip(deltas, parts, strict=True)
    )
    velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, g)
    w = jax.tree.map(lambda w, v: w - LEARNING_RATE * v, w, velocity)
  return w, float(np.mean(slopes))
