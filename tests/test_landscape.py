"""Slices of a loss against direct evaluation, and pictures against their contents."""

import chex
import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot
import numpy as np
import optax
import pytest

from msam_optax import landscape
from msam_optax import monge
from msam_optax import perturb
from tests.problems import batch
from tests.problems import loss
from tests.problems import mlp_params

matplotlib.use('Agg')

PARAMS = mlp_params()
KEY = jax.random.key(4)


def network(params):
  return loss(params, batch())


@pytest.mark.parametrize('chunk', [1, 4, 100])
def test_plane_is_the_loss_at_each_point(chunk):
  u = landscape.random_direction(PARAMS, key=KEY)
  v = landscape.steepest_direction(network, PARAMS)
  x, y = np.linspace(-1, 1, 3), np.linspace(0, 0.5, 4)
  plane = landscape.loss_slice(network, PARAMS, [u, v], [x, y], chunk=chunk)
  expected = [
    [network(jax.tree.map(lambda w, a, b: w + i * a + j * b, PARAMS, u, v)) for j in y]
    for i in x
  ]
  np.testing.assert_allclose(plane.values, expected, rtol=1e-5)


def test_line_goes_through_the_parameters():
  u = landscape.steepest_direction(network, PARAMS)
  line = landscape.loss_slice(network, PARAMS, [u], [[-0.01, 0.0, 0.01]])
  below, here, above = line.values
  np.testing.assert_allclose(here, network(PARAMS), rtol=1e-6)
  slope = optax.tree.norm(jax.grad(network)(PARAMS))
  np.testing.assert_allclose((above - below) / 0.02, slope, rtol=1e-2)


def test_filters_are_as_long_as_those_of_the_parameters():
  conv = jax.random.normal(KEY, (3, 3, 4, 5))
  d = landscape.random_direction({'conv': conv, 'bias': jnp.ones(5)}, key=KEY)
  lengths = lambda x: np.linalg.norm(np.reshape(x, (-1, 5)), axis=0)
  np.testing.assert_allclose(lengths(d['conv']), lengths(conv), rtol=1e-5)
  np.testing.assert_array_equal(d['bias'], 0)


def test_a_filter_of_zeros_stays_fixed():
  d = landscape.random_direction(jnp.array([[0.0, 1.0], [0.0, 1.0]]), key=KEY)
  np.testing.assert_array_equal(d[:, 0], 0)
  assert np.all(np.isfinite(d))


def test_slice_of_half_precision_is_evaluated_in_it():
  params = mlp_params(jnp.bfloat16)
  u = landscape.random_direction(params, key=KEY)
  chex.assert_trees_all_equal_shapes_and_dtypes(u, params)
  values = landscape.loss_slice(
    lambda p: loss(p, batch(dtype=jnp.bfloat16)), params, [u], [[0.0, 1.0]]
  ).values
  assert values.dtype == jnp.float32
  exact = loss(params, batch(dtype=jnp.bfloat16))
  np.testing.assert_allclose(float(values[0]), float(exact), rtol=1e-2)


def test_probes_are_where_the_methods_go():
  """The loss at the marked point of the line is the loss at the method's probe."""
  rho, alpha = 0.5, 2.0
  u = landscape.steepest_direction(network, PARAMS)
  line = landscape.loss_slice(network, PARAMS, [u], [[0.0]])
  marks = landscape.probes(network, PARAMS, line, rho, alpha)
  at = [marks['SAM'][0], marks['Monge SAM'][0]]
  values = landscape.loss_slice(network, PARAMS, [u], [at]).values
  metric = monge(alpha)
  ascent, _ = metric.ascend(jax.grad(network)(PARAMS), metric.init(PARAMS), PARAMS)
  assert at[0] == pytest.approx(rho, rel=1e-5)
  np.testing.assert_allclose(
    values[1], network(perturb(PARAMS, ascent, rho)), rtol=1e-5
  )


def test_probes_outside_a_slice_are_projected():
  w = jnp.array([3.0, 4.0])  # the gradient of ½‖w‖²
  plane = landscape.loss_slice(
    lambda w: jnp.sum(w**2) / 2, w, [jnp.array([1.0, 0.0])], [[0.0]]
  )
  marks = landscape.probes(lambda w: jnp.sum(w**2) / 2, w, plane, rho=1.0)
  np.testing.assert_allclose(marks['SAM'], [0.6], rtol=1e-6)
  np.testing.assert_allclose(marks['Monge SAM'], [0.6 / np.sqrt(26)], rtol=1e-6)


def test_plane_is_drawn_with_its_axes_the_right_way_round():
  bowl = lambda w: jnp.sum(w**2)
  u, v = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
  plane = landscape.loss_slice(
    bowl, jnp.zeros(2), [u, v], [np.linspace(-2, 2, 5), np.linspace(-1, 1, 3)]
  )
  ax = landscape.mark(landscape.plot(plane), plane, {'SAM': [1.5, 0.5]})
  assert ax.get_xlim() == (-2, 2)
  assert ax.get_ylim() == (-1, 1)
  (x, y) = (np.asarray(d) for d in ax.lines[-1].get_data())
  np.testing.assert_array_equal([x, y], [[1.5], [0.5]])
  matplotlib.pyplot.close(ax.figure)


@pytest.mark.parametrize('count', [0, 3])
def test_wrong_number_of_directions(count):
  with pytest.raises(ValueError, match='one or two directions'):
    landscape.loss_slice(network, PARAMS, [PARAMS] * count, [[0.0]] * count)
