"""Every method, step by step, is the formulas of its row: seven steps and more."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import by_hand
from tests.methods import cases
from tests.methods import is_default
from tests.methods import METHODS
from tests.methods import transformation
from tests.problems import batch
from tests.problems import loss
from tests.problems import mlp_params

pytestmark = pytest.mark.standard_promotion

STEPS = 8


def quadratic(params, data):
  """The mean of ``(⟨x, w⟩ − y)²``, steeper along some axes than along others."""
  x, y = data
  weights = jnp.concatenate([params['kernel'].ravel(), params['bias']])
  return jnp.mean(jnp.square(x @ weights - y))


def quadratic_problem():
  rng = np.random.default_rng(0)
  scales = np.array([2.0, 1.0, 1.0, 0.5, 0.2, 1.5])
  params = {'kernel': rng.normal(size=(2, 2)), 'bias': rng.normal(size=2)}
  batches = [
    (rng.normal(size=(8, 6)) * scales, rng.normal(size=8)) for _ in range(STEPS)
  ]
  return quadratic, params, batches, 0.05


def network_problem():
  batches = [batch(step, dtype=jnp.float64) for step in range(STEPS)]
  return loss, mlp_params(jnp.float64), batches, 0.1


PROBLEMS = {'quadratic': quadratic_problem, 'network': network_problem}


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(
  ('method', 'problem'),
  cases(
    METHODS,
    PROBLEMS,
    plain=lambda method, problem: problem == 'quadratic' and is_default(method),
  ),
)
def test_steps_are_those_by_hand(method, problem):
  loss_fn, params, batches, learning_rate = PROBLEMS[problem]()
  tx = optax.chain(transformation(method), optax.sgd(learning_rate, momentum=0.9))

  @jax.jit
  def step(params, state, data):
    grad_fn = functools.partial(jax.grad(loss_fn), data=data)
    updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state

  start = jax.tree.map(jnp.asarray, params)
  got, state = start, tx.init(start)
  for data in batches:
    got, state = step(got, state, data)

  plain = jax.jit(jax.grad(loss_fn))

  def by_numpy(row):
    return by_hand.train(
      row,
      lambda params, state, data: (plain(params, data), state),
      start,
      None,
      batches,
      by_hand.sgd(learning_rate, momentum=0.9),
    )[0]

  row = METHODS[method]
  chex.assert_trees_all_close(got, by_numpy(row), rtol=1e-8, atol=1e-12)
  # They can be told from those of the plain gradient.
  without_probes = by_numpy(row._replace(update=lambda g, *probes, **memory: g))
  assert optax.tree.norm(optax.tree.sub(got, without_probes)) > 0.01
