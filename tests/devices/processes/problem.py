"""What the processes train, and the same training by hand on one device."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests import by_hand
from tests.methods import METHODS

SHARDS = 4
STEPS = 4
LEARNING_RATE, MOMENTUM = 0.1, 0.9


def rho_at(method: str) -> optax.Schedule:
  """The radius of a method, which is halved during the training."""
  rho = METHODS[method].rho
  return lambda step: rho * (1 - step / (2 * STEPS))


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


def train_by_hand(method: str, shards: int, *, sync_ascent: bool) -> tuple[Any, float]:
  """A loop over the shards of each batch, in NumPy but for the gradients of the loss.

  Args:
    method: a key of ``METHODS``.
    shards: into how many parts a batch is cut; each goes uphill on its own,
    sync_ascent: or, if true, along the mean of their gradients.

  Returns:
    The params after all steps of SGD with momentum, and the slope in the last step,
    the mean over the shards.
  """
  grad = jax.jit(jax.grad(loss))
  w, optimizer = jax.tree.map(np.float64, init()), by_hand.sgd(LEARNING_RATE, MOMENTUM)
  slope = np.nan
  for step in range(STEPS):
    parts = list(zip(*(np.split(a, shards) for a in batch(step)), strict=True))

    def gradient(w, part):
      return jax.tree.map(np.float64, grad(jax.tree.map(np.float32, w), part))

    gradients = [lambda w, part=part: gradient(w, part) for part in parts]
    own = [gradient(w, part) for part in parts]
    mean = jax.tree.map(lambda *gs: np.mean(gs, axis=0), *own)
    ascents = [mean] if sync_ascent else own
    slope = np.mean([by_hand.slope(method, w, g) for g in ascents])
    radii = [rho_at(method)(step)] * shards
    update = by_hand.update(method, w, gradients, synced=sync_ascent, radii=radii)
    w = optimizer(w, update)
  return w, float(slope)
