"""Slices of a loss against direct evaluation, and pictures against their contents."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot
import numpy as np
import optax
import pytest

from msam_optax import by_name
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


@pytest.mark.parametrize('size', [1e-30, 1.0, 1e30])
def test_filters_of_any_size(size):
  kernel = size * jnp.array([[3.0, 1.0], [4.0, 0.0]])
  d = landscape.random_direction(kernel, key=KEY)
  lengths = np.linalg.norm(np.asarray(d, np.float64), axis=0)
  np.testing.assert_allclose(lengths, [5 * size, size], rtol=1e-5)


STACKED = {
  'blocks': {
    'kernel': 10.0 ** jnp.arange(3)[:, None, None] * jnp.ones((3, 4, 2)),
    'bias': jnp.ones((3, 2)),
    'shift': jnp.ones((3, 2)),
  },
  'head': {'kernel': 2 * jnp.ones((2, 5)), 'bias': jnp.ones(5)},
}


@pytest.mark.parametrize(
  ('stacked', 'weights'),
  [
    ({'blocks': 1, 'head': 0}, None),
    ({'blocks': {'kernel': 1, 'bias': 1, 'shift': 1}, 'head': 0}, by_name('kernel')),
  ],
)
def test_filters_of_stacked_layers_are_those_of_each_layer(stacked, weights):
  """The kernels of the layers are 1, 10 and 100, in filters of 4; the head is of 2."""
  d = landscape.random_direction(STACKED, key=KEY, stacked=stacked, weights=weights)
  lengths = np.linalg.norm(d['blocks']['kernel'], axis=1)
  np.testing.assert_allclose(lengths, [[2, 2], [20, 20], [200, 200]], rtol=1e-5)
  np.testing.assert_allclose(
    np.linalg.norm(d['head']['kernel'], axis=0), [np.sqrt(8)] * 5, rtol=1e-5
  )
  for fixed in (d['blocks']['bias'], d['blocks']['shift'], d['head']['bias']):
    np.testing.assert_array_equal(fixed, 0)


def test_stacked_biases_have_no_filters_by_their_name():
  """Their layers are not known to be stacked: the filters go through all of them."""
  d = landscape.random_direction(STACKED, key=KEY)
  np.testing.assert_array_equal(d['blocks']['bias'], 0)
  lengths = np.linalg.norm(np.reshape(d['blocks']['kernel'], (12, 2)), axis=0)
  np.testing.assert_allclose(lengths, [2 * np.sqrt(1 + 100 + 1e4)] * 2, rtol=1e-5)


@pytest.mark.parametrize(('stacked', 'lengths'), [(0, [5.0]), (1, [3.0, 4.0])])
def test_a_weight_of_one_axis_is_one_filter(stacked, lengths):
  w = jnp.array([3.0, 4.0])
  d = landscape.random_direction(w, key=KEY, weights=True, stacked=stacked)
  got = np.linalg.norm(np.reshape(d, (len(lengths), -1)), axis=1)
  np.testing.assert_allclose(got, lengths, rtol=1e-5)


@pytest.mark.parametrize(
  ('options', 'error', 'message'),
  [
    ({'stacked': 2}, ValueError, r"2 leading axes.*\['head'\]\['bias'\].*\(5,\)"),
    ({'stacked': -1}, ValueError, 'Give a tree of ints'),
    ({'stacked': {'blocks': 1}}, ValueError, '`stacked` must be an int or have'),
    ({'stacked': {'blocks': 1.0, 'head': 0}}, TypeError, r"1.0 at \['blocks'\]"),
    ({'stacked': True}, TypeError, 'an int per leaf.*True'),
    ({'weights': {'blocks': True}}, ValueError, '`weights` must have the structure'),
    ({'weights': 1}, TypeError, '`weights` must hold one bool'),
  ],
)
def test_stacked_and_weights_that_do_not_fit(options, error, message):
  with pytest.raises(error, match=message):
    landscape.random_direction(STACKED, key=KEY, **options)


def test_a_model_that_can_be_called_is_a_tree_of_parameters():
  model = eqx.nn.Linear(2, 2, key=KEY)
  squares = lambda m: jnp.sum(m(jnp.ones(2)) ** 2)
  u = landscape.random_direction(model, key=KEY)
  np.testing.assert_array_equal(u.bias, 0)
  v = landscape.steepest_direction(squares, model)
  plane = landscape.loss_slice(squares, model, [u, v], [[0.0], [0.0, 0.1]])
  moved = jax.tree.map(lambda w, d: w + 0.1 * d, model, v)
  np.testing.assert_allclose(plane.values[0, 1], squares(moved), rtol=1e-5)
  marks = landscape.probes(squares, model, plane, rho=0.3)
  np.testing.assert_allclose(marks['SAM'], [0.0, 0.3], atol=1e-5)


CALLS = {
  'random': lambda f, p: landscape.random_direction(p, key=KEY),
  'steepest': lambda f, p: landscape.steepest_direction(f, p),
  'slice': lambda f, p: landscape.loss_slice(f, p, [p], [[0.0]]),
}


@pytest.mark.parametrize('name', CALLS)
@pytest.mark.parametrize('leaf', [jnp.tanh, 'relu', jnp.arange(3), True, jnp.array(1j)])
def test_a_leaf_that_is_no_real_array(name, leaf):
  message = r"leaf at \['b'\].*(eqx.partition\(model, eqx.is_inex|two real leaves)"
  with pytest.raises(TypeError, match=message):
    CALLS[name](lambda p: jnp.sum(p['w'] ** 2), {'w': jnp.ones((2, 2)), 'b': leaf})


@pytest.mark.slow
def test_healthy_calls_make_no_nan_and_no_inf_on_the_way():
  """Operation by operation, with a filter of zeros."""
  params = {'kernel': jnp.array([[0.0, 1.0], [0.0, 2.0]]), 'bias': jnp.zeros(2)}
  squares = lambda p: jnp.sum(p['kernel'] ** 2) + jnp.sum(p['bias'] ** 2)
  with jax.debug_nans(True), jax.debug_infs(True), jax.disable_jit():
    u = landscape.random_direction(params, key=KEY)
    v = landscape.steepest_direction(squares, params)
    plane = landscape.loss_slice(squares, params, [u, v], [[0.0, 1.0], [0.0]])
    marks = landscape.probes(squares, params, plane, rho=0.1)
  chex.assert_tree_all_finite((u, v, plane, marks))


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


ORDERS = {
  'ascending': [-1.0, 0.0, 1.0, 2.0],
  'descending': [2.0, 1.0, 0.0, -1.0],
  'unsorted': [0.0, 2.0, -1.0, 1.0],
}


def line_through(coordinates):
  """The loss ``(1 + x)²`` at steps x."""
  u = jnp.array([1.0])
  return landscape.loss_slice(lambda w: jnp.sum(w**2), u, [u], [coordinates])


@pytest.mark.parametrize('order', ORDERS)
def test_a_marker_is_as_high_as_the_curve(order):
  """Between the steps 1 and 2, of losses 4 and 9, a quarter of the way."""
  line = line_through(ORDERS[order])
  ax = landscape.mark(landscape.plot(line), line, {'SAM': [1.25], 'end': [2.0]})
  curve, *markers = ax.lines
  np.testing.assert_allclose(curve.get_data(), [[-1, 0, 1, 2], [0, 1, 4, 9]])
  places = {m.get_label(): [float(x[0]) for x in m.get_data()] for m in markers}
  assert places == {'parameters': [0, 1], 'SAM': [1.25, 5.25], 'end': [2, 9]}
  matplotlib.pyplot.close(ax.figure)


@pytest.mark.parametrize('order', ORDERS)
@pytest.mark.parametrize('at', [-1.01, 2.01, np.nan])
def test_a_marker_outside_the_line_has_no_height(order, at):
  line = line_through(ORDERS[order])
  ax = landscape.plot(line)
  with pytest.raises(ValueError, match=r"'SAM', at the step .* go from -1 to 2"):
    landscape.mark(ax, line, {'SAM': [at]})
  matplotlib.pyplot.close(ax.figure)


def test_a_marker_at_the_end_of_a_line_in_single_precision():
  """A step of 0.1 in float32 is beyond 0.1 in float64."""
  u = jnp.array([1.0])
  line = landscape.loss_slice(lambda w: jnp.sum(w), u, [u], [[0.0, 0.1]])
  ax = landscape.mark(landscape.plot(line), line, {'SAM': [0.1 * (1 + 1e-7)]})
  np.testing.assert_allclose(ax.lines[-1].get_ydata(), [1.1], rtol=1e-6)
  matplotlib.pyplot.close(ax.figure)


def test_parameters_outside_a_line_are_not_marked():
  line = line_through([1.0, 2.0])
  ax = landscape.mark(landscape.plot(line), line, {'SAM': [1.5]})
  assert [text.get_text() for text in ax.get_legend().get_texts()] == ['SAM']
  matplotlib.pyplot.close(ax.figure)


def test_a_plane_of_descending_steps_is_drawn_as_that_of_ascending_ones():
  bowl = lambda w: jnp.sum(w**2 * jnp.array([1.0, 2.0])) + w[0]
  u, v = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
  x, y = np.linspace(-2, 2, 5), np.linspace(-1, 1, 3)
  drawn = []
  for coordinates in ([x, y], [x[::-1], y[::-1]]):
    plane = landscape.loss_slice(bowl, jnp.zeros(2), [u, v], coordinates)
    ax = landscape.plot(plane)
    drawn.append([path.vertices for c in ax.collections for path in c.get_paths()])
    matplotlib.pyplot.close(ax.figure)
  for one, other in zip(*drawn, strict=True):
    np.testing.assert_array_equal(one, other)


def test_a_marker_of_the_wrong_number_of_coordinates():
  line = line_through([0.0, 1.0])
  ax = landscape.plot(line)
  with pytest.raises(ValueError, match=r"'SAM' must have one coordinate per direction"):
    landscape.mark(ax, line, {'SAM': [0.1, 0.2]})
  matplotlib.pyplot.close(ax.figure)


def test_probes_in_directions_of_unequal_length():
  """The gradient, (3, 4), in steps of 1e-20 and 1: neither is lost."""
  w = jnp.array([3.0, 4.0])
  squares = lambda w: jnp.sum(w**2) / 2
  directions = [jnp.array([1e-20, 0.0]), jnp.array([0.0, 1.0])]
  plane = landscape.loss_slice(squares, w, directions, [[0.0], [0.0]])
  marks = landscape.probes(squares, w, plane, rho=jnp.float32(1.0))
  np.testing.assert_allclose(marks['SAM'], [0.6e20, 0.8], rtol=1e-6)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'directions': [{'v': jnp.ones(2)}]}, r'`directions\[0\]` must be like `params`'),
    ({'directions': [{'w': jnp.ones(3)}]}, r'its shape is \(3,\), not \(2,\)'),
    ({'coordinates': [0.0]}, r'`coordinates\[0\]` must be a list of steps'),
    ({'coordinates': [[]]}, r'`coordinates\[0\]` must be a list of steps'),
    ({'chunk': 0}, '`chunk` must be 1 or more'),
  ],
)
def test_slices_that_do_not_fit(change, message):
  params = {'w': jnp.ones(2)}
  arguments = {'directions': [params], 'coordinates': [[0.0]], 'chunk': 1} | change
  with pytest.raises(ValueError, match=message):
    landscape.loss_slice(lambda p: jnp.sum(p['w']), params, **arguments)


@pytest.mark.parametrize('count', [0, 3])
def test_wrong_number_of_directions(count):
  with pytest.raises(ValueError, match='one or two directions'):
    landscape.loss_slice(network, PARAMS, [PARAMS] * count, [[0.0]] * count)
