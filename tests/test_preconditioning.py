"""The metric of a preconditioner against its formula, over steps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msam_optax import Ascent
from msam_optax import monge
from msam_optax import preconditioned
from msam_optax import sharpness_aware
from tests.test_averages import climb

# Adam raises its decay to an integer count.
pytestmark = pytest.mark.standard_promotion

STEPS = np.random.default_rng(0).normal(size=(4, 6))
W = np.ones(6, np.float32)
ADAM = optax.scale_by_adam(b1=0.0, b2=0.9, eps=1e-4)


@pytest.mark.usefixtures('x64')
def test_second_moments_of_adam():
  ascents, _ = climb(preconditioned(ADAM), STEPS, w=np.ones(6))
  over_monge, _ = climb(monge(0.7, preconditioned(ADAM)), STEPS, w=np.ones(6))

  v = np.zeros(6)
  for i, g in enumerate(STEPS):
    v = 0.9 * v + 0.1 * g**2
    P = np.diag(np.sqrt(v / (1 - 0.9 ** (i + 1))) + 1e-4)
    for got, G in ((ascents, P), (over_monge, P + 0.49 * np.outer(g, g))):
      u = np.linalg.solve(G, g)
      np.testing.assert_allclose(got.direction[i], u / np.sqrt(g @ u), rtol=1e-8)
      np.testing.assert_allclose(got.slope[i], np.sqrt(g @ u), rtol=1e-8)


@pytest.mark.parametrize('size', [1e-30, 1e30])
def test_at_any_magnitude_that_the_transformation_bears(size):
  """Constant factors, so that it bears all; of products of both nothing is a number."""
  P = np.array([1e-8, 1.0, 1e8], np.float32)
  scale = optax.stateless(lambda g, params: jax.tree.map(lambda x: x / P, g))
  g = size * np.array([0.6, -0.8, 2.0])

  ascents, _ = climb(preconditioned(scale), np.float32([g]), w=W[:3])

  slope = np.sqrt(np.sum(g**2 / P))
  np.testing.assert_allclose(ascents.slope[0], slope, rtol=1e-5)
  np.testing.assert_allclose(ascents.direction[0], g / P / slope, rtol=1e-5)


@pytest.mark.parametrize(
  'transformation',
  [optax.sgd(0.1), optax.scale(0.0), optax.set_to_zero(), optax.scale(jnp.nan)],
  ids=['minus', 'zero', 'nothing', 'nan'],
)
def test_what_is_not_positive_is_nan(transformation):
  gradients = np.stack([STEPS[0], 0 * STEPS[0]]).astype(np.float32)
  ascents, _ = climb(preconditioned(transformation), gradients, w=W)
  assert np.isnan(ascents.direction[0]).all()
  assert np.isnan(ascents.slope[0])
  at_zero = jax.tree.map(lambda x: x[1], ascents)
  chex.assert_trees_all_equal(at_zero, Ascent(np.zeros(6, np.float32), np.float32(0)))


@pytest.mark.parametrize('bad', [np.nan, np.inf, 1e30])
def test_a_step_that_would_spoil_the_state_has_not_been(bad):
  """1e30 is a number, and its square is none."""
  metric = preconditioned(ADAM)
  rows = STEPS[:2].astype(np.float32)
  spoilt = rows[0].copy()
  spoilt[2] = bad

  ascents, state = climb(metric, np.stack([rows[0], spoilt, rows[1]]), w=W)

  expected, expected_state = climb(metric, rows, w=W)
  chex.assert_trees_all_equal(state, expected_state)
  last = jax.tree.map(lambda x: x[jnp.array([0, 2])], ascents)
  chex.assert_trees_all_close(last, expected, rtol=1e-6)


def test_masked_leaves_have_no_state_and_replicas_the_same():
  tx = sharpness_aware(
    preconditioned(ADAM), 0.1, mask={'a': True, 'b': False}, axis_name='i'
  )
  w = {'a': jnp.zeros(6), 'b': jnp.zeros(3)}

  def step(g):
    grads = {'a': g, 'b': jnp.ones(3)}
    return tx.update(grads, tx.init(w), w, grad_fn=lambda probe: probe)

  probes, state = jax.jit(jax.vmap(step, axis_name='i'))(STEPS[:2].astype(np.float32))

  g = STEPS[:2].mean(axis=0)
  u = g / (np.abs(g) + 1e-4)
  np.testing.assert_allclose(probes['a'][0], 0.1 * u / np.sqrt(g @ u), rtol=1e-5)
  nu = optax.tree.get(state, 'nu')
  assert isinstance(nu['b'], optax.MaskedNode)
  np.testing.assert_allclose(nu['a'], np.tile(0.1 * g**2, (2, 1)), rtol=1e-5)


def test_extra_arguments_reach_it():
  def update(updates, state, params, *, boost, **extra_args):
    return jax.tree.map(lambda g: boost * g, updates), state

  scale = optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )
  ascents, _ = climb(preconditioned(scale), np.float32(STEPS[:1]), w=W, boost=4.0)
  n = np.linalg.norm(STEPS[0])
  np.testing.assert_allclose(ascents.slope[0], 2 * n, rtol=1e-5)


def test_what_is_no_transformation_is_refused():
  with pytest.raises(TypeError, match='`transformation` must be an Optax transforma'):
    preconditioned(optax.scale_by_adam)
