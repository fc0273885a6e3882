"""Params, gradients, and what broken metrics, combinations and methods share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from msam_optax import Ascent
from msam_optax import Combination
from msam_optax import Metric

# Leaves of two, one and no dimensions, so that masks and axes have something to do.
W = {'kernel': np.array([[0.3, -0.4], [1.2, 0.5]]), 'rest': (np.array([-0.2, 0.9]),)}
G = {'kernel': np.array([[0.6, 1.1], [-0.3, 0.2]]), 'rest': (np.array([0.4, -0.7]),)}
G_PROBE = {'kernel': np.array([[0.5, -1.0], [0.3, 0.8]]), 'rest': (np.ones(2),)}
G_OTHER = {'kernel': np.array([[0.1, 0.2], [-0.3, 1.0]]), 'rest': (-np.ones(2),)}


def arrays(tree, dtype=jnp.float32):
  return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def a_metric(ascent_of, init=lambda params: optax.EmptyState(), move=lambda s, g: s):
  """A metric from ``(g, unit, norm, space) -> (direction, slope)``."""

  def ascend(grads, state, params, *, space, **extra_args):
    unit, norm = space.normalize(grads)
    unit = jax.tree.map(lambda u, g: u.astype(g.dtype), unit, grads)
    direction, slope = ascent_of(grads, unit, norm, space)
    return Ascent(direction, slope), move(state, grads)

  return Metric(init, ascend)


def times(factor, tree):
  return jax.tree.map(lambda x: (factor * x.astype(jnp.float32)).astype(x.dtype), tree)


def moving_mean(state, grads):
  return jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g.astype(jnp.float32), state, grads)


def like_params(params):
  return jax.tree.map(lambda w: jnp.zeros(w.shape), params)


def is_traced_for(x, kind):
  """Whether a value is traced by `vmap` ('Batch'), or by `jit` and `scan`."""
  return isinstance(x, jax.core.Tracer) and kind in type(x).__name__


def every(k, due=None, combine=None):
  """Takes its probe in each k-th step, and remembers the last gradient there."""

  def init(params):
    return {'count': jnp.zeros([], jnp.int32), 'last': like_params(params)}

  def remember(grads, state, space):
    g = space.mean(grads[-1])
    good = jnp.all(jnp.isfinite(space.dot(g, g)))
    last = jax.tree.map(
      lambda m, x: jnp.where(good, x.astype(jnp.float32), m), state['last'], g
    )
    return g, {'count': state['count'] + 1, 'last': last}

  return Combination(
    init,
    combine or remember,
    due=due or (lambda g, state, space: state['count'] % k == 0),
  )
