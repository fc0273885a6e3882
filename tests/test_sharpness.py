"""Sharpness measures against dense float64 Hessians, closed forms, and each other."""

import functools
from typing import Any
from typing import NamedTuple

import chex
import equinox as eqx
import jax
from jax import flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from msam_optax import adaptive
from msam_optax import diagonal_fisher
from msam_optax import euclidean
from msam_optax import monge
from msam_optax import sharpness
from tests.problems import batch
from tests.problems import loss
from tests.problems import mlp_params

METRICS = {
  'euclidean': euclidean(),
  'monge': monge(2.0),
  'adaptive': adaptive(0.1),
  'diagonal_fisher': diagonal_fisher(2.0),
  'monge-adaptive': monge(2.0, adaptive(0.1)),
}
KEY = jax.random.key(5)


def dense_hessian(loss_fn, params):
  w, unravel = flatten_util.ravel_pytree(params)
  return np.asarray(jax.hessian(lambda v: loss_fn(unravel(v)))(w))


def network(params):
  return loss(params, batch(dtype=params['out']['bias'].dtype))


def valley(w):
  """``(1 − wᵢ wᵢ₊₁)²``, summed over pairs: saddles at 0, minima at products of 1."""
  return jnp.sum((1 - w[::2] * w[1::2]) ** 2 * jnp.linspace(0.5, 2.0, w.size // 2))


@pytest.mark.slow
@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('name', METRICS)
def test_rise_is_measured_and_predicted(name):
  params, rho = mlp_params(jnp.float64), 1e-4
  measured, predicted = sharpness.rise(network, params, METRICS[name], rho)
  # They agree to first order: the difference is of second order in ρ.
  assert abs(measured - predicted) < 1e3 * rho**2
  assert predicted > 0
  np.testing.assert_allclose(measured, predicted, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.usefixtures('x64')
def test_rise_of_papers_formula():
  params, rho, alpha = mlp_params(jnp.float64), 0.3, 2.0
  g, _ = flatten_util.ravel_pytree(jax.grad(network)(params))
  w, unravel = flatten_util.ravel_pytree(params)
  n = np.linalg.norm(g)
  probe = unravel(w + rho * g / (n * np.sqrt(1 + (alpha * n) ** 2)))
  got = jax.jit(lambda p: sharpness.rise(network, p, monge(alpha), rho))(params)
  np.testing.assert_allclose(got.measured, network(probe) - network(params), rtol=1e-10)
  np.testing.assert_allclose(
    got.predicted, rho * n / np.sqrt(1 + (alpha * n) ** 2), rtol=1e-10
  )
  assert got.predicted < rho / alpha


def test_rise_with_mask_moves_only_what_it_admits():
  mask = {'hidden': False, 'out': True}
  params = mlp_params()
  got = sharpness.rise(network, params, euclidean(), 0.3, mask=mask)
  part = sharpness.rise(
    lambda out: network({**params, 'out': out}), params['out'], euclidean(), 0.3
  )
  chex.assert_trees_all_close(got, part, rtol=1e-4)


def test_mean_rise_equals_loop_over_shards():
  params = mlp_params()
  shards = jax.tree.map(lambda *xs: jnp.stack(xs), *[batch(i) for i in range(3)])
  each = [
    sharpness.rise(functools.partial(loss, data=batch(i)), params, monge(), 0.2)
    for i in range(3)
  ]
  chex.assert_trees_all_close(
    jax.jit(lambda p: sharpness.mean_rise(loss, p, shards, monge(), 0.2))(params),
    jax.tree.map(lambda *xs: sum(xs) / 3, *each),
    rtol=1e-5,
  )


@pytest.mark.slow
@pytest.mark.usefixtures('x64')
def test_trace_is_within_its_own_standard_error():
  params, samples = mlp_params(jnp.float64), 400
  dense = dense_hessian(network, params)
  off_diagonal = dense - np.diag(np.diag(dense))
  error = np.sqrt(2 * np.sum(off_diagonal**2) / samples)
  estimate = jax.jit(
    lambda p: sharpness.hessian_trace(network, p, key=KEY, samples=samples)
  )(params)
  assert abs(estimate - np.trace(dense)) < 3 * error


def test_trace_of_diagonal_hessian_is_exact():
  scale = jnp.linspace(-1.0, 2.0, 50)
  got = sharpness.hessian_trace(
    lambda w: jnp.sum(scale * w['a'] ** 2), {'a': jnp.ones(50)}, key=KEY, samples=1
  )
  np.testing.assert_allclose(got, 2 * scale.sum(), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('which', ['largest', 'smallest'])
def test_eigenvalues_of_network(which):
  params = mlp_params(jnp.float64)
  dense = np.linalg.eigvalsh(dense_hessian(network, params))
  expected = dense[::-1][:4] if which == 'largest' else dense[:4]
  got = jax.jit(
    lambda p: sharpness.hessian_eigenvalues(network, p, k=4, which=which, key=KEY)
  )(params)
  np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('which', ['largest', 'smallest'])
def test_eigenvalues_without_a_dense_matrix(which):
  """Of a quartic in 300 dimensions, mixed by a random rotation."""
  n = 300
  rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(n, n)))
  spectrum = np.concatenate([[-3.0, -1.0], np.linspace(0, 1, n - 5), [4.0, 5.0, 9.0]])

  def quartic(params):
    v = rotation @ jnp.concatenate([params['a'], params['b'].ravel()])
    return jnp.sum(spectrum * v**2) / 2 + jnp.sum(v**4) / 12

  params = {'a': jnp.zeros(100), 'b': 0.1 * jnp.ones((20, 10))}
  dense = np.linalg.eigvalsh(dense_hessian(quartic, params))
  expected = dense[::-1][:3] if which == 'largest' else dense[:2]
  got = sharpness.hessian_eigenvalues(
    quartic, params, k=len(expected), which=which, key=KEY
  )
  np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('which', ['largest', 'smallest'])
def test_equal_eigenvalues_count_as_often_as_they_occur(which):
  """Two steps exhaust the Krylov space of the first; the second hides two of three."""
  exhausted = np.where(np.arange(SIZE) < 150, 1.0, 3.0)
  end = [1.1, 1.1, 1.1, 1.08, 1.06]
  hidden = np.concatenate([end, np.linspace(-1, 1, SIZE - 10), np.negative(end)])
  for spectrum in (exhausted, hidden):
    got = extreme(jnp.asarray(spectrum), which)
    np.testing.assert_allclose(got, ends(spectrum, which), rtol=1e-9)


SIZE = 200


@functools.partial(jax.jit, static_argnames='which')
def extreme(matrix, which):
  """Three eigenvalues of a matrix, or of a diagonal one, as those of a Hessian."""

  def quadratic(w):
    product = matrix * w if matrix.ndim == 1 else matrix @ w
    return jnp.vdot(w, product) / 2

  w = jnp.zeros(matrix.shape[-1], matrix.dtype)
  return sharpness.hessian_eigenvalues(quadratic, w, k=3, which=which, key=KEY)


def ends(spectrum, which):
  values = np.sort(np.asarray(spectrum, np.float64))
  return values[:3] if which == 'smallest' else values[::-1][:3]


SPECTRA = {
  'even': np.linspace(-0.3, 1, SIZE),
  'outlier-10': np.append(10, np.linspace(-1, 1, SIZE - 1)),
  'outlier-1e4': np.append(1e4, np.linspace(-1, 1, SIZE - 1)),
  'outlier-1e5': np.append(1e5, np.linspace(-1, 1, SIZE - 1)),
  'outliers': np.append([-1e6, -1e3, 1e4, 1e5], np.linspace(-1, 1, SIZE - 4)),
  'decades': np.append(np.geomspace(1e-6, 1, SIZE // 2), -np.geomspace(1e-6, 1, 100)),
  'rank-5': np.append([-2.0, -1.0, 1.0, 2.0, 3.0], np.zeros(SIZE - 5)),
}


@pytest.mark.slow
@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('which', ['largest', 'smallest'])
@pytest.mark.parametrize(
  'dtype', [jnp.float32, pytest.param(jnp.float64, marks=pytest.mark.slow)]
)
def test_eigenvalues_over_20_decades_of_scale_and_6_of_spread(dtype, which):
  """Of diagonal Hessians, and of dense ones as far as their rounded entries go."""
  eps = float(jnp.finfo(dtype).eps)
  rotation, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(SIZE, SIZE)))
  for spectrum in SPECTRA.values():
    rotated = rotation @ np.diag(spectrum) @ rotation.T
    for scale in (1e-10, 1.0, 1e10):
      got = extreme(jnp.asarray(scale * spectrum, dtype), which)
      assert got.dtype == dtype
      expected = ends(scale * spectrum, which)
      # Zeros beside the five of rank five are as small as rounding errors are.
      floor = 1e-3 * eps * np.max(np.abs(spectrum)) * scale
      np.testing.assert_allclose(got, expected, rtol=4 * eps ** (2 / 3), atol=floor)
      got = extreme(jnp.asarray(scale * rotated, dtype), which)
      np.testing.assert_allclose(
        got, expected, rtol=4 * eps ** (2 / 3), atol=4e3 * floor
      )


@pytest.mark.slow
@pytest.mark.parametrize('which', ['largest', 'smallest'])
def test_eigenvalues_on_one_side_of_a_tiny_hessian(which):
  spectrum = np.linspace(-3e-6, 1e-5, 100)
  got = extreme(jnp.asarray(spectrum, jnp.float32), which)
  np.testing.assert_allclose(got, ends(spectrum, which), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures('x64')
def test_an_eigenvalue_is_right_or_nan():
  """The smallest of a spectrum are 1e-12 of it apart: Krylov spaces fail on them."""
  spectrum = np.geomspace(1e-4, 1e6, SIZE)
  got = extreme(jnp.asarray(spectrum), 'smallest')
  assert np.isnan(got).any()
  np.testing.assert_allclose(
    got[~np.isnan(got)], ends(spectrum, 'smallest')[~np.isnan(got)], rtol=1e-8
  )


def test_a_hessian_that_is_not_finite_has_nan_for_eigenvalues():
  for value in (jnp.nan, jnp.inf):
    got = extreme(jnp.ones(SIZE).at[7].set(value), 'largest')
    np.testing.assert_array_equal(got, np.nan)


@pytest.mark.slow
def test_eigenvalues_of_a_plane_are_zero():
  got = sharpness.hessian_eigenvalues(lambda w: jnp.sum(w), jnp.ones(100), key=KEY)
  np.testing.assert_allclose(got, [0.0], atol=1e-6)


def test_bfloat16_parameters_are_widened():
  got = sharpness.hessian_eigenvalues(
    lambda w: jnp.sum(jnp.square(w)), jnp.ones(3, jnp.bfloat16), key=KEY
  )
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, [2.0], rtol=1e-6)


def hessian_and_gradient(w):
  return dense_hessian(valley, w), np.asarray(jax.grad(valley)(w))


@pytest.mark.slow
@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('alpha', [0.0, 1.0, 3.0])
@pytest.mark.parametrize('fixed_radius', [True, False], ids=['fixed', 'exact'])
def test_stability_matrix_of_paper(fixed_radius, alpha):
  """Eq. 10, and its form with the derivative of the radius, built from dense parts."""
  w, rho = jnp.array([0.9, -0.4, 0.3, 1.2]), 0.7
  hessian, g = hessian_and_gradient(w)
  n = np.linalg.norm(g)
  u, phi = g / n, (1 + (alpha * n) ** 2) ** -0.5
  projector = np.outer(u, u)
  if fixed_radius:
    inner = rho * phi / n * np.eye(4)
  else:
    inner = rho * (
      phi / n * (np.eye(4) - projector) - alpha**2 * n * phi**3 * projector
    )
  at_probe, _ = hessian_and_gradient(w + rho * phi * u)
  matrix = at_probe @ (np.eye(4) + inner @ hessian)
  got = sharpness.stability(valley, w, monge(alpha), rho, fixed_radius=fixed_radius)
  np.testing.assert_allclose(
    got, np.sort(np.linalg.eigvals(matrix).real), rtol=1e-8, atol=1e-10
  )


@pytest.mark.slow
@pytest.mark.usefixtures('x64')
def test_stability_at_equilibria():
  """Eq. 11: near one, the eigenvalues are ``λ(1 + ρ̃λ)`` for ``λ`` of the Hessian."""
  effective_radius = 0.8
  w = jnp.array([1e-6, 2e-6])  # by the saddle of (1 − w₀w₁)²/2, λ = ±1
  _, g = hessian_and_gradient(w)
  rho = effective_radius * np.linalg.norm(g)
  got = sharpness.stability(valley, w, euclidean(), rho)
  lam = np.array([-1.0, 1.0])
  np.testing.assert_allclose(got, np.sort(lam * (1 + 0.8 * lam)), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('name', METRICS)
def test_exact_stability_is_the_jacobian_of_the_flow(name):
  """By central differences of ``∇ℓ(w + δ(w))``."""
  w, rho, metric = jnp.array([0.9, -0.4, 0.3, 1.2]), 0.4, METRICS[name]

  def flow(v):
    g = jax.grad(valley)(v)
    return jax.grad(valley)(v + rho * metric.ascend(g, metric.init(v), v)[0].direction)

  h = 1e-6
  jacobian = np.stack(
    [(flow(w + h * e) - flow(w - h * e)) / (2 * h) for e in np.eye(4)], axis=1
  )
  got = sharpness.stability(valley, w, metric, rho, fixed_radius=False)
  np.testing.assert_allclose(got, np.sort(np.linalg.eigvals(jacobian).real), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('fixed_radius', [True, False], ids=['fixed', 'exact'])
@pytest.mark.parametrize('which', ['largest', 'smallest'])
def test_stability_matrix_free_equals_dense(which, fixed_radius):
  w = jnp.asarray(np.random.default_rng(1).normal(size=120))
  # Separate the ends of the spectrum, which is what Krylov spaces resolve.
  steep = lambda v: valley(v) + 20 * v[0] ** 2 - 9 * v[1] ** 2
  args = (steep, w, monge(), 0.3)
  dense = sharpness.stability(*args, fixed_radius=fixed_radius)
  got = sharpness.stability(*args, fixed_radius=fixed_radius, k=1, which=which, key=KEY)
  expected = dense[-1:] if which == 'largest' else dense[:1]
  np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize('scale', [1e-30, 1e-10, 1.0, 1e10, 1e30])
def test_a_coordinate_without_gradient_has_its_part_in_the_stability_matrix(scale):
  """SAM on ``(w₀² + 3w₁²)/2`` at w₁ = 0: eq. 10 with ρ̃ = ρ/|w₀| in both coordinates."""
  bowl = lambda w: scale / 2 * (w[0] ** 2 + 3 * w[1] ** 2)
  got = sharpness.stability(bowl, jnp.array([2.0, 0.0]), euclidean(), 0.5)
  expected = [scale * 1 * (1 + 0.25), scale * 3 * (1 + 0.75)]
  np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize('steep', [1e-8, 1.0, 1e8])
def test_a_leaf_that_is_not_moved_has_no_part_in_the_scale_of_coordinates(steep):
  """Its gradient is ``steep``, that of the bowl beside it (−1, 0)."""

  def bowl(params):
    w = params['bowl']
    return (w[0] ** 2 + 3 * w[1] ** 2) / 2 + steep * params['frozen']

  params = {'bowl': jnp.array([-1.0, 0.0]), 'frozen': jnp.array(0.0)}
  mask = {'bowl': True, 'frozen': False}
  got = sharpness.stability(bowl, params, euclidean(), 0.5, mask=mask)
  np.testing.assert_allclose(got, [0.0, 1 * (1 + 0.5), 3 * (1 + 1.5)], rtol=1e-5)


def test_coordinates_are_as_long_as_the_metric_says():
  """ASAM, ``P = ρ w²/‖w g‖``: weights of 1 and 1e4, the latter without a gradient."""
  at = jnp.array([[1.0, 1e4]])
  loss_fn = lambda w: (w[0, 0] ** 2 + 3 * (w[0, 1] - at[0, 1]) ** 2) / 2
  got = sharpness.stability(loss_fn, at, adaptive(0.0), 1e-3)
  # The probe moves the first coordinate only, and the Hessian is constant.
  expected = [1 * (1 + 1e-3), 3 * (1 + 3e-3 * 1e8)]
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_a_direction_that_underflows_has_its_part_in_the_stability_matrix():
  """The second coordinate of the direction, 1e-40, is no normal float32."""
  loss_fn = lambda w: 1e25 * w[0] + 1e20 * w[1] ** 2 / 2
  got = sharpness.stability(loss_fn, jnp.array([0.0, 1e-35]), euclidean(), 1e5)
  np.testing.assert_allclose(got, [0.0, 1e20 * (1 + 1)], rtol=1e-5)


def test_stability_without_gradient_is_the_hessian():
  got = sharpness.stability(lambda w: jnp.sum(w**2), jnp.zeros(2), monge(), 0.5)
  np.testing.assert_allclose(got, [2.0, 2.0])


@pytest.mark.parametrize('which', ['largest', 'smallest'])
def test_which_of_the_real_parts(which):
  bowl = lambda w: jnp.sum(jnp.array([4.0, 1.0, 3.0, 2.0]) * w**2) / 2
  args = (bowl, jnp.zeros(4), euclidean(), 0.5)
  got = sharpness.stability(*args, k=2, which=which, key=KEY)
  np.testing.assert_allclose(got, [3, 4] if which == 'largest' else [1, 2], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('which', ['largest', 'smallest'])
def test_stability_in_many_dimensions_over_20_decades_of_scale(which):
  """``H(I + PH)`` of a quadratic under ASAM, which is not symmetric, by dense NumPy."""
  n, rho, rng = 120, 0.1, np.random.default_rng(3)
  rotation, _ = np.linalg.qr(rng.normal(size=(n, n)))
  spectrum = np.append(np.linspace(-1, 1, n - 3), [-4.0, 5.0, 300.0])
  hessian = rotation @ np.diag(spectrum) @ rotation.T
  w = rng.normal(size=n)

  @jax.jit
  def solve(hessian):
    return sharpness.stability(
      lambda v: v @ hessian @ v / 2,
      jnp.asarray(w),
      adaptive(0.0, weights=True),
      rho,
      k=3,
      which=which,
      key=KEY,
    )

  for scale in (1e-10, 1.0, 1e10):
    g = scale * hessian @ w
    p = rho * w**2 / np.linalg.norm(w * g)
    matrix = scale * hessian @ (np.eye(n) + p[:, None] * scale * hessian)
    values = np.sort(np.linalg.eigvals(matrix).real)
    expected = values[-3:] if which == 'largest' else values[:3]
    np.testing.assert_allclose(solve(scale * hessian), expected, rtol=1e-8)


class Line(NamedTuple):
  """A model that is called, as Equinox modules are: all its leaves are arrays."""

  weight: Any
  bias: Any

  def __call__(self, x):
    return self.weight @ x + self.bias


MODELS = {
  'equinox': eqx.nn.Linear(2, 2, key=KEY),
  'partial': jax.tree_util.Partial(jnp.dot, jnp.array([[1.0, 2.0], [3.0, 4.0]])),
  'tuple': Line(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([0.5, -1.0])),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_a_model_that_can_be_called_is_a_tree_of_parameters(name):
  """Of ``(‖m(1)‖² + c Σw)/2``; the same as for a list of its leaves."""
  model = MODELS[name]
  leaves, structure = jax.tree.flatten(model)
  of_model = lambda m, c=0.0: (
    jnp.sum(m(jnp.ones(2)) ** 2) + c * sum(map(jnp.sum, jax.tree.leaves(m)))
  )
  of_leaves = lambda ls, c=0.0: of_model(structure.unflatten(ls), c)
  mask = jax.tree.map(lambda w: w.ndim > 1, model)
  shards = jnp.array([0.5, 1.0])

  def measure(loss_fn, params, mask):
    options = dict(metric=monge(), rho=0.1, mask=mask)
    return (
      sharpness.rise(loss_fn, params, **options),
      sharpness.mean_rise(loss_fn, params, shards, **options),
      sharpness.hessian_trace(loss_fn, params, key=KEY, samples=2),
      sharpness.hessian_eigenvalues(loss_fn, params, k=2, key=KEY),
      sharpness.stability(loss_fn, params, **options),
    )

  chex.assert_trees_all_close(
    measure(of_model, model, mask),
    measure(of_leaves, leaves, jax.tree.leaves(mask)),
    rtol=1e-5,
    atol=1e-5,
  )


CALLS = {
  'rise': lambda f, p: sharpness.rise(f, p, monge(), 0.1),
  'mean_rise': lambda f, p: sharpness.mean_rise(
    lambda p, _: f(p), p, jnp.ones(2), monge(), 0.1
  ),
  'trace': lambda f, p: sharpness.hessian_trace(f, p, key=KEY, samples=2),
  'eigenvalues': lambda f, p: sharpness.hessian_eigenvalues(f, p, key=KEY),
  'stability': lambda f, p: sharpness.stability(f, p, monge(), 0.1),
}


@pytest.mark.parametrize('name', CALLS)
@pytest.mark.parametrize(
  ('leaf', 'found'),
  [
    (jax.nn.relu, 'is <'),
    ('relu', "is 'relu'"),
    (jnp.float32, 'is <class'),
    (jnp.arange(3), 'has dtype int32'),
    (3, 'has dtype int32'),
    (True, 'has dtype bool'),
    (jnp.array(1j), 'has dtype complex64'),
    (KEY, r'has dtype key<fry>'),
  ],
  ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_a_leaf_that_is_no_real_array(name, leaf, found):
  advice = (
    'two real leaves' if 'complex' in found else r'eqx.partition\(model, eqx.is_in'
  )
  message = rf"leaf at \['b'\] (of the parameters )?{found}.*{advice}"
  with pytest.raises(TypeError, match=message):
    CALLS[name](lambda p: jnp.sum(p['w'] ** 2), {'w': jnp.ones(2), 'b': leaf})


@pytest.mark.slow
@pytest.mark.parametrize('name', CALLS)
def test_arrays_of_an_equinox_model_as_the_message_says(name):
  model = eqx.nn.MLP(2, 'scalar', 3, 1, key=KEY)
  params, static = eqx.partition(model, eqx.is_inexact_array)
  got = CALLS[name](lambda p: eqx.combine(p, static)(jnp.ones(2)) ** 2, params)
  chex.assert_tree_all_finite(got)


@pytest.mark.slow
@pytest.mark.parametrize('name', CALLS)
def test_a_loss_in_half_precision_of_parameters_in_several(name):
  """``Σ (½wᵢ²) + Σ bᵢ²`` at halves, which bfloat16 holds exactly."""

  def loss_fn(params):
    w, b = (x.astype(jnp.bfloat16) for x in (params['w'], params['b']))
    return jnp.sum(w**2) / 2 + jnp.sum(b**2)

  params = {'w': jnp.array([0.5]), 'b': jnp.array([1.0], jnp.bfloat16)}
  got = CALLS[name](loss_fn, params)
  assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}
  if name == 'trace':
    np.testing.assert_allclose(got, 1 + 2, rtol=1e-2)
  if name == 'eigenvalues':
    np.testing.assert_allclose(got, [2], rtol=1e-2)


@pytest.mark.slow
@pytest.mark.usefixtures('x64')
def test_parameters_in_single_and_double_precision():
  params = {'a': jnp.ones(2, jnp.float32), 'b': jnp.full(2, 2.0)}
  loss_fn = lambda p: jnp.sum(p['a'] ** 2).astype(jnp.float64) + jnp.sum(p['b'] ** 4)
  got = sharpness.hessian_eigenvalues(loss_fn, params, k=4, key=KEY)
  np.testing.assert_allclose(got, [48, 48, 2, 2], rtol=1e-6)


@pytest.mark.parametrize('name', CALLS)
def test_healthy_calls_make_no_nan_and_no_inf_on_the_way(name):
  """Operation by operation, at a point where a coordinate has no gradient."""
  loss_fn = lambda p: jnp.sum(p['w'] ** 2) + jnp.sum(p['b'] ** 3)
  params = {'w': jnp.array([1.0, 0.0]), 'b': jnp.ones(1)}
  with jax.debug_nans(True), jax.debug_infs(True), jax.disable_jit():
    chex.assert_tree_all_finite(CALLS[name](loss_fn, params))


@pytest.mark.slow
def test_healthy_krylov_spaces_make_no_nan_and_no_inf_on_the_way():
  """One that is exhausted, for eigenvalues that are equal."""
  with jax.debug_nans(True), jax.debug_infs(True), jax.disable_jit():
    got = sharpness.hessian_eigenvalues(
      lambda w: jnp.sum(w**2), jnp.ones(80), k=2, key=KEY
    )
  np.testing.assert_allclose(got, [2.0, 2.0], rtol=1e-5)


def test_no_samples():
  with pytest.raises(ValueError, match='`samples` must be 1 or more, got 0'):
    sharpness.hessian_trace(jnp.sum, jnp.ones(2), key=KEY, samples=0)


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'k': 0, 'key': KEY}, '`k` must be from 1 to 4'),
    ({'k': 5, 'key': KEY}, '`k` must be from 1 to 4'),
    ({'k': 1, 'key': KEY, 'which': 'sharpest'}, 'must be "largest" or "smallest"'),
    ({'k': 1}, 'give `key`'),
  ],
)
def test_bad_selection(kwargs, message):
  with pytest.raises(ValueError, match=message):
    sharpness.stability(valley, jnp.ones(4), monge(), 0.1, **kwargs)
  if 'key' in kwargs:
    with pytest.raises(ValueError, match=message):
      sharpness.hessian_eigenvalues(valley, jnp.ones(4), **kwargs)
