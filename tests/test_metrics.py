"""Metrics against dense solves in NumPy, closed forms and the laws they obey."""

from absl.testing import parameterized
import chex
import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msam_optax import adaptive
from msam_optax import diagonal_fisher
from msam_optax import euclidean
from msam_optax import monge

pytestmark = pytest.mark.usefixtures('x64')

MATRICES = {
  'dense': {'kernel': True, 'bias': False},
  'blocks': [True, (False,)],
  'empty': True,
}
CHOSEN = {
  'dense': {'kernel': False, 'bias': True},
  'blocks': [False, (True,)],
  'empty': True,
}
CHOSEN_BY_PREFIX = {'dense': True, 'blocks': [False, (True,)], 'empty': False}


def random_tree(seed):
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape))

  return {
    'dense': {'kernel': draw(3, 2), 'bias': draw(2)},
    'blocks': [draw(2, 1, 2), (draw(),)],
    'empty': draw(0, 3),
  }


def ascend(metric, grads, params=None):
  ascent, _ = metric.ascend(grads, metric.init(params), params)
  return ascent


def flat(tree):
  return np.asarray(ravel_pytree(tree)[0])


def spread(mask):
  """The mask, one bool for each of the parameters."""

  def fill(chosen, subtree):
    return jax.tree.map(lambda w: jnp.full(w.shape, chosen), subtree)

  return flat(jax.tree.map(fill, mask, random_tree(0)))


# The matrix G, written out, as a function of the flat gradient and parameters.


def identity(g, w):
  return np.eye(g.size)


def asam(eta, mask):
  def matrix(g, w):
    return np.diag(np.where(spread(mask), np.abs(w) + eta, 1.0) ** -2.0)

  return matrix


def fisher(eta):
  return lambda g, w: np.eye(g.size) + eta * np.diag(g * g)


def plus_outer(matrix, alpha_squared):
  return lambda g, w: matrix(g, w) + alpha_squared * np.outer(g, g)


CASES = {
  'euclidean': (euclidean(), identity),
  'adaptive': (adaptive(), asam(0.01, MATRICES)),
  'adaptive, eta 0': (adaptive(0.0), asam(0.0, MATRICES)),
  'adaptive, weights a tree': (adaptive(0.3, weights=CHOSEN), asam(0.3, CHOSEN)),
  'adaptive, weights a prefix': (
    adaptive(0.1, weights=CHOSEN_BY_PREFIX),
    asam(0.1, CHOSEN_BY_PREFIX),
  ),
  'adaptive, weights a function': (
    adaptive(0.1, weights=lambda params: CHOSEN),
    asam(0.1, CHOSEN),
  ),
  'diagonal_fisher': (diagonal_fisher(), fisher(1.0)),
  'diagonal_fisher, eta 0.3': (diagonal_fisher(0.3), fisher(0.3)),
  'monge': (monge(), plus_outer(identity, 1.0)),
  'monge, alpha 0.3': (monge(0.3), plus_outer(identity, 0.09)),
  'monge over adaptive': (
    monge(2.0, adaptive()),
    plus_outer(asam(0.01, MATRICES), 4.0),
  ),
  'monge over adaptive, eta 0': (
    monge(0.7, adaptive(0.0, weights=CHOSEN)),
    plus_outer(asam(0.0, CHOSEN), 0.49),
  ),
  'monge over diagonal_fisher': (
    monge(1.5, diagonal_fisher(0.2)),
    plus_outer(fisher(0.2), 2.25),
  ),
  'monge over monge': (
    monge(0.5, monge(1.2)),
    plus_outer(identity, 0.25 + 1.44),
  ),
  'monge over monge over adaptive': (
    monge(0.5, monge(1.2, adaptive(0.1))),
    plus_outer(asam(0.1, MATRICES), 0.25 + 1.44),
  ),
}
every_metric = pytest.mark.parametrize(('metric', 'matrix'), CASES.values(), ids=CASES)


# Dense truth.


@pytest.mark.parametrize('seed', [1, 2])
@every_metric
def test_direction_and_slope_equal_dense_solve(metric, matrix, seed):
  grads, params = random_tree(seed), random_tree(seed + 10)
  g, w, rho = flat(grads), flat(params), 0.05

  direction, slope, _ = ascend(metric, grads, params)

  chex.assert_trees_all_equal_shapes_and_dtypes(direction, grads)
  chex.assert_shape(slope, ())
  assert slope.dtype == jnp.float64
  u = np.linalg.solve(matrix(g, w), g)
  np.testing.assert_allclose(
    rho * flat(direction), rho * u / np.sqrt(g @ u), rtol=1e-11
  )
  np.testing.assert_allclose(slope, np.sqrt(g @ u), rtol=1e-12)


@every_metric
def test_direction_has_unit_length_and_slope_is_its_rise(metric, matrix):
  grads, params = random_tree(3), random_tree(4)
  g, w, rho = flat(grads), flat(params), 0.05

  direction, slope, _ = ascend(metric, grads, params)

  delta = rho * flat(direction)
  np.testing.assert_allclose(delta @ matrix(g, w) @ delta, rho**2, rtol=1e-12)
  np.testing.assert_allclose(slope, g @ flat(direction), rtol=1e-12)


@every_metric
def test_no_direction_of_unit_length_rises_more(metric, matrix):
  grads, params = random_tree(5), random_tree(6)
  g, G = flat(grads), matrix(flat(grads), flat(params))
  others = np.random.default_rng(0).normal(size=(1000, g.size))
  others /= np.sqrt(np.einsum('ki,ij,kj->k', others, G, others))[:, None]

  direction, *_ = ascend(metric, grads, params)

  # Among others those that are almost the best one, too.
  near = flat(direction) + 1e-3 * others
  near /= np.sqrt(np.einsum('ki,ij,kj->k', near, G, near))[:, None]
  best = g @ flat(direction)
  assert np.max(others @ g) < best
  assert np.max(near @ g) < best


@every_metric
def test_slope_is_the_rise_of_the_loss_per_radius(metric, matrix):
  del matrix
  params = random_tree(7)
  w, unravel = ravel_pytree(params)

  def loss(w):
    return jnp.sum(jnp.sin(w) * jnp.arange(1.0, w.size + 1)) + jnp.prod(w[:3])

  direction, slope, _ = ascend(metric, unravel(jax.grad(loss)(w)), params)

  h, d = 1e-5, ravel_pytree(direction)[0]
  rise = (loss(w + h * d) - loss(w - h * d)) / (2 * h)
  np.testing.assert_allclose(slope, rise, rtol=1e-6)


# Closed forms.


def test_euclidean_is_the_perturbation_of_optax_sam():
  """SAM's adversary in Optax is the normalised gradient."""
  grads, params = random_tree(8), random_tree(9)
  normalize = optax.contrib.normalize()
  expected, _ = normalize.update(grads, normalize.init(params), params)

  direction, *_ = ascend(euclidean(), grads, params)

  chex.assert_trees_all_close(direction, expected, rtol=1e-12)


def test_adaptive_divides_by_the_norm_of_one_power_of_t():
  # T = (3, 1/2) and g = (1, 8): T²g/‖Tg‖ = (9, 2)/5.
  w, g = jnp.array([[3.0, -0.5]]), jnp.array([[1.0, 8.0]])

  direction, slope, _ = ascend(adaptive(eta=0.0), g, w)

  np.testing.assert_allclose(direction, [[9 / 5, 2 / 5]], rtol=1e-15)
  np.testing.assert_allclose(slope, 5.0, rtol=1e-15)


def test_adaptive_leaves_biases_and_scales_alone_by_default():
  """T is 1 for leaves of less than two dimensions, so at w = 0 they move."""
  params = {'kernel': jnp.zeros([2, 2]), 'bias': jnp.zeros(2), 'scale': jnp.zeros([])}
  grads = {
    'kernel': jnp.ones([2, 2]),
    'bias': jnp.array([1.0, 2.0]),
    'scale': jnp.array(2.0),
  }

  direction, slope, _ = ascend(adaptive(eta=0.0), grads, params)

  np.testing.assert_array_equal(direction['kernel'], np.zeros([2, 2]))
  np.testing.assert_allclose(direction['bias'], [1 / 3, 2 / 3], rtol=1e-15)
  np.testing.assert_allclose(direction['scale'], 2 / 3, rtol=1e-15)
  np.testing.assert_allclose(slope, 3.0, rtol=1e-15)


def test_diagonal_fisher_is_not_of_euclidean_unit_length():
  # u = (1/2, 2/5), ⟨g, u⟩ = 13/10.
  direction, slope, _ = ascend(diagonal_fisher(eta=1.0), jnp.array([1.0, 2.0]))

  np.testing.assert_allclose(direction, np.array([0.5, 0.4]) / np.sqrt(1.3), rtol=1e-14)
  np.testing.assert_allclose(slope, np.sqrt(1.3), rtol=1e-14)
  assert abs(np.linalg.norm(direction) - 1) > 0.1


# Limits and laws.


@pytest.mark.parametrize('alpha', [0.3, 1.0, 4.0])
def test_diagonal_fisher_is_the_diagonal_of_monge(alpha):
  grads = random_tree(22)
  g = flat(grads)
  diagonal = np.diag(np.diag(np.eye(g.size) + alpha**2 * np.outer(g, g)))
  u = np.linalg.solve(diagonal, g)

  direction, slope, _ = ascend(diagonal_fisher(eta=alpha**2), grads)

  np.testing.assert_allclose(flat(direction), u / np.sqrt(g @ u), rtol=1e-12)
  np.testing.assert_allclose(slope, np.sqrt(g @ u), rtol=1e-12)
  # Of a single parameter the diagonal is everything.
  one = jnp.array(1.7)
  chex.assert_trees_all_close(
    ascend(diagonal_fisher(alpha**2), one)[:2],
    ascend(monge(alpha), one)[:2],
    rtol=1e-14,
  )


# Alpha: numbers, arrays, traced values, schedules.


@pytest.mark.parametrize(
  'hyperparameter', ['alpha', 'eta of adaptive', 'eta of fisher']
)
def test_hyperparameters_may_be_traced_and_differentiated(hyperparameter):
  make = {
    'alpha': monge,
    'eta of adaptive': lambda eta: adaptive(eta, weights=lambda params: True),
    'eta of fisher': diagonal_fisher,
  }[hyperparameter]
  w, g = jnp.array([1.0, -3.0]), jnp.array([0.8, 1.5])

  slope = jax.jit(lambda value: ascend(make(value), g, w).slope)

  def expected(value):
    a, b = np.asarray(g, np.float64), np.abs(w)
    return {
      'alpha': np.linalg.norm(a) / np.sqrt(1 + value**2 * (a @ a)),
      'eta of adaptive': np.linalg.norm((b + value) * a),
      'eta of fisher': np.sqrt(np.sum(a**2 / (1 + value * a**2))),
    }[hyperparameter]

  h = 1e-6
  slopes = (expected(0.5 + h) - expected(0.5 - h)) / (2 * h)
  np.testing.assert_allclose(slope(0.5), expected(0.5), rtol=1e-12)
  np.testing.assert_allclose(jax.grad(slope)(0.5), slopes, rtol=1e-8)


@pytest.mark.parametrize('metric', [m for m, _ in CASES.values()], ids=CASES)
def test_metric_with_fixed_numbers_has_no_state(metric):
  params = random_tree(0)
  state = metric.init(params)

  _, new_state = metric.ascend(random_tree(1), state, params)

  assert not jax.tree.leaves(state)
  chex.assert_trees_all_equal_structs(state, new_state)


# What is refused, and how.


@pytest.mark.parametrize(
  ('value', 'error', 'message'),
  [
    (-1.0, ValueError, 'finite and >= 0, got -1.0'),
    (-1, ValueError, 'finite and >= 0, got -1'),
    (float('nan'), ValueError, 'finite and >= 0, got nan'),
    (float('inf'), ValueError, 'finite and >= 0, got inf'),
    (np.float32('-inf'), ValueError, 'finite and >= 0, got .*-inf'),
    (np.array(-2.0), ValueError, r'finite and >= 0, got .*-2\.'),
    ([1.0, 2.0], ValueError, r'must be a scalar, got shape \(2,\)'),
    (np.ones((1, 1)), ValueError, r'must be a scalar, got shape \(1, 1\)'),
    ('much', TypeError, "must be a real number.* got 'much'"),
    (1j, TypeError, 'must be a real number.* got 1j'),
    ({'a': 1.0}, TypeError, r"must be a real number.* got \{'a': 1\.0\}"),
  ],
  ids=[
    '-1.0',
    '-1',
    'nan',
    'inf',
    '-inf',
    'array',
    'list',
    'matrix',
    'str',
    'complex',
    'dict',
  ],
)
@pytest.mark.parametrize(
  ('make', 'name'),
  [(monge, 'alpha'), (adaptive, 'eta'), (diagonal_fisher, 'eta')],
  ids=['monge', 'adaptive', 'diagonal_fisher'],
)
def test_hyperparameter_is_refused_with_its_name_and_value(
  make, name, value, error, message
):
  with pytest.raises(error, match=f'`{name}` .*{message}'):
    make(value)


@pytest.mark.parametrize(
  'metric', [adaptive(), monge(1.0, adaptive())], ids=['bare', 'in monge']
)
def test_adaptive_needs_the_params(metric):
  with pytest.raises(ValueError, match=r'pass them.*update\(grads, state, params\)'):
    ascend(metric, jnp.ones([2, 2]), None)


def test_weights_that_do_not_fit_are_refused():
  params = {'kernel': jnp.ones([2, 2]), 'bias': jnp.ones(2)}
  with pytest.raises(ValueError, match='`weights` must have the structure'):
    ascend(adaptive(weights={'kernel': True}), params, params)
  with pytest.raises(
    TypeError, match=r"`weights` must hold one bool.*got 1.0 at \['bias'\]"
  ):
    ascend(adaptive(weights={'kernel': True, 'bias': 1.0}), params, params)


# Compiled or not, on whatever device.


IN_ALL_VARIANTS = (
  'euclidean',
  'adaptive, weights a prefix',
  'diagonal_fisher',
  'monge',
  'monge over adaptive',
)


class VariantsTest(chex.TestCase):
  """One result in every way that chex knows to call a function."""

  @chex.all_variants
  @parameterized.named_parameters(*((name, *CASES[name]) for name in IN_ALL_VARIANTS))
  def test_equals_dense_solve(self, metric, matrix):
    grads, params = random_tree(25), random_tree(26)

    @self.variant
    def run(grads, params):
      return ascend(metric, grads, params)

    # Chex says that a variant never returns.
    direction, slope, _ = run(grads, params)  # pyright: ignore[reportGeneralTypeIssues]

    g, w = flat(grads), flat(params)
    u = np.linalg.solve(matrix(g, w), g)
    np.testing.assert_allclose(flat(direction), u / np.sqrt(g @ u), rtol=1e-11)
    np.testing.assert_allclose(slope, np.sqrt(g @ u), rtol=1e-12)
