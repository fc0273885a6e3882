"""What is minimised: where to start, where the minimum is, and the loss."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Target(NamedTuple):
  """A problem whose minimum is known.

  Attributes:
    start: pytree of lists of numbers, the first parameters.
    minimum: pytree like ``start``.
    loss: ``params -> scalar``.
  """

  start: Any
  minimum: Any
  loss: Callable[[Any], jax.Array]

  def params(self, dtype: Any = jnp.float32) -> Any:
    """The first parameters as arrays of a dtype, each time new ones."""
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), self.start)


def _squared_distance_to(minimum):
  """The loss ``‖w − minimum‖²``."""

  def loss(params):
    distances = jax.tree.map(
      lambda w, m: jnp.sum(jnp.square(w - m.astype(w.dtype))), params, minimum
    )
    return sum(jax.tree.leaves(distances))

  return loss


def _parabola(start, minimum):
  start, minimum = (
    jax.tree.map(np.array, x, is_leaf=lambda x: isinstance(x, list))
    for x in (start, minimum)
  )
  return Target(start, minimum, _squared_distance_to(minimum))


def _rosenbrock(w):
  x, y = w
  return jnp.square(1 - x) + 100 * jnp.square(y - jnp.square(x))


TARGETS = {
  'parabola': _parabola([-1.0, 10.0, 1.0], [1.0, -1.0, 1.0]),
  'rosenbrock': Target(np.array([0.0, 0.0]), np.array([1.0, 1.0]), _rosenbrock),
  'matrix': _parabola([[0.0, 0.0], [0.0, 0.0]], [[3.0, -2.0], [1.0, 4.0]]),
  'mixed': _parabola(
    ([0.0, 0.0, 0.0], [[0.0, 0.0], [0.0, 0.0]]),
    ([1.0, -1.0, 2.0], [[1.0, 0.0], [-1.0, 1.0]]),
  ),
}
