"""Which metrics do not depend on which changes of coordinates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msam_optax
from msam_optax import Ascent
from msam_optax import Metric
from msam_optax import testing
from tests.testing.examples import a_metric


def valley(w):
  return (1 - w[0] * w[1]) ** 2 + jnp.sin(w[0])


POINT = (1.1, -0.6)
TURN = np.array([[0.6, -0.8], [0.8, 0.6]])


def turn(v):
  return jnp.asarray(TURN, v.dtype) @ v


def scale(v):
  return v * jnp.array([2.0, 0.5], v.dtype)


RELATIVE = msam_optax.adaptive(0.0, weights=True)


@pytest.mark.parametrize(
  ('metric', 'change'),
  [
    (msam_optax.euclidean(), turn),
    (msam_optax.monge(0.8), turn),
    (RELATIVE, scale),
    (msam_optax.monge(0.8, RELATIVE), scale),
  ],
  ids=['euclidean, turned', 'monge, turned', 'adaptive, scaled', 'both, scaled'],
)
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_what_metrics_are_invariant_under(metric, change, dtype, request):
  if dtype == 'float64':
    request.getfixturevalue('x64')
  v = jnp.asarray(POINT, dtype)
  testing.assert_invariant(metric, change, valley, v)


@pytest.mark.parametrize(
  ('metric', 'change'),
  [
    (msam_optax.euclidean(), scale),
    (msam_optax.monge(0.8), scale),
    (RELATIVE, turn),
    (msam_optax.diagonal_fisher(), turn),
    (msam_optax.max_norm(), turn),
  ],
)
def test_what_metrics_are_not_invariant_under(metric, change):
  with pytest.raises(AssertionError, match=r'(?s)direction does not depend on.*At the'):
    testing.assert_invariant(metric, change, valley, jnp.array(POINT))


def test_a_slope_that_depends_on_the_coordinates():
  largest = a_metric(lambda g, unit, norm, space: (unit, jnp.max(jnp.abs(g))))
  with pytest.raises(AssertionError, match='The slope does not depend on the coord'):
    testing.assert_invariant(largest, turn, valley, jnp.array(POINT))


def test_a_chart_of_a_tree_with_its_pulled_back_metric():
  """Polar coordinates: ``w = r (cos φ, sin φ)``, whose metric is diag(1, r²)."""

  def chart(v):
    return v['r'] * jnp.stack([jnp.cos(v['phi']), jnp.sin(v['phi'])])

  def ascend(grads, state, params, **extra_args):
    u = {'r': grads['r'], 'phi': grads['phi'] / params['r'] ** 2}
    slope = jnp.sqrt(grads['r'] * u['r'] + grads['phi'] * u['phi'])
    return Ascent(jax.tree.map(lambda x: x / slope, u), slope), state

  polar = Metric(lambda params: (), ascend)
  v = {'r': jnp.array(1.4), 'phi': jnp.array(0.5)}
  monge = msam_optax.monge
  check = functools.partial(testing.assert_invariant, monge(0.8), chart, valley, v)
  check(metric_of_change=monge(0.8, polar))
  with pytest.raises(AssertionError, match='The direction does not depend'):
    check(metric_of_change=monge(0.8, msam_optax.euclidean()))
