"""What does not depend on coordinates, what does, and what M-SAM descends.

The losses are small closed forms, written in two coordinate systems, in float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msam_optax import adaptive
from msam_optax import Ascent
from msam_optax import diagonal_fisher
from msam_optax import euclidean
from msam_optax import Metric
from msam_optax import monge
from msam_optax import perturb

pytestmark = pytest.mark.usefixtures('x64')

DIMENSION = 6


def loss(w):
  """Neither symmetric nor quadratic."""
  c = jnp.arange(1.0, DIMENSION + 1)
  return jnp.sum(jnp.sin(c * w)) + jnp.prod(w[:3]) + jnp.sum(w**2) * w[3]


def point():
  return jnp.asarray(np.random.default_rng(0).normal(size=DIMENSION))


def ascend(metric, loss, w):
  ascent, _ = metric.ascend(jax.grad(loss)(w), metric.init(w), w)
  return ascent


# T = |w| + η on vectors, too.
relative = functools.partial(adaptive, weights=lambda params: True)

METRICS = {
  'euclidean': euclidean(),
  'monge': monge(0.8),
  'diagonal_fisher': diagonal_fisher(),
  'adaptive': relative(0.0),
  'adaptive, eta 0.1': relative(0.1),
  'monge over adaptive': monge(0.8, relative(0.0)),
  'monge over adaptive, eta 0.1': monge(0.8, relative(0.1)),
  'monge over diagonal_fisher': monge(0.8, diagonal_fisher()),
}


def orthogonal():
  return np.linalg.qr(np.random.default_rng(1).normal(size=(DIMENSION, DIMENSION)))[0]


def permutation():
  return np.eye(DIMENSION)[np.random.default_rng(2).permutation(DIMENSION)]


def scaling():
  return np.diag(10.0 ** np.random.default_rng(3).uniform(-2, 2, DIMENSION))


def flips():
  return np.diag([1.0, -1.0, -1.0, 1.0, -1.0, 1.0])


def compare(metric, change):
  """Ascents taken in ``w`` and in ``v``, where ``w = change @ v``; both in ``w``."""
  change = jnp.asarray(change)
  w = point()
  v = jnp.linalg.solve(change, w)
  direct = ascend(metric, loss, w)
  changed = ascend(metric, lambda v: loss(change @ v), v)
  return direct, Ascent(change @ changed.direction, changed.slope)


CHANGES = {
  'rotation': orthogonal,
  'permutation': permutation,
  'flip of signs': flips,
  'scaling': scaling,
}
INVARIANT = {
  'rotation': {'euclidean', 'monge'},
  'permutation': set(METRICS),
  'flip of signs': set(METRICS),
  'scaling': {'adaptive', 'monge over adaptive'},
}
BY_CHANGE = [
  pytest.param(METRICS[name], change, name in INVARIANT[change], id=f'{name}, {change}')
  for name in METRICS
  for change in CHANGES
]


@pytest.mark.parametrize(('metric', 'change', 'invariant'), BY_CHANGE)
def test_ascent_is_invariant_under_these_changes_of_coordinates_and_no_others(
  metric, change, invariant
):
  direct, changed = compare(metric, CHANGES[change]())

  if invariant:
    np.testing.assert_allclose(changed.direction, direct.direction, rtol=1e-9)
    np.testing.assert_allclose(changed.slope, direct.slope, rtol=1e-11)
  else:
    difference = np.linalg.norm(changed.direction - direct.direction)
    assert difference > 0.05 * np.linalg.norm(direct.direction)


def test_shift_of_the_coordinates():
  shift = jnp.arange(1.0, DIMENSION + 1)

  for name in ('euclidean', 'monge', 'diagonal_fisher'):
    direct = ascend(METRICS[name], loss, point())
    shifted = ascend(METRICS[name], lambda v: loss(v - shift), point() + shift)
    np.testing.assert_allclose(shifted.direction, direct.direction, rtol=1e-9)


# Any chart, if the metric is pulled back.


def chart(v):
  """A curved chart; each of its Jacobians is regular."""
  mixed = jnp.tanh(v) + 0.3 * jnp.roll(v, 1) ** 2
  return jnp.asarray(orthogonal()) @ (
    jnp.linspace(0.3, 3.0, DIMENSION) * v + 0.1 * mixed
  )


def pulled_back(chart):
  """The Euclidean metric of ``w = chart(v)`` as a metric of ``v``, by dense algebra."""

  def solve(grads, state, params, **extra_args):
    J = jax.jacobian(chart)(params)
    u = jnp.linalg.solve(J.T @ J, grads)
    s = jnp.sqrt(grads @ u)
    return Ascent(u / s, s), state

  return Metric(lambda params: (), solve)


@pytest.mark.parametrize('alpha', [0.0, 0.8, 30.0])
def test_monge_over_the_pulled_back_metric_is_invariant_under_a_chart(alpha):
  v = point()
  w, J = chart(v), jax.jacobian(chart)(v)

  direct = ascend(monge(alpha), loss, w)
  charted = ascend(monge(alpha, pulled_back(chart)), lambda v: loss(chart(v)), v)

  np.testing.assert_allclose(J @ charted.direction, direct.direction, rtol=1e-9)
  np.testing.assert_allclose(charted.slope, direct.slope, rtol=1e-11)
  # The metric's formula, written anew in the chart, is another metric.
  anew = ascend(monge(alpha), lambda v: loss(chart(v)), v)
  difference = np.linalg.norm(J @ anew.direction - direct.direction)
  assert difference > 0.05 * np.linalg.norm(direct.direction)


def test_probes_of_two_charts_agree_to_second_order_in_the_radius():
  v = point()
  metric = monge(0.8, pulled_back(chart))

  def difference(rho):
    direct = perturb(chart(v), ascend(monge(0.8), loss, chart(v)), rho)
    charted = chart(perturb(v, ascend(metric, lambda v: loss(chart(v)), v), rho))
    return np.linalg.norm(direct - charted)

  np.testing.assert_allclose(difference(2e-3) / difference(1e-3), 4.0, rtol=0.02)
  assert difference(1e-3) > 0


# The rescaling of (1 − w₁w₂)² at w = (1, 1/2): rises of the loss for ρ = 0.05.

RESCALED = {
  'SAM': (euclidean(), [0.0579, 0.1106, 0.3125, 2.00]),
  'M-SAM': (monge(), [0.0382, 0.0467, 0.0514, 0.0524]),
  'ASAM': (relative(0.0), [0.0359, 0.0359, 0.0359, 0.0359]),
  'Monge over adaptive': (monge(1.0, relative(0.0)), [0.0293, 0.0293, 0.0293, 0.0293]),
}


@pytest.mark.parametrize(('metric', 'rises'), RESCALED.values(), ids=RESCALED)
def test_rises_of_the_loss_in_rescaled_coordinates(metric, rises):
  valley = lambda w: (1 - w[0] * w[1]) ** 2

  for a, rise in zip([1.0, 2.0, 5.0, 20.0], rises, strict=True):
    w = jnp.array([a, 0.5 / a])
    probe = perturb(w, ascend(metric, valley, w), 0.05)
    digits = 2 if rise == 2.00 else 4
    assert round(float(valley(probe) - valley(w)), digits) == rise


# What is descended, to first order in ρ.


def potential_of_sam(rho, w):
  return loss(w) + rho * jnp.linalg.norm(jax.grad(loss)(w))


def potential_of_monge(rho, w, alpha):
  n = jnp.linalg.norm(jax.grad(loss)(w))
  return loss(w) + rho / alpha * jnp.arcsinh(alpha * n)


POTENTIALS = {
  'SAM': (euclidean(), potential_of_sam),
  'M-SAM, alpha 0.01': (monge(0.01), functools.partial(potential_of_monge, alpha=0.01)),
  'M-SAM': (monge(1.0), functools.partial(potential_of_monge, alpha=1.0)),
  'M-SAM, alpha 10': (monge(10.0), functools.partial(potential_of_monge, alpha=10.0)),
}


@pytest.mark.parametrize(('metric', 'potential'), POTENTIALS.values(), ids=POTENTIALS)
def test_gradient_at_the_probe_is_that_of_a_potential(metric, potential):
  """``ℓ + ρ‖∇ℓ‖`` for SAM, ``ℓ + (ρ/α) asinh(α‖∇ℓ‖)`` for M-SAM, up to O(ρ²)."""
  w = point()
  ascent = ascend(metric, loss, w)
  # A radius whose step is short under every metric.
  unit = 1e-3 / np.linalg.norm(ascent.direction)

  def error(rho):
    at_probe = jax.grad(loss)(perturb(w, ascent, rho))
    return np.linalg.norm(at_probe - jax.grad(potential, argnums=1)(rho, w))

  np.testing.assert_allclose(error(unit) / error(unit / 2), 4.0, rtol=0.05)
  first_order = np.linalg.norm(
    jax.grad(potential, argnums=1)(unit, w) - jax.grad(loss)(w)
  )
  assert error(unit) < 0.1 * first_order


def test_potentials_are_not_exchangeable():
  """SAM's error against the potential of M-SAM is of first order."""
  w = point()

  def error(rho):
    at_probe = jax.grad(loss)(perturb(w, ascend(euclidean(), loss, w), rho))
    return np.linalg.norm(
      at_probe - jax.grad(potential_of_monge, argnums=1)(rho, w, 1.0)
    )

  np.testing.assert_allclose(error(1e-4) / error(5e-5), 2.0, rtol=0.05)


# The basin of a saddle, in one dimension: ℓ = −|λ|x²/2.


@pytest.mark.slow
@pytest.mark.parametrize('curvature', [0.3, 1.0, 5.0])
@pytest.mark.parametrize('alpha', [0.0, 0.5, 1.0, 10.0])
def test_basin_of_a_saddle(alpha, curvature):
  """Drawn in iff ``|x|√(1+α²λ²x²) < ρ``: then the probe is on the other side."""
  rho, hill = 0.4, lambda x: -curvature * x**2 / 2
  # Without zero itself, where the gradient is zero.
  x = jnp.asarray(np.linspace(-0.6, 0.6, 400))

  def step(x):
    return -jax.grad(hill)(perturb(x, ascend(monge(alpha), hill, x), rho))

  drawn_in = np.asarray(jax.vmap(step)(x)) * x < 0

  law = np.abs(x) * np.sqrt(1 + alpha**2 * curvature**2 * x**2) < rho
  np.testing.assert_array_equal(drawn_in, law)
  assert 0 < law.sum() < law.size
  if alpha == 0:
    np.testing.assert_array_equal(law, np.abs(x) < rho)
  sam = np.abs(x) < rho
  assert np.all(sam | ~law)
