"""The loss, its data and parameters, and the same as a model of Flax NNX.

It is ``mean (sin(x·a) + x₁b₁ + x₂b₂ − y)²``, whose gradient NumPy has in closed form.
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

RHO = 0.3
ROWS = 32
PARTS = 4


def make_params(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  draw = lambda n: jnp.asarray(rng.normal(size=n), dtype)
  return {'a': draw(3), 'b': draw(2)}


def make_data():
  rng = np.random.default_rng(1)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return draw(ROWS, 3), draw(ROWS)


def flat(tree):
  return np.concatenate(
    [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
  )


def squares(params, x, y):
  a, b = (params[name].astype(jnp.float32) for name in 'ab')
  return (jnp.sin(x @ a) + x[:, :2] @ b - y) ** 2


def loss(params, data):
  return jnp.mean(squares(params, *data))


def counted_loss(params, data):
  """The total over examples, and how many there are."""
  x, y, counts = data
  return jnp.sum(counts * squares(params, x, y)), jnp.sum(counts)


COUNTS = np.random.default_rng(2).integers(1, 4, ROWS).astype(np.float64)


def counts_with(empty):
  counts = COUNTS.copy()
  counts[empty] = 0
  return counts


def counted_data(counts):
  return *make_data(), jnp.asarray(counts, jnp.float32)


class Model(nnx.Module):
  """The same loss as a model, with a counter that must go up once a step."""

  def __init__(self):
    self.a = nnx.Param(make_params()['a'])
    self.b = nnx.Param(make_params()['b'])
    self.calls = nnx.Variable(jnp.zeros([], jnp.int32))


def model_loss(model, data):
  model.calls[...] += 1
  return loss({'a': model.a[...], 'b': model.b[...]}, data)


def assert_close(got, want, rtol=2e-6):
  got = got if isinstance(got, np.ndarray) else flat(got)
  np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * np.abs(want).max())
