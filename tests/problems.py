"""A small real problem that the tests share: parameters, batches, a loss."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def normal(seed: int, *shape: int) -> np.ndarray:
  """Normal numbers, made without a program to compile."""
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def init(function: Callable[..., Any], *args: Any, seed: int = 0) -> Any:
  """Parameters of the structure and shapes that a function would make."""
  rng = np.random.default_rng(seed)
  draw = lambda x: (0.5 * rng.normal(size=x.shape)).astype(np.float32)
  return jax.tree.map(draw, jax.eval_shape(function, *args))


def mlp_params(dtype=jnp.float32):
  """A network of one hidden layer, 3 → 5 → 2, as a dict of dicts."""
  k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
  return {
    'hidden': {
      'kernel': jax.random.normal(k1, (3, 5), dtype),
      'bias': 0.1 * jax.random.normal(k2, (5,), dtype),
    },
    'out': {
      'kernel': jax.random.normal(k3, (5, 2), dtype),
      'bias': jnp.zeros(2, dtype),
    },
  }


def batch(step=0, size=8, dtype=jnp.float32):
  """Inputs ``[size, 3]`` and targets ``[size, 2]`` that depend on the step only."""
  kx, ky = jax.random.split(jax.random.fold_in(jax.random.key(1), step))
  return jax.random.normal(kx, (size, 3), dtype), jax.random.normal(
    ky, (size, 2), dtype
  )


def loss(params, data):
  """The mean squared error of the network on a batch."""
  x, y = data
  h = jnp.tanh(x @ params['hidden']['kernel'] + params['hidden']['bias'][None])
  out = h @ params['out']['kernel'] + params['out']['bias'][None]
  return jnp.mean((out - y) ** 2)
