"""Sharpness measures against dense float64 Hessians, closed forms, and each other."""

import functools

import chex
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


@pytest.mark.parametrize('which', ['largest', 'smallest'])
def test_equal_eigenvalues_count_once_in_large_problems(which):
  """The Krylov space ends after two steps; nothing spurious may come out."""
  scale = jnp.where(jnp.arange(200) < 150, 1.0, 3.0)
  got = sharpness.hessian_eigenvalues(
    lambda w: jnp.sum(scale * w**2) / 2, jnp.ones(200), k=3, which=which, key=KEY
  )
  expected = [3.0, 1.0] if which == 'largest' else [1.0, 3.0]
  np.testing.assert_allclose(got[:2], expected, rtol=1e-4)
  assert np.isnan(got[2])


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


@pytest.mark.usefixtures('x64')
def test_a_coordinate_without_gradient_has_its_part_in_the_stability_matrix():
  """SAM on ``(w₀² + 3w₁²)/2`` at w₁ = 0: eq. 10 with ρ̃ = ρ/|w₀| in both coordinates."""
  bowl = lambda w: (w[0] ** 2 + 3 * w[1] ** 2) / 2
  got = sharpness.stability(bowl, jnp.array([2.0, 0.0]), euclidean(), 0.5)
  np.testing.assert_allclose(got, [1 * (1 + 0.25), 3 * (1 + 0.75)], rtol=1e-10)


def test_stability_without_gradient_is_the_hessian():
  got = sharpness.stability(lambda w: jnp.sum(w**2), jnp.zeros(2), monge(), 0.5)
  np.testing.assert_allclose(got, [2.0, 2.0])


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
