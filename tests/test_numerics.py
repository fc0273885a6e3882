"""Numbers at their extremes: magnitudes, precisions, zeros, NaN and odd trees.

The truth is in float64, where the plain formulas neither overflow nor underflow for
all magnitudes of float32.
"""

import chex
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msam_optax import _numerics
from msam_optax import adaptive
from msam_optax import asam
from msam_optax import diagonal_fisher
from msam_optax import euclidean
from msam_optax import fisher_sam
from msam_optax import monge
from msam_optax import msam
from msam_optax import sam
from msam_optax import spaces


def everything(params):
  return jax.tree.map(lambda _: True, params)


# Each with what it is made of: α² over B, and B⁻¹ as a function of g and w.
METRICS = {
  'euclidean': (euclidean(), 0.0, lambda g, w: np.ones_like(g)),
  'adaptive': (
    adaptive(0.01, weights=everything),
    0.0,
    lambda g, w: (np.abs(w) + 0.01) ** 2,
  ),
  'diagonal_fisher': (diagonal_fisher(0.5), 0.0, lambda g, w: 1 / (1 + 0.5 * g**2)),
  'monge': (monge(), 1.0, lambda g, w: np.ones_like(g)),
  'monge over adaptive': (
    monge(0.3, adaptive(0.01, weights=everything)),
    0.09,
    lambda g, w: (np.abs(w) + 0.01) ** 2,
  ),
  'monge over diagonal_fisher': (
    monge(2.0, diagonal_fisher(0.5)),
    4.0,
    lambda g, w: 1 / (1 + 0.5 * g**2),
  ),
}
every_metric = pytest.mark.parametrize('name', METRICS)


def ascend(metric, grads, params=None):
  ascent, _ = metric.ascend(grads, metric.init(params), params)
  return ascent


def flat(tree):
  """All entries as one float64 vector, in the order of the leaves."""
  leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
  return np.concatenate([np.zeros(0), *leaves])


def flat_eps(tree):
  """The unit roundoff of each entry."""
  eps = lambda x: np.full(np.size(x), float(jnp.finfo(x.dtype).eps))
  return np.concatenate([np.zeros(0), *map(eps, jax.tree.leaves(tree))])


def flat_tiny(tree):
  """What each entry may be off by because its dtype ends there."""
  tiny = lambda x: np.full(
    np.size(x), max(float(jnp.finfo(x.dtype).tiny) * 1e-3, 2e-38)
  )
  return np.concatenate([np.zeros(0), *map(tiny, jax.tree.leaves(tree))])


def truth(name, grads, params):
  """Direction and slope by the formula of the paper, in float64."""
  _, alpha_squared, inverse = METRICS[name]
  g, w = flat(grads), flat(params)
  u = inverse(g, w) * g
  s = g @ u
  if s == 0:
    return np.zeros_like(g), 0.0
  factor = np.sqrt(1 + alpha_squared * s)
  return u / (np.sqrt(s) * factor), np.sqrt(s) / factor


# Random trees. Few shapes, so that JAX compiles few programs.

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
SHAPES = ((), (3,), (2, 3), (1, 2, 2), (2, 0))


class Leaf:
  """A gradient and its parameters, in NumPy; not a pytree."""

  def __init__(self, shape, dtype, magnitude, seed):
    rng = np.random.default_rng(seed)
    if dtype == jnp.float16:
      magnitude = np.clip(magnitude, -2, 2)
    grads = rng.uniform(-1, 1, shape) * 10.0**magnitude
    grads = np.where(rng.random(shape) < 0.2, 0.0, grads)
    self.grads = np.asarray(grads).astype(dtype)
    self.params = np.asarray(rng.normal(size=shape)).astype(dtype)


@st.composite
def pairs_of_trees(draw):
  """Gradients and params: nested dicts, lists and tuples, or one bare array.

  In most trees the leaves are of about one magnitude, so that all of them count.
  """
  common, wide = draw(st.integers(-28, 28)), draw(st.integers(0, 3)) == 0
  magnitudes = st.integers(-30, 30) if wide else st.integers(common - 2, common + 2)
  leaves = st.builds(
    Leaf,
    st.sampled_from(SHAPES),
    st.sampled_from(DTYPES),
    magnitudes,
    st.integers(0, 2**32 - 1),
  )
  tree = draw(
    st.recursive(
      leaves,
      lambda children: st.one_of(
        st.lists(children, min_size=1, max_size=4),
        st.lists(children, max_size=4).map(tuple),
        st.dictionaries(st.sampled_from('abcd'), children, min_size=2),
      ),
      max_leaves=6,
    )
  )
  take = lambda name: jax.tree.map(lambda leaf: jnp.asarray(getattr(leaf, name)), tree)
  return take('grads'), take('params')


some_examples = hypothesis.settings(
  max_examples=25,
  deadline=None,
  derandomize=True,
  database=None,
  suppress_health_check=list(hypothesis.HealthCheck),
)


@every_metric
@some_examples
@hypothesis.given(trees=pairs_of_trees())
def test_any_tree_of_any_magnitude(name, trees):
  grads, params = trees
  metric, alpha_squared, inverse = METRICS[name]

  direction, slope, _ = ascend(metric, grads, params)

  chex.assert_trees_all_equal_shapes_and_dtypes(direction, grads)
  chex.assert_type(slope, jnp.float32)
  chex.assert_shape(slope, ())
  chex.assert_tree_all_finite(direction)

  expected, expected_slope = truth(name, grads, params)
  g, w, d = flat(grads), flat(params), flat(direction)
  np.testing.assert_allclose(slope, expected_slope, rtol=2e-6)
  error = np.abs(d - expected)
  allowed = 4 * flat_eps(grads) * np.abs(expected) + flat_tiny(grads)
  assert np.all(error <= allowed)
  assert np.all(d[g == 0] == 0)
  length = np.sqrt(np.sum(d**2 / inverse(g, w)) + alpha_squared * (g @ d) ** 2)
  tolerance = 8 * flat_eps(grads).max(initial=0)
  np.testing.assert_allclose(length, np.any(g), rtol=tolerance)


@every_metric
@some_examples
@hypothesis.given(
  trees=pairs_of_trees(),
  poison=st.sampled_from([np.nan, np.inf, -np.inf]),
  place=st.integers(0, 100),
)
def test_one_entry_that_is_not_finite_stops_all(name, trees, poison, place):
  grads, params = trees
  values, structure = jax.tree.flatten(grads)
  places = [(i, j) for i, x in enumerate(values) for j in range(x.size)]
  hypothesis.assume(places)
  i, j = places[place % len(places)]
  leaf = np.array(values[i])
  leaf.ravel()[j] = poison
  values[i] = jnp.asarray(leaf)
  grads = jax.tree.unflatten(structure, values)

  direction, slope, _ = ascend(METRICS[name][0], grads, params)

  chex.assert_trees_all_equal_shapes_and_dtypes(direction, grads)
  assert not flat(direction).any()
  assert slope == 0


# Zero.

TREE = {'kernel': (2, 3), 'bias': (3,), 'scale': ()}


def filled(value, dtype=jnp.float32):
  return {name: jnp.full(shape, value, dtype) for name, shape in TREE.items()}


@pytest.mark.parametrize('dtype', DTYPES, ids=lambda dtype: dtype.__name__)
@every_metric
def test_zero_gradient_gives_zero(name, dtype):
  grads = filled(0.0, dtype)

  direction, slope, _ = ascend(METRICS[name][0], grads, filled(1.0, dtype))

  chex.assert_trees_all_equal(direction, grads)
  assert slope == 0


@every_metric
def test_derivatives_at_the_zero_gradient_are_zero(name):
  metric = METRICS[name][0]

  @jax.jit
  def derivatives(grads, params):
    _, pullback = jax.vjp(lambda g, w: ascend(metric, g, w)[:2], grads, params)
    by_slope = pullback((filled(0.0), jnp.float32(1.0)))
    by_direction = pullback((filled(1.0), jnp.float32(0.0)))
    return *by_slope, *by_direction

  for derivative in derivatives(filled(0.0), filled(1.0)):
    chex.assert_trees_all_equal(derivative, filled(0.0))


@every_metric
def test_derivatives_of_the_slope_where_parts_are_zero(name, x64):
  """The derivative of a norm is finite, and right, where one entry is zero."""
  metric = METRICS[name][0]
  w, g = jnp.array([1.0, -0.5, 2.0]), jnp.array([0.0, 3.0, -1.0])

  derivative = jax.jit(jax.grad(lambda g: ascend(metric, g, w).slope))(g)

  h = 1e-6
  expected = [
    (truth(name, g + h * e, w)[1] - truth(name, g - h * e, w)[1]) / (2 * h)
    for e in np.eye(3)
  ]
  np.testing.assert_allclose(derivative, expected, rtol=1e-8, atol=1e-9)


@every_metric
def test_poison_in_one_leaf_stops_the_others(name):
  for poison in (np.nan, np.inf):
    grads = filled(1.0) | {'scale': jnp.float32(poison)}
    direction, slope, _ = ascend(METRICS[name][0], grads, filled(1.0))
    chex.assert_trees_all_equal(direction, filled(0.0))
    assert slope == 0


# Magnitudes.


@pytest.mark.parametrize('magnitude', [1e-30, 1e-20, 1.0, 1e20, 1e30])
@every_metric
def test_gradients_of_all_magnitudes_in_float32(name, magnitude):
  rng = np.random.default_rng(0)
  draw = lambda scale: {
    key: jnp.asarray(scale * rng.normal(size=shape), jnp.float32)
    for key, shape in TREE.items()
  }
  grads, params = draw(magnitude), draw(1.0)

  direction, slope, _ = ascend(METRICS[name][0], grads, params)

  expected, expected_slope = truth(name, grads, params)
  np.testing.assert_allclose(flat(direction), expected, rtol=1e-6)
  np.testing.assert_allclose(slope, expected_slope, rtol=1e-6)


def test_monge_where_the_square_of_eq_9_overflows():
  """n²(1+n²) is beyond float32 from n = 4.3e9 on, δ is not."""
  g = jnp.array([3e10, 4e10])

  direction, slope, _ = ascend(monge(), g)

  np.testing.assert_allclose(direction, [0.6 / 5e10, 0.8 / 5e10], rtol=1e-6)
  np.testing.assert_allclose(slope, 1.0, rtol=1e-6)


@pytest.mark.parametrize('alpha', [1e10, 1e30, 3e38])
def test_huge_alpha_times_huge_gradient(alpha):
  direction, slope, _ = ascend(monge(alpha), jnp.full([4], 1e30))

  np.testing.assert_allclose(direction, np.zeros(4), atol=1e-37)
  np.testing.assert_allclose(slope, 1 / alpha, rtol=1e-6, atol=2e-38)


def test_huge_and_tiny_gradients_side_by_side():
  grads = {'huge': jnp.float32([3e30, 4e30]), 'tiny': jnp.full([3], 1e-30)}

  direction, slope, _ = ascend(euclidean(), grads)

  np.testing.assert_allclose(direction['huge'], [0.6, 0.8], rtol=1e-6)
  np.testing.assert_array_equal(direction['tiny'], np.zeros(3))
  np.testing.assert_allclose(slope, 5e30, rtol=1e-6)


# Precisions.


def test_norm_of_float16_gradients_does_not_overflow():
  """300² is beyond float16."""
  direction, slope, _ = ascend(euclidean(), jnp.full([10_000], 300.0, jnp.float16))

  np.testing.assert_allclose(slope, 30_000.0, rtol=1e-6)
  np.testing.assert_allclose(np.asarray(direction, np.float64), 0.01, rtol=1e-3)


def test_norm_of_float16_gradients_may_be_beyond_float16():
  direction, slope, _ = ascend(euclidean(), jnp.full([160_000], 300.0, jnp.float16))

  np.testing.assert_allclose(slope, 120_000.0, rtol=1e-6)
  np.testing.assert_allclose(np.asarray(direction, np.float64), 1 / 400, rtol=1e-3)


@pytest.mark.parametrize('dtype', DTYPES, ids=lambda dtype: dtype.__name__)
def test_norm_of_many_entries_is_summed_precisely(dtype):
  g = jnp.asarray(np.random.default_rng(0).normal(size=100_000), dtype)

  slope = ascend(euclidean(), g).slope

  np.testing.assert_allclose(slope, np.linalg.norm(flat(g)), rtol=1e-6)


@pytest.mark.parametrize('dtype', DTYPES, ids=lambda dtype: dtype.__name__)
def test_slope_is_float32(dtype):
  assert ascend(monge(), filled(1.0, dtype)).slope.dtype == jnp.float32


@every_metric
def test_leaves_of_different_dtypes(name):
  rng = np.random.default_rng(1)
  draw = lambda: {
    'a': jnp.asarray(rng.normal(size=(2, 3)), jnp.float16),
    'b': [jnp.asarray(rng.normal(size=4), jnp.bfloat16)],
    'c': (jnp.asarray(rng.normal(size=5), jnp.float32), jnp.float16(0.5)),
  }
  grads, params = draw(), draw()

  direction, slope, _ = ascend(METRICS[name][0], grads, params)

  expected, expected_slope = truth(name, grads, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(direction, grads)
  error = np.abs(flat(direction) - expected)
  assert np.all(error <= 4 * flat_eps(grads) * np.abs(expected))
  np.testing.assert_allclose(slope, expected_slope, rtol=1e-6)


@pytest.mark.parametrize('magnitude', [1e-150, 1.0, 1e150])
@every_metric
def test_float64_keeps_its_precision(name, magnitude, x64):
  rng = np.random.default_rng(2)
  grads = {
    key: jnp.asarray(magnitude * rng.normal(size=shape)) for key, shape in TREE.items()
  }
  params = {key: jnp.asarray(rng.normal(size=shape)) for key, shape in TREE.items()}

  direction, slope, _ = ascend(METRICS[name][0], grads, params)

  expected, expected_slope = truth(name, grads, params)
  chex.assert_trees_all_equal_dtypes(direction, grads)
  assert slope.dtype == jnp.float64
  np.testing.assert_allclose(flat(direction), expected, rtol=1e-12)
  np.testing.assert_allclose(slope, expected_slope, rtol=1e-12)


def test_float64_beside_float32(x64):
  grads = {'wide': jnp.full([2], 3.0), 'narrow': jnp.full([2], 4.0, jnp.float32)}

  direction, slope, _ = ascend(euclidean(), grads)

  chex.assert_trees_all_equal_dtypes(direction, grads)
  np.testing.assert_allclose(slope, np.sqrt(50), rtol=1e-12)
  np.testing.assert_allclose(direction['wide'], 3 / np.sqrt(50), rtol=1e-12)
  np.testing.assert_allclose(direction['narrow'], 4 / np.sqrt(50), rtol=1e-7)


# Odd trees.


@pytest.mark.parametrize(
  'grads',
  [{}, (), [], {'a': {}, 'b': [()], 'c': None}],
  ids=['dict', 'tuple', 'list', 'nested'],
)
@every_metric
def test_tree_without_leaves(name, grads):
  direction, slope, _ = ascend(METRICS[name][0], grads, grads)

  assert direction == grads
  assert slope == 0


@every_metric
def test_tree_of_empty_arrays(name):
  grads = {'a': jnp.zeros([0]), 'b': jnp.zeros([2, 0, 3], jnp.bfloat16)}

  direction, slope, _ = ascend(METRICS[name][0], grads, grads)

  chex.assert_trees_all_equal_shapes_and_dtypes(direction, grads)
  assert slope == 0


@pytest.mark.parametrize('g', [2.5, -2.5, 1e-30, -1e30])
def test_scalar_parameter(g):
  direction, slope, _ = ascend(euclidean(), jnp.float32(g))

  assert direction == np.sign(g)
  np.testing.assert_allclose(slope, abs(g), rtol=1e-6)


def test_numpy_arrays_are_as_good_as_arrays_of_jax():
  direction, slope, _ = ascend(monge(), {'w': np.float32([0.6, 0.8])})

  np.testing.assert_allclose(
    direction['w'], np.array([0.6, 0.8]) / np.sqrt(2), rtol=1e-6
  )
  np.testing.assert_allclose(slope, 1 / np.sqrt(2), rtol=1e-6)


@pytest.mark.parametrize('magnitude', [1e-30, 1e-20, 1.0])
@pytest.mark.parametrize('name', ['slope', 'direction'])
def test_derivative_where_squares_underflow(name, magnitude):
  """Of ``n/√(1+n²)`` and ``g₀/(n√(1+n²))`` at ``n = 5 magnitude``, in float64."""

  def of(g):
    ascent, _ = monge().ascend(g, optax.EmptyState(), None)
    return ascent.slope if name == 'slope' else ascent.direction[0]

  g = magnitude * np.array([3.0, 4.0])
  n = 5 * magnitude
  phi, phi_n = (1 + n**2) ** -0.5, -n * (1 + n**2) ** -1.5
  u = g / n
  if name == 'slope':
    exact = u * (1 + n**2) ** -1.5
  else:
    exact = phi / n * (np.array([1.0, 0.0]) - u * u[0]) + phi_n * u[0] * u
  with np.errstate(under='ignore'):
    derivative = jax.grad(of)(jnp.asarray(g, jnp.float32))
  np.testing.assert_allclose(derivative, exact, rtol=1e-5, atol=1e-37)


@pytest.mark.usefixtures('x64')
def test_tiny_float64_beside_float32():
  tree = {'a': jnp.full(2, 3e-60), 'b': jnp.zeros(2, jnp.float32)}
  ascent, _ = euclidean().ascend(tree, optax.EmptyState(), None)
  np.testing.assert_allclose(ascent.slope, 3e-60 * np.sqrt(2), rtol=1e-12)
  np.testing.assert_allclose(ascent.direction['a'], np.sqrt(0.5), rtol=1e-12)
  assert ascent.direction['b'].dtype == jnp.float32


def test_key_leaf_of_two_dimensions_passes_where_masked_out():
  keys = jax.random.split(jax.random.key(0), 4).reshape(2, 2)
  params = {'w': jnp.ones((2, 2)), 'keys': keys}
  grads = {'w': jnp.ones((2, 2)), 'keys': jnp.zeros((2, 2))}
  tx = asam(mask={'w': True, 'keys': False})
  _, state = tx.update(grads, tx.init(params), params, grad_fn=lambda p: grads)
  assert state.radius > 0


# The edges of float32 and float64, and what is known only when a program runs.


@pytest.mark.parametrize('wide', [False, True], ids=['float32', 'float64'])
@pytest.mark.parametrize('jitted', [False, True], ids=['eager', 'jit'])
def test_gradients_next_to_the_largest_number_keep_their_direction(wide, jitted, x64):
  """Where the reciprocal of the norm is no normal number."""
  del x64
  dtype, exponent = (jnp.float64, 1023) if wide else (jnp.float32, 127)
  finfo = jnp.finfo(dtype)
  call = jax.jit(spaces.normalize) if jitted else spaces.normalize
  sizes = [2.0**exponent, 2.0 ** (exponent - 1), 1.1 * 2.0 ** (exponent - 1)]
  for size in [*sizes, 4 * float(finfo.tiny)]:
    unit, norm = call(jnp.asarray([0.75 * size, -size], dtype))
    np.testing.assert_allclose(unit, [0.6, -0.8], rtol=4 * float(finfo.eps))
    np.testing.assert_allclose(norm, 1.25 * size, rtol=4 * float(finfo.eps))


@pytest.mark.parametrize('jitted', [False, True], ids=['eager', 'jit'])
def test_a_norm_that_is_no_number_any_more_gives_no_direction(jitted):
  """Four entries of 3e38 have the norm 6e38, beyond float32."""
  ascend_at = jax.jit(lambda g: ascend(euclidean(), g))
  ascent = (ascend_at if jitted else ascend_at.__wrapped__)(jnp.full(4, 3e38))
  np.testing.assert_array_equal(ascent.direction, np.zeros(4))
  assert ascent.slope == 0


@pytest.mark.parametrize('size', [1e-38, 1e-42, 1e-45])
@pytest.mark.parametrize('jitted', [False, True], ids=['eager', 'jit'])
def test_gradients_below_the_smallest_normal_number_give_no_nan(jitted, size):
  """Some processors take them for zero: no direction then, or the right one."""
  ascend_at = jax.jit(lambda g: ascend(euclidean(), g))
  g = jnp.asarray(np.array([size, 0.0], np.float32))
  ascent = (ascend_at if jitted else ascend_at.__wrapped__)(g)
  assert ascent.direction[0] in (0.0, 1.0)
  assert np.isfinite(ascent.slope)


@pytest.mark.parametrize('rho', [1e-25, 1e-30, 1e25, 1e30])
def test_the_radius_is_that_of_the_probe_at_any_size(rho):
  g, w = jnp.array([3.0, -4.0]), jnp.zeros(2)
  tx = sam(rho)
  _, state = jax.jit(lambda s: tx.update(g, s, w, grad_fn=lambda w: g))(tx.init(w))
  np.testing.assert_allclose(state.radius, rho, rtol=1e-6)


def test_the_radius_of_a_direction_that_is_tiny():
  """Monge's is as small as the gradient is large."""
  g, w = jnp.array([3e30, -4e30]), jnp.zeros(2)
  tx = msam(0.1)
  _, state = tx.update(g, tx.init(w), w, grad_fn=lambda w: g)
  np.testing.assert_allclose(state.radius, 0.1 / 5e30, rtol=1e-6)


@pytest.mark.parametrize('make', [sam, msam, asam], ids=['sam', 'msam', 'asam'])
def test_the_derivative_of_a_radius_of_zero_is_zero(make):
  """Where nothing moves: no gradient, or no perturbation."""
  tx, w = make(), jnp.ones((2, 2))

  def radius(g):
    return tx.update(g, tx.init(w), w, grad_fn=lambda w: w)[1].radius

  np.testing.assert_array_equal(jax.grad(radius)(jnp.zeros((2, 2))), np.zeros((2, 2)))


HYPERPARAMETERS = {
  'rho': lambda x: msam(rho=x),
  'rho, a schedule': lambda x: msam(rho=lambda count: x),
  'alpha': lambda x: msam(alpha=x),
  'alpha, a schedule': lambda x: msam(alpha=lambda count: x),
  'alpha over another base': lambda x: msam(alpha=x, base=adaptive()),
  'eta of asam': lambda x: asam(eta=x),
  'eta of fisher_sam': lambda x: fisher_sam(eta=x),
  'eta of a base': lambda x: msam(base=diagonal_fisher(eta=x)),
}


@pytest.mark.parametrize('bad', [np.nan, -0.1, np.inf])
@pytest.mark.parametrize('name', HYPERPARAMETERS)
def test_a_hyperparameter_that_goes_wrong_at_run_time_is_seen(name, bad):
  """As a schedule that leaves its range does: the update is NaN, and says so."""

  @jax.jit
  def step(x):
    tx, w = HYPERPARAMETERS[name](x), jnp.ones((2, 2))
    updates, state = tx.update(w, tx.init(w), w, grad_fn=lambda w: w)
    return updates, state.finite

  updates, finite = step(jnp.float32(bad))
  assert np.isnan(updates).all()
  assert not finite
  updates, finite = step(jnp.float32(0.1))
  assert np.isfinite(updates).all()
  assert finite


@pytest.mark.parametrize('eta', [0.0, 0.3])
def test_the_derivative_with_respect_to_eta(eta, x64):
  """Of the slope √Σ g²/(1+ηg²), also at 0: −½ Σ g⁴/(1+ηg²)² / slope."""
  del x64
  g = np.array([1.0, -2.0, 0.0])
  slope = lambda eta: ascend(diagonal_fisher(eta), jnp.asarray(g)).slope
  want = -0.5 * np.sum(g**4 / (1 + eta * g**2) ** 2)
  want /= np.sqrt(np.sum(g**2 / (1 + eta * g**2)))
  np.testing.assert_allclose(jax.grad(slope)(eta), want, rtol=1e-12)


@pytest.mark.parametrize('eta', [1e-30, 1.0, 1e10])
def test_fisher_of_huge_gradients_and_any_eta(eta):
  g = jnp.array([1e25, 1e-3, -1e15])
  ascent = jax.jit(lambda eta: ascend(diagonal_fisher(eta), g))(jnp.float32(eta))
  g = np.asarray(g, np.float64)
  u = g / (1 + np.float64(np.float32(eta)) * g**2)
  np.testing.assert_allclose(ascent.slope, np.sqrt(g @ u), rtol=1e-5)
  np.testing.assert_allclose(ascent.direction, u / np.sqrt(g @ u), rtol=1e-5)


def test_what_is_zero_where_all_is_well_is_nan_where_not():
  """Multiplied, added, or divided: some compilers lost 0/0 on the way."""
  for act in (
    lambda x, zero: x * zero,
    lambda x, zero: (x + x * zero) / x,
    lambda x, zero: jnp.where(zero == 0, x, zero),
  ):
    run = jax.jit(lambda x, good, act=act: act(x, _numerics.zero_if(good, jnp.float32)))
    assert np.isnan(run(jnp.float32(65536.0), jnp.array(False)))
    assert np.isfinite(run(jnp.float32(65536.0), jnp.array(True)))
