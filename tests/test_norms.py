"""The max norm and the spectral norm, against singular values and closed forms."""

import chex
import hypothesis
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize

from msam_optax import adaptive
from msam_optax import Ascent
from msam_optax import by_name
from msam_optax import euclidean
from msam_optax import LOCAL
from msam_optax import max_norm
from msam_optax import Metric
from msam_optax import monge
from msam_optax import msam
from msam_optax import per_leaf
from msam_optax import spectral
from tests import problems


def random_tree(seed, dtype=np.float64):
  """Two matrices, and leaves that are none."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(dtype)
  return {
    'tall': {'kernel': draw(4, 3), 'bias': draw(3)},
    'wide': {'kernel': draw(2, 5), 'bias': draw(2, 2)},
    'conv': draw(2, 2, 3),
    'temperature': draw(),
  }


MATRICES = [('tall', 'kernel'), ('wide', 'kernel')]
OTHERS = [('tall', 'bias'), ('wide', 'bias'), ('conv',), ('temperature',)]


def at(tree, path):
  for key in path:
    tree = tree[key]
  return np.asarray(tree, np.float64)


def ascend(metric, grads, params=None):
  grads, params = jax.tree.map(jnp.asarray, (grads, params))
  ascent, _ = metric.ascend(grads, metric.init(params), params)
  return ascent


def inner(a, b):
  a, b = (
    np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])
    for tree in (a, b)
  )
  return a @ b


def singular_values(x):
  return np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)


def with_spectrum(values, shape, seed=0):
  """A matrix with these singular values, and its ``UVᵀ``."""
  rng = np.random.default_rng(seed)
  rank = len(values)
  U = np.linalg.qr(rng.normal(size=(shape[0], rank)))[0]
  V = np.linalg.qr(rng.normal(size=(shape[1], rank)))[0]
  return U * values @ V.T, U @ V.T


def largest_entry(tree):
  return max(np.max(np.abs(x)) for x in jax.tree.leaves(tree))


def largest_norm(tree):
  """Of each matrix the largest singular value, and the length of all else."""
  others = np.concatenate([at(tree, path).ravel() for path in OTHERS])
  largest = [singular_values(at(tree, path))[0] for path in MATRICES]
  return max(np.linalg.norm(others), *largest)


NORMS = {
  'max_norm': (max_norm(), largest_entry),
  'spectral': (spectral(), largest_norm),
}
both = pytest.mark.parametrize('metric', [m for m, _ in NORMS.values()], ids=NORMS)


# Closed forms.


def test_max_norm_is_the_sign_and_the_sum_of_magnitudes(x64):
  grads = random_tree(0)
  grads['conv'][0, 1] = 0.0

  direction, slope, _ = ascend(max_norm(), grads)

  chex.assert_trees_all_equal(direction, jax.tree.map(np.sign, grads))
  total = sum(np.sum(np.abs(g)) for g in jax.tree.leaves(grads))
  np.testing.assert_allclose(slope, total, rtol=1e-14)


def test_spectral_is_the_polar_factor_and_the_nuclear_norm(x64):
  grads = random_tree(1)

  direction, slope, _ = ascend(spectral(), grads)

  chex.assert_trees_all_equal_shapes_and_dtypes(direction, grads)
  total = 0.0
  for path in MATRICES:
    U, s, Vt = np.linalg.svd(at(grads, path), full_matrices=False)
    np.testing.assert_allclose(at(direction, path), U @ Vt, atol=1e-9)
    total += np.sum(s)
  norm = np.sqrt(sum(np.sum(at(grads, path) ** 2) for path in OTHERS))
  for path in OTHERS:
    np.testing.assert_allclose(at(direction, path), at(grads, path) / norm, rtol=1e-12)
  np.testing.assert_allclose(slope, total + norm, rtol=1e-9)


@pytest.mark.slow
def test_a_vector_as_a_matrix_is_euclidean(x64):
  for shape in ((1, 5), (5, 1), (1, 1)):
    g = np.random.default_rng(2).normal(size=shape)
    got = ascend(spectral(matrices=True), g)
    chex.assert_trees_all_close(got[:2], ascend(euclidean(), g)[:2], rtol=1e-9)


def test_empty_matrices_have_no_part():
  grads = {'none': np.zeros((0, 3), np.float32), 'w': np.eye(2, dtype=np.float32)}
  for metric in (max_norm(), spectral()):
    direction, slope, _ = ascend(metric, grads)
    assert direction['none'].shape == (0, 3)
    np.testing.assert_allclose(direction['w'], np.eye(2), atol=1e-6)
    np.testing.assert_allclose(slope, 2.0, rtol=1e-6)


# Of what singular values remain.


@pytest.mark.parametrize('shape', [(24, 24), (24, 60), (60, 24)], ids=str)
def test_singular_values_above_a_thousandth_become_one(shape):
  values = np.geomspace(1.0, 1.7e-3, 24)
  assert values[-1] > 1e-3 * np.linalg.norm(values)
  g, polar = with_spectrum(values, shape)

  direction, slope, _ = ascend(spectral(matrices=True), g.astype(np.float32))

  np.testing.assert_allclose(singular_values(direction), 1.0, atol=1e-4)
  np.testing.assert_allclose(direction, polar, atol=2e-4)
  np.testing.assert_allclose(slope, np.sum(values), rtol=1e-5)


@pytest.mark.slow
def test_small_singular_values_are_enlarged_as_documented():
  values = np.array([1.0, 1e-4, 1e-5, 1e-6])
  g, _ = with_spectrum(values, (6, 5))

  direction, slope, _ = ascend(spectral(matrices=True), g.astype(np.float32))

  got = singular_values(direction)
  np.testing.assert_allclose(got[0], 1.0, atol=1e-6)
  np.testing.assert_allclose(got[2:4], 3200 * values[2:], rtol=0.05)
  assert got[2] < got[1] <= 3200 * values[1]
  np.testing.assert_allclose(slope, inner(g, direction), rtol=1e-6)
  assert np.sum(values) - np.sum(values[1:]) <= slope <= np.sum(values)


@pytest.mark.parametrize('rank', [1, 3])
def test_low_rank_has_a_direction_of_low_rank(rank):
  values = np.linspace(2.0, 1.0, rank)
  g, polar = with_spectrum(values, (12, 8))

  direction, slope, _ = ascend(spectral(matrices=True), g.astype(np.float32))

  np.testing.assert_allclose(direction, polar, atol=1e-3)
  assert np.all(singular_values(direction)[rank:] < 1e-3)
  np.testing.assert_allclose(slope, np.sum(values), rtol=1e-5)


# Laws for all inputs.

some_examples = hypothesis.settings(
  max_examples=25, deadline=None, derandomize=True, database=None
)
numbers = st.floats(-1.0, 1.0, width=32, allow_subnormal=False)
few_shapes = st.sampled_from([(2, 3), (4, 4), (3, 1)])
some_matrices = few_shapes.flatmap(
  lambda shape: hnp.arrays(np.float32, shape, elements=numbers)
)
some_vectors = hnp.arrays(np.float32, 3, elements=numbers)
# Of the smallest and the largest no square is a number in float32.
sizes = st.sampled_from([1e-30, 1e-10, 1.0, 1e10, 1e30])
compiled = {
  name: jax.jit(lambda g, metric=metric: metric.ascend(g, (), None)[0])
  for name, (metric, _) in NORMS.items()
}


@some_examples
@hypothesis.given(g=some_matrices, bias=some_vectors, size=sizes)
def test_any_gradient_has_a_direction_of_unit_length_that_rises_by_the_slope(
  g, bias, size
):
  # What is below a normal number at this size is a zero to the processor.
  g, bias = (np.where(np.abs(x) < 1e-4, 0, x) for x in (g, bias))
  grads = {'w': g * np.float32(size), 'b': bias * np.float32(size)}
  wide = jax.tree.map(np.float64, grads)
  values = singular_values(g) * size

  direction, slope, _ = compiled['spectral'](grads)

  length = singular_values(direction['w']).max()
  np.testing.assert_allclose(length, float(np.any(g)), atol=1e-5)
  length = np.linalg.norm(direction['b'])
  np.testing.assert_allclose(length, float(np.any(bias)), atol=1e-5)
  np.testing.assert_allclose(slope, inner(wide, direction), rtol=1e-5)
  dual = np.sum(values) + np.linalg.norm(wide['b'])
  small = np.sum(values[values < 1e-3 * np.linalg.norm(values)])
  assert (dual - small) * (1 - 2e-4) <= slope <= dual * (1 + 1e-5)

  direction, slope, _ = compiled['max_norm'](grads)

  chex.assert_trees_all_equal(direction, jax.tree.map(np.sign, grads))
  total = sum(np.sum(np.abs(x)) for x in jax.tree.leaves(wide))
  np.testing.assert_allclose(slope, total, rtol=1e-6)


@pytest.mark.parametrize(('metric', 'length'), NORMS.values(), ids=NORMS)
def test_no_step_of_the_same_length_rises_more(metric, length, x64):
  """``⟨g, δ⟩ ≤ slope ‖δ‖`` for all δ, with equality along the direction alone."""
  grads, rng = random_tree(3), np.random.default_rng(0)
  direction, slope, _ = ascend(metric, grads)

  np.testing.assert_allclose(length(direction), 1.0, rtol=1e-9)
  np.testing.assert_allclose(inner(grads, direction), slope, rtol=1e-9)
  for width in (1e-3, 0.1, 10.0):
    for _ in range(50):
      delta = jax.tree.map(
        lambda d: np.asarray(d) + width * rng.normal(size=d.shape), direction
      )
      assert inner(grads, delta) < slope * length(delta)


@both
def test_the_slope_has_the_direction_as_its_derivative(metric, x64):
  """True of any dual norm: the maximiser does not change to first order."""
  grads = jax.tree.map(jnp.asarray, random_tree(4))

  derivative = jax.jit(jax.grad(lambda g: metric.ascend(g, (), None)[0].slope))(grads)

  direction, *_ = ascend(metric, grads)
  chex.assert_trees_all_close(derivative, direction, rtol=1e-6, atol=1e-7)


# The problem that Monge solves, solved numerically.


def maximize(rise, constraint, size, *, bounds=None):
  """The best of SLSQP's results from several starts.

  Args:
    rise: ``x -> ⟨g, δ⟩``, a function of JAX.
    constraint: ``x -> array``, >= 0 where ``x`` is allowed.
    size: how many numbers ``x`` has.
    bounds: of each of them.

  Returns:
    ``x``, an array.
  """
  rng, results = np.random.default_rng(0), []
  descent = jax.jit(jax.value_and_grad(lambda x: -rise(x)))
  allowed, slopes = jax.jit(constraint), jax.jit(jax.jacfwd(constraint))
  for _ in range(8):
    result = optimize.minimize(
      lambda x: tuple(map(np.asarray, descent(x))),
      rng.normal(size=size) * 0.3,
      jac=True,
      method='SLSQP',
      bounds=bounds,
      constraints={'type': 'ineq', 'fun': allowed, 'jac': slopes},
      options={'maxiter': 200, 'ftol': 1e-13},
    )
    if np.all(allowed(result.x) > -1e-9):
      results.append(result)
  return min(results, key=lambda result: result.fun).x


RHO = 0.7
alphas = pytest.mark.parametrize('alpha', [0.3, 1.0])


@alphas
def test_constrained_maximum_over_the_euclidean_norm(alpha, x64):
  g = np.random.default_rng(5).normal(size=4)

  delta = maximize(lambda x: g @ x, lambda x: RHO**2 - x @ x - (alpha * g @ x) ** 2, 4)

  got = RHO * ascend(monge(alpha, euclidean()), g).direction
  np.testing.assert_allclose(got, delta, atol=1e-5)
  np.testing.assert_allclose(g @ got, g @ delta, rtol=1e-8)


@alphas
def test_constrained_maximum_over_the_max_norm(alpha, x64):
  g = np.random.default_rng(6).normal(size=4)

  # With smooth constraints: the largest |δᵢ| is at most what all are.
  delta = maximize(lambda x: g @ x, lambda x: RHO**2 - x**2 - (alpha * g @ x) ** 2, 4)

  got = RHO * ascend(monge(alpha, max_norm()), g).direction
  np.testing.assert_allclose(got, delta, atol=1e-5)
  np.testing.assert_allclose(g @ got, g @ delta, rtol=1e-8)


@pytest.mark.slow
@alphas
def test_constrained_maximum_over_the_spectral_norm(alpha, x64):
  """A matrix and a vector, each of any length up to the same one."""
  rng = np.random.default_rng(7)
  grads = {'w': rng.normal(size=(2, 3)), 'b': rng.normal(size=2)}

  def rotation(angle, i, j, size):
    c, s = jnp.cos(angle), jnp.sin(angle)
    R = jnp.eye(size).at[i, i].set(c).at[j, j].set(c)
    return R.at[i, j].set(-s).at[j, i].set(s)

  def step(x):
    """All steps of length up to ``r``: a sine is a singular value divided by it."""
    r, sines, (a, b, c, d, e) = x[0], jnp.sin(x[1:4]), x[4:]
    U = rotation(a, 0, 1, 2)
    V = rotation(b, 0, 1, 3) @ rotation(c, 1, 2, 3) @ rotation(d, 0, 1, 3)
    heading = jnp.stack([jnp.cos(e), jnp.sin(e)])
    return {'w': r * U @ jnp.diag(sines[:2]) @ V[:2], 'b': r * sines[2] * heading}

  def rise(x):
    delta = step(x)
    return jnp.sum(grads['w'] * delta['w']) + grads['b'] @ delta['b']

  x = maximize(
    rise,
    lambda x: RHO**2 - x[0] ** 2 - (alpha * rise(x)) ** 2,
    9,
    bounds=[(0.0, RHO)] + [(None, None)] * 8,
  )

  direction, *_ = ascend(monge(alpha, spectral()), grads)
  got = jax.tree.map(lambda d: RHO * np.asarray(d), direction)
  np.testing.assert_allclose(inner(grads, got), rise(x), rtol=1e-7)
  chex.assert_trees_all_close(got, step(x), atol=1e-4)


# Dtypes, magnitudes, zero and what is not finite.


@pytest.mark.parametrize('size', [1e-30, 1e30])
@both
def test_scale_of_the_gradient(metric, size):
  grads = random_tree(8, np.float32)
  scaled = jax.tree.map(lambda g: g * np.float32(size), grads)

  got, want = ascend(metric, scaled), ascend(metric, grads)

  chex.assert_trees_all_close(got.direction, want.direction, atol=1e-6)
  np.testing.assert_allclose(got.slope, np.float32(size) * want.slope, rtol=1e-6)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.float32], ids=str)
@pytest.mark.parametrize(('metric', 'length'), NORMS.values(), ids=NORMS)
def test_directions_have_the_dtypes_of_the_gradients(metric, length, dtype):
  grads = jax.tree.map(lambda g: jnp.asarray(g, dtype), random_tree(9))
  grads['tall']['bias'] = jnp.asarray(grads['tall']['bias'], jnp.float32)

  direction, slope, _ = jax.jit(lambda g: metric.ascend(g, (), None)[0])(grads)

  chex.assert_trees_all_equal_shapes_and_dtypes(direction, grads)
  assert slope.dtype == jnp.float32
  eps = float(jnp.finfo(dtype).eps)
  np.testing.assert_allclose(length(direction), 1.0, atol=4 * eps)
  np.testing.assert_allclose(inner(grads, direction), slope, rtol=4 * eps)


@both
def test_zero_gradient_has_no_direction_and_no_derivative(metric):
  zeros = jax.tree.map(jnp.zeros_like, random_tree(0, np.float32))

  @jax.jit
  def run(grads):
    ascent, pullback = jax.vjp(lambda g: metric.ascend(g, (), None)[0], grads)
    back = [
      pullback(Ascent(jax.tree.map(jnp.ones_like, grads), jnp.float32(0.0))),
      pullback(Ascent(grads, jnp.float32(1.0))),
    ]
    return ascent, back

  ascent, back = run(zeros)
  assert ascent.slope == 0
  for tree in (ascent.direction, *(tree for (tree,) in back)):
    chex.assert_trees_all_equal(tree, zeros)


def test_a_zero_matrix_stays_where_others_move():
  grads = {'w': jnp.zeros((2, 3)), 'v': jnp.eye(2), 'b': jnp.array([3.0, 4.0])}

  direction, slope, _ = ascend(spectral(), grads)

  want = {'w': np.zeros((2, 3)), 'v': np.eye(2), 'b': np.array([0.6, 0.8])}
  chex.assert_trees_all_close(direction, want, atol=1e-6)
  np.testing.assert_allclose(slope, 7.0, rtol=1e-6)


@pytest.mark.parametrize('poison', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('path', [MATRICES[0], OTHERS[0]], ids=['matrix', 'other'])
@both
def test_one_entry_that_is_not_finite_stops_all(metric, path, poison):
  grads = random_tree(10, np.float32)
  leaf = grads
  for key in path:
    leaf = leaf[key]
  leaf.flat[1] = poison

  direction, slope, _ = ascend(metric, grads)

  chex.assert_trees_all_equal(direction, jax.tree.map(np.zeros_like, grads))
  assert slope == 0


@pytest.mark.parametrize(
  ('w', 'b'),
  [(3e38, 1.0), (1.0, 3e38), (3e38, 3e38), (2e38, 1.0)],
  ids=['matrix', 'other', 'both', 'sum of singular values'],
)
@both
def test_a_slope_that_is_no_number_is_no_direction(metric, w, b):
  off = w if w == 3e38 else 0.0
  grads = {'w': np.array([[w, off], [off, w]], np.float32), 'b': np.float32([b, b])}

  direction, slope, _ = ascend(metric, grads)

  chex.assert_trees_all_equal(direction, jax.tree.map(np.zeros_like, grads))
  assert slope == 0


def test_a_hyperparameter_of_the_others_that_is_nan_is_seen():
  grads = jax.tree.map(jnp.asarray, random_tree(11, np.float32))

  @jax.jit
  def run(eta):
    metric = spectral(adaptive(eta, weights=True))
    return metric.ascend(grads, (), grads)[0]

  direction, slope, _ = run(jnp.float32(np.nan))

  assert np.isnan(slope)
  assert np.isnan(direction['conv']).all()


# Which leaves are matrices, and what becomes of the others.

FIRST = {
  'tall': {'kernel': True, 'bias': False},
  'wide': {'kernel': False, 'bias': False},
  'conv': False,
  'temperature': False,
}


BOTH_MATRICES = FIRST | {'wide': {'kernel': True, 'bias': False}}


def test_matrices_by_default_are_those_of_two_axes_that_are_no_biases():
  grads = random_tree(12, np.float32)

  direction, *_ = ascend(spectral(), grads)

  # Of what is no matrix all leaves together have the length 1.
  assert np.linalg.norm(direction['wide']['bias']) < 0.9
  np.testing.assert_allclose(singular_values(direction['wide']['kernel']), 1, atol=1e-5)


@pytest.mark.parametrize(
  'matrices',
  [
    FIRST,
    FIRST | {'wide': False},
    lambda params: FIRST,
    lambda params: jax.tree.map(lambda p: p.shape == (4, 3), params),
  ],
  ids=['tree', 'prefix', 'function', 'function of shapes'],
)
def test_matrices_that_are_named(matrices, x64):
  grads = random_tree(13)

  direction, slope, _ = ascend(spectral(matrices=matrices), grads, grads)

  U, s, Vt = np.linalg.svd(grads['tall']['kernel'], full_matrices=False)
  np.testing.assert_allclose(direction['tall']['kernel'], U @ Vt, atol=1e-9)
  rest = [x for x in jax.tree.leaves(grads) if x.shape != (4, 3)]
  norm = np.sqrt(sum(np.sum(x**2) for x in rest))
  np.testing.assert_allclose(
    direction['wide']['kernel'], grads['wide']['kernel'] / norm, rtol=1e-12
  )
  np.testing.assert_allclose(slope, np.sum(s) + norm, rtol=1e-10)


def test_no_matrices_leave_the_other_metric():
  grads = random_tree(14, np.float32)
  for other in (euclidean(), max_norm(), monge(0.3)):
    got = ascend(spectral(other, matrices=False), grads)
    chex.assert_trees_all_equal(got[:2], ascend(other, grads)[:2])


def test_matrices_alone_need_no_other_metric():
  """That it is not asked without a leaf, of which a metric need know nothing."""

  def refuse(grads, state, params, **extra_args):
    raise AssertionError

  other = Metric(lambda params: optax.EmptyState(), refuse)
  g = with_spectrum(np.array([3.0, 2.0]), (2, 3))
  ascent = ascend(spectral(other, matrices=True), {'w': g[0].astype(np.float32)})
  np.testing.assert_allclose(ascent.direction['w'], g[1], atol=1e-5)


def test_the_other_metric_has_its_leaves_alone_in_all_that_it_gets():
  """Its state, its params, extra arguments, and the gradients that it asks for."""
  params = jax.tree.map(jnp.asarray, random_tree(15, np.float32))
  loss = lambda p: sum(jnp.sum(jnp.sin(x)) * jnp.sum(x) for x in jax.tree.leaves(p))
  seen = {}

  def init(params):
    return {'before': jax.tree.map(jnp.zeros_like, params)}

  def along_the_next(grads, state, params, *, space, rho, grad_fn, **extra_args):
    seen.update(extra_args, grads=grads, params=params, rho=rho)
    moved = jax.tree.map(lambda w, g: w + 0.1 * g, params, grads)
    ascent, _ = euclidean().ascend(grad_fn(moved), (), params, space=space)
    return ascent, {'before': grads}

  metric = spectral(Metric(init, along_the_next))
  grads, state = jax.grad(loss)(params), metric.init(params)
  only_others = {
    'tall': {'kernel': optax.MaskedNode(), 'bias': params['tall']['bias']},
    'wide': {'kernel': optax.MaskedNode(), 'bias': params['wide']['bias']},
    'conv': params['conv'],
    'temperature': params['temperature'],
  }
  chex.assert_trees_all_equal_structs(state, {'before': only_others})

  ascent, new_state = metric.ascend(
    grads, state, params, space=LOCAL, rho=0.5, grad_fn=jax.grad(loss), hint='why'
  )

  chex.assert_trees_all_equal(seen['params'], only_others)
  assert (seen['rho'], seen['hint']) == (0.5, 'why')
  chex.assert_trees_all_equal(new_state, {'before': seen['grads']})
  moved = jax.tree.map(
    lambda w, g, frozen: w if frozen else w + 0.1 * g,
    params,
    grads,
    BOTH_MATRICES,
  )
  there = jax.grad(loss)(moved)
  norm = np.sqrt(sum(np.sum(at(there, path) ** 2) for path in OTHERS))
  for path in OTHERS:
    want = at(there, path) / norm
    np.testing.assert_allclose(at(ascent.direction, path), want, rtol=1e-5)


@pytest.mark.parametrize(
  ('matrices', 'error', 'message'),
  [
    ({'w': True}, ValueError, '`matrices` must have the structure'),
    ({'w': 1, 'b': False}, TypeError, r"`matrices` must hold one bool.*at \['w'\]"),
    (True, ValueError, r"`matrices` of spectral.*at \['b'\], whose shape is \(3,\)"),
    (
      by_name('kernel'),
      ValueError,
      r"nothing .* is called \['kernel'\]",
    ),
  ],
  ids=['structure', 'no bool', 'no matrix', 'no such name'],
)
def test_matrices_that_do_not_fit(matrices, error, message):
  params = {'w': jnp.eye(2), 'b': jnp.ones(3)}
  with pytest.raises(error, match=message):
    spectral(matrices=matrices).init(params)


@pytest.mark.parametrize(
  'other', [euclidean, None, 1.0], ids=['factory', 'None', 'float']
)
def test_other_that_is_no_metric(other):
  with pytest.raises(TypeError, match='`other` must be a Metric'):
    spectral(other)


# In a chain.


def numpy_direction(name, grads):
  """The direction and slope of the problem's four leaves, in float64."""
  grads = jax.tree.map(lambda g: np.asarray(g, np.float64), grads)
  if name == 'max_norm':
    return jax.tree.map(np.sign, grads), sum(
      np.sum(np.abs(g)) for g in jax.tree.leaves(grads)
    )
  biases = [grads[layer]['bias'] for layer in ('hidden', 'out')]
  norm = np.linalg.norm(np.concatenate(biases))
  direction, slope = {}, norm
  for layer in ('hidden', 'out'):
    U, s, Vt = np.linalg.svd(grads[layer]['kernel'], full_matrices=False)
    direction[layer] = {'kernel': U @ Vt, 'bias': grads[layer]['bias'] / norm}
    slope += np.sum(s)
  return direction, slope


@pytest.mark.parametrize('name', NORMS)
def test_a_step_equals_one_by_hand(name):
  params, data, rho, alpha = problems.mlp_params(), problems.batch(), 0.2, 0.6
  grad_fn = jax.grad(lambda p: problems.loss(p, data))
  grads = grad_fn(params)
  tx = msam(rho, alpha, base=NORMS[name][0])

  updates, state = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)

  direction, slope = numpy_direction(name, grads)
  factor = rho / np.sqrt(1 + alpha**2 * slope**2)
  probe = jax.tree.map(
    lambda w, d: w + jnp.asarray(factor * d, jnp.float32), params, direction
  )
  chex.assert_trees_all_close(updates, grad_fn(probe), rtol=1e-4, atol=1e-6)
  radius = factor * np.sqrt(inner(direction, direction))
  np.testing.assert_allclose(optax.tree.get(state, 'radius'), radius, rtol=1e-5)


@pytest.mark.standard_promotion
@pytest.mark.parametrize('name', NORMS)
def test_training_beside_muon(name):
  params, data = problems.mlp_params(), problems.batch()
  tx = optax.chain(msam(0.05, base=NORMS[name][0]), optax.contrib.muon(0.05))
  grad_fn = jax.grad(lambda p: problems.loss(p, data))

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    return (optax.apply_updates(params, updates), state), None

  run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=60)[0])
  trained, state = run((params, tx.init(params)))

  assert problems.loss(trained, data) < 0.1 * problems.loss(params, data)
  assert optax.tree.get(state, 'finite')


# One radius for each leaf.


def test_each_leaf_moves_by_its_own_radius():
  """Every leaf is alone in its metric, and the slope is the rise of all together."""
  grads, params = random_tree(0, np.float32), random_tree(1, np.float32)
  radii = {'tall': 0.5, 'wide': {'kernel': 2.0, 'bias': 0.0}, 'conv': 1.5} | {
    'temperature': np.float32(0.1)
  }
  alpha = 0.7
  metric = per_leaf(monge(alpha), radii)
  ascent = ascend(metric, grads, params)
  each = {**radii, 'tall': {'kernel': 0.5, 'bias': 0.5}}

  def expected(g, r):
    n = np.linalg.norm(g.astype(np.float64))
    return r * g / (n * np.sqrt(1 + alpha**2 * n**2))

  want = jax.tree.map(expected, grads, each)
  chex.assert_trees_all_close(ascent.direction, want, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(ascent.slope, inner(grads, want), rtol=1e-5)


def test_monge_over_leaves_is_shortened_by_the_slope_of_the_whole():
  grads = random_tree(0, np.float32)
  base, over = (ascend(m, grads, grads) for m in (per_leaf(), monge(1.0, per_leaf())))
  s = float(base.slope)
  want = jax.tree.map(lambda d: d / np.sqrt(1 + s**2), base.direction)
  chex.assert_trees_all_close(over.direction, want, rtol=1e-5)


def test_radii_that_do_not_fit_are_named():
  with pytest.raises(ValueError, match=r"`radii\['b'\]` must be finite and >= 0"):
    per_leaf(radii={'a': 1.0, 'b': -1.0})
  metric, w = per_leaf(radii={'a': 1.0}), {'b': jnp.ones(2)}
  with pytest.raises(ValueError, match='must have the structure of the parameters'):
    metric.ascend(w, metric.init(w), w)
