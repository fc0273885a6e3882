"""Monge and what shortens a metric's step as it does, over metrics and over norms."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msam_optax import adaptive
from msam_optax import Ascent
from msam_optax import capped
from msam_optax import diagonal_fisher
from msam_optax import euclidean
from msam_optax import max_norm
from msam_optax import Metric
from msam_optax import monge
from msam_optax import msam
from msam_optax import sharpness_aware
from msam_optax import spectral
from msam_optax import unit_rise
from tests.devices.test_parallel import has_explicit_sharding
from tests.devices.test_parallel import mesh
from tests.devices.test_parallel import NamedSharding
from tests.devices.test_parallel import on_devices
from tests.devices.test_parallel import P
from tests.test_metrics import asam
from tests.test_metrics import ascend
from tests.test_metrics import fisher
from tests.test_metrics import flat
from tests.test_metrics import identity
from tests.test_metrics import MATRICES
from tests.test_metrics import random_tree

BASES = {
  'euclidean': euclidean(),
  'adaptive': adaptive(0.1),
  'diagonal_fisher': diagonal_fisher(0.3),
  'monge': monge(0.4),
}
every_base = pytest.mark.parametrize('base', BASES.values(), ids=BASES)
precise = pytest.mark.usefixtures('x64')


# Monge.


@precise
def test_monge_is_equation_9_of_the_paper():
  grads, rho = random_tree(10), 0.05
  g = flat(grads)
  n = np.sqrt(np.sum(g**2))

  direction, *_ = ascend(monge(alpha=1.0), grads)

  expected = rho * g / (n * np.sqrt(1 + n**2))
  np.testing.assert_allclose(rho * flat(direction), expected, rtol=1e-12)


@precise
def test_metric_of_ones_own_can_be_a_base():
  """Any pair of functions is a metric: here a dense matrix."""
  rng = np.random.default_rng(0)
  root = rng.normal(size=(4, 4))
  B, g = root @ root.T + np.eye(4), rng.normal(size=4)

  def solve(grads, state, params, **extra_args):
    u = jnp.linalg.solve(jnp.asarray(B), grads)
    s = jnp.sqrt(grads @ u)
    return type(ascend(euclidean(), grads))(u / s, s), state

  metric = monge(alpha=0.8, base=Metric(lambda params: (), solve))
  direction, slope, _ = ascend(metric, jnp.asarray(g))

  u = np.linalg.solve(B + 0.64 * np.outer(g, g), g)
  np.testing.assert_allclose(direction, u / np.sqrt(g @ u), rtol=1e-11)
  np.testing.assert_allclose(slope, np.sqrt(g @ u), rtol=1e-12)


@precise
@every_base
def test_monge_with_alpha_zero_is_its_base(base):
  grads, params = random_tree(11), random_tree(12)

  expected = ascend(base, grads, params)

  for alpha, rtol in ((0.0, 1e-15), (1e-6, 1e-9)):
    got = ascend(monge(alpha, base), grads, params)
    chex.assert_trees_all_close(got, expected, rtol=rtol)


@precise
@every_base
def test_small_gradient_is_perturbed_as_by_the_base(base):
  grads = jax.tree.map(lambda g: 1e-6 * g, random_tree(13))
  params = random_tree(14)

  got, expected = ascend(monge(1.0, base), grads, params), ascend(base, grads, params)

  # The factor is 1 − α²s²/2 + ….
  chex.assert_trees_all_close(got, expected, rtol=1e-9)


@precise
@pytest.mark.parametrize('alpha', [0.1, 1.0, 10.0])
def test_large_gradient_is_hardly_perturbed(alpha):
  grads = jax.tree.map(lambda g: 1e8 * g, random_tree(15))
  n = np.linalg.norm(flat(grads))

  direction, slope, _ = ascend(monge(alpha), grads)

  np.testing.assert_allclose(
    np.linalg.norm(flat(direction)), 1 / (alpha * n), rtol=1e-12
  )
  np.testing.assert_allclose(slope, 1 / alpha, rtol=1e-12)


@precise
@pytest.mark.parametrize('c', [1e-3, 0.5, 128.0])
@pytest.mark.parametrize(
  'base', [euclidean(), adaptive()], ids=['euclidean', 'adaptive']
)
def test_scale_of_the_loss_acts_as_scale_of_alpha(base, c):
  grads, params = random_tree(16), random_tree(17)
  scaled = jax.tree.map(lambda g: c * g, grads)

  of_loss = ascend(monge(0.7, base), scaled, params)
  of_alpha = ascend(monge(0.7 * c, base), grads, params)

  chex.assert_trees_all_close(of_loss.direction, of_alpha.direction, rtol=1e-12)
  np.testing.assert_allclose(of_loss.slope, c * of_alpha.slope, rtol=1e-12)


@precise
def test_sam_ignores_the_scale_of_the_loss_and_monge_does_not():
  grads = random_tree(18)
  scaled = jax.tree.map(lambda g: 128.0 * g, grads)

  sam, sam_scaled = (ascend(euclidean(), g).direction for g in (grads, scaled))
  msam, msam_scaled = (ascend(monge(), g).direction for g in (grads, scaled))

  chex.assert_trees_all_close(sam, sam_scaled, rtol=1e-12)
  n = np.linalg.norm(flat(grads))
  ratio = np.linalg.norm(flat(msam)) / np.linalg.norm(flat(msam_scaled))
  np.testing.assert_allclose(
    ratio, np.sqrt((1 + (128 * n) ** 2) / (1 + n**2)), rtol=1e-12
  )


@precise
@pytest.mark.parametrize('alpha', [0.0, 0.01, 1.0, 100.0])
@every_base
def test_monge_is_shorter_than_its_base_and_rises_by_less_than_one_over_alpha(
  base, alpha
):
  params = random_tree(19)
  for scale in (1e-4, 1.0, 1e4):
    grads = jax.tree.map(lambda g, c=scale: c * g, random_tree(20))
    bare = ascend(base, grads, params)
    direction, slope, _ = ascend(monge(alpha, base), grads, params)
    rounding = 1 + 1e-15
    length, bare_length = (np.linalg.norm(flat(d)) for d in (direction, bare.direction))
    assert length <= bare_length * rounding
    assert slope <= bare.slope * rounding
    assert slope * alpha <= rounding


@precise
def test_monge_keeps_the_direction_of_its_base():
  grads = random_tree(21)

  sam, msam = (
    flat(ascend(euclidean(), grads).direction),
    flat(ascend(monge(), grads).direction),
  )

  np.testing.assert_allclose(msam / np.linalg.norm(msam), sam, rtol=1e-12)


@precise
@pytest.mark.parametrize(
  'make',
  [int, float, np.float32, np.array, jnp.array, jnp.int32, jnp.bfloat16],
  ids=['int', 'float', 'np.float32', 'np.array', 'jnp.array', 'int32', 'bfloat16'],
)
def test_alpha_may_be_any_scalar(make):
  direction, slope, _ = ascend(monge(make(2)), jnp.array([0.6, 0.8]))

  np.testing.assert_allclose(slope, 1 / np.sqrt(5), rtol=1e-12)
  np.testing.assert_allclose(direction, np.array([0.6, 0.8]) / np.sqrt(5), rtol=1e-12)


@precise
def test_alpha_may_be_mapped():
  alphas = jnp.array([0.0, 0.5, 1.0, 8.0])

  slopes = jax.vmap(lambda alpha: ascend(monge(alpha), jnp.array([3.0, 4.0])).slope)(
    alphas
  )

  np.testing.assert_allclose(slopes, 5 / np.sqrt(1 + 25 * alphas**2), rtol=1e-12)


@precise
def test_schedule_of_alpha_is_counted_in_calls():
  metric = monge(alpha=lambda count: 0.5 * count.astype(jnp.float64))
  g = jnp.array([0.6, 0.8])
  state = metric.init(g)
  assert state.count == 0

  for step in range(4):
    ascent, new_state = metric.ascend(g, state, g)
    np.testing.assert_allclose(ascent.slope, 1 / np.hypot(1, 0.5 * step), rtol=1e-12)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    assert new_state.count == step + 1
    state = new_state


@precise
@pytest.mark.parametrize('inner', ['number', 'schedule'])
def test_state_of_a_schedule_can_be_carried_by_scan(inner):
  schedule = optax.linear_schedule(0.0, 3.0, transition_steps=3)
  base = monge(schedule if inner == 'schedule' else 1.0)
  metric, g = monge(schedule, base), jnp.array([0.6, 0.8])

  def step(state, _):
    ascent, state = metric.ascend(g, state, g)
    return state, ascent.slope

  state, slopes = jax.lax.scan(step, metric.init(g), length=5)

  ramp = np.array([0.0, 1.0, 2.0, 3.0, 3.0])
  total = ramp**2 + (ramp**2 if inner == 'schedule' else 1.0)
  np.testing.assert_allclose(slopes, 1 / np.sqrt(1 + total), rtol=1e-6)
  assert [int(count) for count in jax.tree.leaves(state)] == [5] * (
    2 if inner == 'schedule' else 1
  )


@precise
def test_negative_alpha_is_refused_as_a_jax_array():
  with pytest.raises(ValueError, match=r'`alpha` .*got Array\(-2\.'):
    monge(jnp.array(-2.0))


@precise
@pytest.mark.parametrize(
  'base',
  [euclidean, lambda g: g, None, 1.0],
  ids=['factory', 'function', 'None', 'float'],
)
def test_base_that_is_no_metric_is_refused(base):
  """Above all the factory, with its parentheses forgotten."""
  with pytest.raises(
    TypeError, match=f'`base` must be a Metric.*{re.escape(repr(base)[:9])}'
  ):
    monge(base=base)


# Capped.

DENSE = {
  'euclidean': (euclidean(), identity),
  'adaptive': (adaptive(0.1), asam(0.1, MATRICES)),
  'diagonal_fisher': (diagonal_fisher(0.3), fisher(0.3)),
}


@precise
@pytest.mark.parametrize('sigma', [0.01, 1.0, 3.0, 100.0])
@pytest.mark.parametrize(('base', 'matrix'), DENSE.values(), ids=DENSE)
def test_capped_is_a_base_that_is_longer_where_it_is_steep(base, matrix, sigma):
  """``G = max(1, s²/σ²) B``, where ``s`` is the slope under ``B``."""
  grads, params = random_tree(23), random_tree(24)
  g, B = flat(grads), matrix(flat(grads), flat(params))
  G = max(1.0, g @ np.linalg.solve(B, g) / sigma**2) * B

  direction, slope, _ = ascend(capped(base, sigma), grads, params)

  u = np.linalg.solve(G, g)
  np.testing.assert_allclose(flat(direction), u / np.sqrt(g @ u), rtol=1e-11)
  np.testing.assert_allclose(slope, np.sqrt(g @ u), rtol=1e-12)


@precise
@pytest.mark.parametrize('n', [1e-3, 0.2, 0.9, 1.1, 5.0, 1e4])
def test_capped_has_the_radius_of_le_sam(n):
  """``min(ρ, σ′/‖g‖)``, where ``σ′ = ρσ`` is the largest rise."""
  rho, largest_rise, w = 0.3, 0.6, jnp.array([0.5, -1.0])
  g = n * jnp.array([0.6, -0.8])
  tx = sharpness_aware(capped(sigma=largest_rise / rho), rho)

  probe, state = tx.update(g, tx.init(w), w, grad_fn=lambda probe: probe)

  radius = min(rho, largest_rise / n)
  np.testing.assert_allclose(optax.tree.get(state, 'radius'), radius, rtol=1e-9)
  chex.assert_trees_all_close(probe, w + radius * g / n, rtol=1e-12)


@precise
@every_base
def test_capped_above_the_slope_is_its_base(base):
  grads, params = random_tree(25), random_tree(26)
  bare = ascend(base, grads, params)

  for factor in (1.0, 1.001, 1e6):
    got = ascend(capped(base, factor * bare.slope), grads, params)
    chex.assert_trees_all_close(got, bare, rtol=1e-15)
  below = ascend(capped(base, 0.5 * bare.slope), grads, params)
  half = jax.tree.map(lambda x: 0.5 * x, bare)
  chex.assert_trees_all_close(below, half, rtol=1e-15)


@precise
@every_base
def test_capped_and_monge_have_the_same_bound_and_monge_is_shorter(base):
  params = random_tree(27)
  for scale in (1e-4, 1.0, 1e4):
    grads = jax.tree.map(lambda g, c=scale: c * g, random_tree(28))
    hard = ascend(capped(base, 0.25), grads, params)
    soft = ascend(monge(4.0, base), grads, params)
    assert soft.slope <= hard.slope <= 0.25 * (1 + 1e-15)
    # They differ the most where the slope is the bound, by √2.
    assert hard.slope <= np.sqrt(2) * soft.slope * (1 + 1e-15)


@every_base
def test_capped_at_zero_does_not_move(base):
  grads = jax.tree.map(lambda g: g.astype(jnp.float32), random_tree(29))

  direction, slope, _ = ascend(capped(base, 0.0), grads, grads)

  chex.assert_trees_all_equal(direction, jax.tree.map(jnp.zeros_like, grads))
  assert slope == 0


@pytest.mark.parametrize('sigma', [0.0, 0.5, 1e30])
@every_base
def test_capped_has_no_direction_without_a_gradient(base, sigma):
  zeros = {'w': jnp.zeros((2, 2)), 'b': jnp.zeros(2)}

  ascent = ascend(capped(base, sigma), zeros, {'w': jnp.eye(2), 'b': jnp.ones(2)})

  chex.assert_trees_all_equal(ascent[:2], (zeros, jnp.float32(0.0)))
  assert not ascent.length


@pytest.mark.parametrize('n', [1e-30, 1e-5, 1e5, 1e30])
def test_capped_at_any_magnitude(n):
  g = n * jnp.array([0.6, 0.8])

  direction, slope, _ = ascend(capped(sigma=1.0), g)

  factor = min(1.0, 1 / n)
  np.testing.assert_allclose(slope, n * factor, rtol=1e-6)
  np.testing.assert_allclose(direction, factor * np.array([0.6, 0.8]), rtol=1e-6)


def test_sigma_may_be_a_schedule():
  """Counted in steps, as LE-SAM anneals it; the state is carried by a scan."""
  g, w = jnp.array([3.0, 4.0]), jnp.zeros(2)
  schedule = optax.linear_schedule(8.0, 0.0, transition_steps=4)
  tx = sharpness_aware(capped(sigma=schedule), rho=0.1)

  def step(state, _):
    probe, state = tx.update(g, state, w, grad_fn=lambda probe: probe)
    return state, (state.slope, jnp.asarray(probe))

  state, (slopes, probes) = jax.lax.scan(step, tx.init(w), length=6)

  sigma = np.array([8.0, 6.0, 4.0, 2.0, 0.0, 0.0])
  want = np.minimum(5.0, sigma)
  np.testing.assert_allclose(slopes, want, rtol=1e-6)
  np.testing.assert_allclose(probes, 0.1 * np.outer(want / 5, [0.6, 0.8]), rtol=1e-6)
  assert state.metric_state.count == 6


@pytest.mark.parametrize('n', [0.0, 1.0])
@pytest.mark.parametrize(
  'make', [monge, lambda x: capped(sigma=x)], ids=['alpha', 'sigma']
)
def test_a_number_that_is_nan_is_seen(make, n):
  """Also where there is no gradient: in what comes out of the chain."""
  w, g = jnp.ones(2), n * jnp.array([0.6, 0.8])

  @jax.jit
  def run(x):
    tx = sharpness_aware(make(x), rho=0.1)
    return tx.update(g, tx.init(w), w, grad_fn=lambda probe: probe)

  update, state = run(jnp.float32(jnp.nan))

  assert np.isnan(update).all()
  assert not state.finite
  healthy, state = run(jnp.float32(1.0))
  assert np.isfinite(healthy).all()
  assert state.finite


@pytest.mark.parametrize(
  ('make', 'error', 'message'),
  [
    (lambda: capped(sigma=-1.0), ValueError, '`sigma` must be finite and >= 0, got -1'),
    (lambda: capped(sigma=np.nan), ValueError, '`sigma` must be finite and >= 0'),
    (lambda: capped(sigma='1'), TypeError, '`sigma` must be a real number'),
    (lambda: capped(2.0), TypeError, '`base` must be a Metric.*got 2.0'),
    (lambda: capped(euclidean), TypeError, '`base` must be a Metric'),
  ],
  ids=['negative', 'nan', 'str', 'number as base', 'factory'],
)
def test_capped_refuses(make, error, message):
  with pytest.raises(error, match=message):
    make()


# A unit rise.


def dense_ascent(matrix, grads, params):
  """``B⁻¹g/s`` and ``s`` by a dense solve."""
  g = flat(grads)
  u = np.linalg.solve(matrix(g, flat(params)), g)
  return u / np.sqrt(g @ u), np.sqrt(g @ u)


@precise
@pytest.mark.parametrize('radius', [0.0, 0.02, 3.0, 1e6, np.inf])
@pytest.mark.parametrize(('base', 'matrix'), DENSE.values(), ids=DENSE)
def test_unit_rise_is_monge_with_the_rise_that_is_allowed(base, matrix, radius):
  grads, params, rise = random_tree(31), random_tree(32), 0.3
  u, s = dense_ascent(matrix, grads, params)

  ascent, _ = unit_rise(base, radius).ascend(grads, (), params, rho=rise)

  delta = rise * u / s if radius == np.inf else radius * u
  if 0 < radius < np.inf:
    delta /= np.sqrt(1 + (radius * s / rise) ** 2)
  np.testing.assert_allclose(rise * flat(ascent.direction), delta, rtol=1e-12)
  np.testing.assert_allclose(ascent.slope, flat(grads) @ delta / rise, rtol=1e-12)


@pytest.mark.parametrize('n', [1e-37, 1e-30, 1e-5, 1e5, 1e30])
def test_unit_rise_at_any_magnitude(n):
  g, w = n * jnp.array([0.6, 0.8]), jnp.zeros(2)
  step = lambda radius, rise: unit_rise(max_radius=radius).ascend(g, (), w, rho=rise)

  (free, slope, _), _ = step(np.inf, 0.1)
  (bounded, *_), _ = step(0.5, 0.1)

  np.testing.assert_allclose(free, np.array([0.6, 0.8]) / n, rtol=1e-6)
  np.testing.assert_allclose(slope, 1.0, rtol=1e-6)
  length = 0.5 / np.sqrt(1 + (5 * n) ** 2)
  np.testing.assert_allclose(0.1 * bounded, length * np.array([0.6, 0.8]), rtol=1e-6)


@pytest.mark.parametrize(('radius', 'rise'), [(np.inf, 0.1), (0.5, 0.1), (0.0, 0.0)])
def test_unit_rise_has_no_direction_without_a_gradient(radius, rise):
  zeros = jnp.zeros(2)
  ascent, _ = unit_rise(max_radius=radius).ascend(zeros, (), zeros, rho=rise)
  chex.assert_trees_all_equal(ascent[:2], (zeros, jnp.float32(0.0)))
  assert not ascent.length


def test_half_precision_does_not_overflow_where_the_gradient_is_small():
  """``u/s`` is larger than float16 has numbers for, and the step is not."""
  w, g = jnp.zeros(2, jnp.float16), jnp.array([0.0, 1e-6], jnp.float16)
  tx = msam(np.inf, max_rise=1e-5)
  probe, _ = tx.update(g, tx.init(w), w, grad_fn=lambda probe: probe)
  np.testing.assert_allclose(np.asarray(probe), [0, 1e-5 / float(g[1])], rtol=1e-3)


def square(w):
  return 0.5 * jnp.sum(w**2 * jnp.array([1.0, 3.0]))


def one_step(tx, w=(0.6, -0.8)):
  w, grad_fn = jnp.array(w), jax.grad(square)
  update, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
  return np.asarray(update), state


def test_msam_by_its_rise_is_msam_by_its_alpha():
  by_rise, state = one_step(msam(0.3, max_rise=0.15, base=adaptive(weights=True)))
  by_alpha, expected = one_step(msam(0.3, alpha=2.0, base=adaptive(weights=True)))
  np.testing.assert_allclose(by_rise, by_alpha, rtol=1e-6)
  np.testing.assert_allclose(state.radius, expected.radius, rtol=1e-6)
  np.testing.assert_allclose(0.15 * state.slope, 0.3 * expected.slope, rtol=1e-6)


def test_without_a_largest_radius_the_rise_is_the_one_allowed():
  update, state = one_step(msam(np.inf, max_rise=0.2))
  w, h = np.array([0.6, -0.8]), np.array([1.0, 3.0])
  g = h * w
  delta = 0.2 * g / (g @ g)
  np.testing.assert_allclose(update, h * (w + delta), rtol=1e-6)
  np.testing.assert_allclose(state.radius, 0.2 / np.linalg.norm(g), rtol=1e-6)
  np.testing.assert_allclose(state.slope, 1.0, rtol=1e-6)


@pytest.mark.parametrize('injected', [False, True], ids=['schedules', 'injected'])
def test_rise_and_largest_radius_may_be_schedules(injected):
  radii, rises = jnp.array([np.inf, 0.5, 0.1]), jnp.array([0.1, 0.3, 0.2])
  make = optax.inject_hyperparams(msam) if injected else msam
  tx = make(rho=lambda i: radii[i], max_rise=lambda i: rises[i])
  w, g = jnp.zeros(2), jnp.array([3.0, 4.0])
  state = tx.init(w)
  step = jax.jit(lambda state: tx.update(g, state, w, grad_fn=lambda probe: probe))
  for radius, rise in zip(radii, rises, strict=True):
    probe, state = step(state)
    length = 1 / np.hypot(5 / rise, 1 / radius)
    np.testing.assert_allclose(probe, length * np.array([0.6, 0.8]), rtol=1e-6)
  assert optax.tree.get(state, 'metric_state') == (() if injected else (3, ()))


def test_numbers_that_go_wrong_under_inject_hyperparams_are_seen():
  tx = optax.inject_hyperparams(msam)(rho=np.inf, max_rise=0.1)
  w = jnp.ones(2)
  state = tx.init(w)
  step = jax.jit(lambda state: tx.update(w, state, w, grad_fn=lambda probe: probe)[0])
  assert np.isfinite(step(state)).all()
  for name, value in [('rho', -1.0), ('rho', np.nan), ('max_rise', np.inf)]:
    wrong = {**state.hyperparams, name: jnp.float32(value)}
    assert np.isnan(step(state._replace(hyperparams=wrong))).all()


@pytest.mark.parametrize(
  ('make', 'error', 'message'),
  [
    (lambda: unit_rise(max_radius=-1.0), ValueError, '`max_radius` must be >= 0, got'),
    (lambda: unit_rise(max_radius=np.nan), ValueError, '`max_radius` must be >= 0, go'),
    (lambda: unit_rise(2.0), TypeError, '`base` must be a Metric.*got 2.0'),
    (lambda: msam(-1.0, max_rise=0.1), ValueError, '`rho` must be >= 0, got -1'),
    (lambda: msam(max_rise=np.inf), ValueError, '`max_rise` must be finite and >= 0'),
    (lambda: msam(np.inf), ValueError, '`rho` must be finite and >= 0, got inf'),
    (lambda: msam(alpha=2.0, max_rise=0.1), ValueError, 'both `alpha` and `max_rise`'),
    (
      lambda: msam(alpha=lambda count: 1.0, max_rise=0.1),
      ValueError,
      'both `alpha` and `max_rise`',
    ),
    (
      lambda: optax.inject_hyperparams(msam)(alpha=2.0, max_rise=0.1).init(PARAMS),
      ValueError,
      'both `alpha` and `max_rise`',
    ),
    (
      lambda: unit_rise(max_radius=1.0).ascend(jnp.ones(2), (), None),
      ValueError,
      'needs the radius of the step, `rho`',
    ),
  ],
  ids=range(10),
)
def test_unit_rise_refuses(make, error, message):
  with pytest.raises(error, match=message):
    make()


@pytest.mark.parametrize('s', [-4.0, 0.0, 4.0])
def test_along_a_mean_of_gradients_the_loss_may_fall(s):
  """The step is as long as if the loss rose as fast."""
  u = jnp.array([0.6, 0.8])
  falling = Metric(
    lambda params: (),
    lambda grads, state, params, **extra_args: (Ascent(u, jnp.float32(s)), state),
  )
  size = abs(s)
  for metric, factor in [
    (monge(0.5, falling), 1 / np.sqrt(1 + 0.25 * size**2)),
    (capped(falling, 0.5), min(1, 0.5 / size) if size else 1),
    (unit_rise(falling, 2.0), 1 / np.hypot(size, 0.3 / 2.0)),
  ]:
    (direction, slope, _), _ = metric.ascend(u, (), u, rho=0.3)
    np.testing.assert_allclose(direction, factor * u, rtol=1e-6)
    np.testing.assert_allclose(slope, factor * s, rtol=1e-6)


# On devices. The loss is ‖w‖²/2, so that the gradient at the probe is the probe.

PARAMS = {
  'kernel': np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32),
  'bias': np.random.default_rng(1).normal(size=8).astype(np.float32),
}
SHARDED = {'kernel': P('i'), 'bias': P('i')}
WHOLE_KERNEL = {'kernel': P(), 'bias': P('i')}
RHO = 0.3


def euclidean_by_hand(w):
  n = np.linalg.norm(np.concatenate([x.ravel() for x in w.values()]))
  return {name: x / n for name, x in w.items()}, n


def max_norm_by_hand(w):
  return {name: np.sign(x) for name, x in w.items()}, sum(
    np.sum(np.abs(x)) for x in w.values()
  )


def spectral_by_hand(w):
  U, s, Vt = np.linalg.svd(w['kernel'], full_matrices=False)
  n = np.linalg.norm(w['bias'])
  return {'kernel': U @ Vt, 'bias': w['bias'] / n}, np.sum(s) + n


def monge_by_hand(by_hand, alpha, w):
  direction, slope = by_hand(w)
  factor = 1 / np.sqrt(1 + alpha**2 * slope**2)
  return {name: factor * d for name, d in direction.items()}, slope * factor


def capped_by_hand(by_hand, sigma, w):
  direction, slope = by_hand(w)
  factor = min(1.0, sigma / slope)
  return {name: factor * d for name, d in direction.items()}, slope * factor


ON_DEVICES = {
  'monge over max_norm': (
    monge(0.1, max_norm()),
    functools.partial(monge_by_hand, max_norm_by_hand, 0.1),
    SHARDED,
  ),
  'monge over spectral': (
    monge(0.1, spectral()),
    functools.partial(monge_by_hand, spectral_by_hand, 0.1),
    WHOLE_KERNEL,
  ),
  'monge over spectral over max_norm': (
    monge(0.1, spectral(max_norm(), matrices=False)),
    functools.partial(monge_by_hand, max_norm_by_hand, 0.1),
    SHARDED,
  ),
  'capped': (
    capped(sigma=2.0),
    functools.partial(capped_by_hand, euclidean_by_hand, 2.0),
    SHARDED,
  ),
  'capped over spectral': (
    capped(spectral(), sigma=2.0),
    functools.partial(capped_by_hand, spectral_by_hand, 2.0),
    WHOLE_KERNEL,
  ),
}
on_every_device = pytest.mark.parametrize(
  ('metric', 'by_hand', 'specs'), ON_DEVICES.values(), ids=ON_DEVICES
)


def step_of(metric, **kwargs):
  """``params -> (probe, slope, radius)``."""
  tx = sharpness_aware(metric, RHO, **kwargs)

  def step(params):
    probe, state = tx.update(params, tx.init(params), params, grad_fn=lambda p: p)
    return probe, state.slope, state.radius

  return step


def assert_step(got, by_hand):
  direction, slope = by_hand({name: w.astype(np.float64) for name, w in PARAMS.items()})
  probe = {name: PARAMS[name] + RHO * d for name, d in direction.items()}
  chex.assert_trees_all_close(jax.device_get(got[0]), probe, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(got[1], slope, rtol=1e-5)
  length = np.sqrt(sum(np.sum(d**2) for d in direction.values()))
  np.testing.assert_allclose(got[2], RHO * length, rtol=1e-5)


@pytest.mark.cpu
@pytest.mark.parametrize('check_vma', [False, True], ids=['unchecked', 'checked'])
@on_every_device
def test_in_shard_map_as_on_one_device(metric, by_hand, specs, check_vma):
  step = on_devices(
    step_of(metric, param_specs=specs),
    mesh=mesh(i=4),
    in_specs=(specs,),
    out_specs=(specs, P(), P()),
    check_vma=check_vma,
  )
  assert_step(step(PARAMS), by_hand)


@pytest.mark.slow
@pytest.mark.cpu
@pytest.mark.parametrize('spec', [P('i'), P(None, 'i')], ids=['rows', 'columns'])
@on_every_device
def test_under_jit_with_sharded_arrays_as_on_one_device(metric, by_hand, specs, spec):
  specs = {'kernel': spec, 'bias': P('i')}
  put = lambda w, spec: jax.device_put(w, NamedSharding(mesh(i=4), spec))
  params = {name: put(w, specs[name]) for name, w in PARAMS.items()}
  assert_step(jax.jit(step_of(metric))(params), by_hand)


@pytest.mark.slow
@pytest.mark.cpu
@has_explicit_sharding
@pytest.mark.parametrize('spec', [P('i'), P(None, 'i')], ids=['rows', 'columns'])
@on_every_device
def test_where_shardings_are_types_as_on_one_device(metric, by_hand, specs, spec):
  specs = {'kernel': spec, 'bias': P('i')}
  on = jax.sharding.Mesh(
    mesh(i=4).devices, ('i',), axis_types=(jax.sharding.AxisType.Explicit,)
  )
  put = lambda w, spec: jax.device_put(w, NamedSharding(on, spec))
  params = {name: put(w, specs[name]) for name, w in PARAMS.items()}
  with jax.set_mesh(on):
    got = jax.jit(step_of(metric))(params)
  assert_step(got, by_hand)
  for name, w in params.items():
    assert got[0][name].sharding.is_equivalent_to(w.sharding, w.ndim)


@pytest.mark.cpu
@pytest.mark.parametrize('spec', [P('i'), P(None, 'i')], ids=['rows', 'columns'])
def test_a_matrix_in_shards_is_refused_by_its_path(spec):
  specs = {'kernel': spec, 'bias': P()}
  step = on_devices(
    step_of(monge(base=spectral()), param_specs=specs),
    mesh=mesh(i=4),
    in_specs=(specs,),
    out_specs=(specs, P(), P()),
  )
  message = r"whole matrices, but .* the leaf at \['kernel'\] is sharded over \('i',\)"
  with pytest.raises(ValueError, match=message):
    step(PARAMS)


@pytest.mark.slow
def test_msam_is_monge_over_its_base():
  base = spectral(max_norm())
  params = jax.tree.map(jnp.asarray, PARAMS)
  tx = msam(RHO, 0.1, base=base)

  probe, _ = tx.update(params, tx.init(params), params, grad_fn=lambda p: p)

  want, _, _ = step_of(monge(0.1, base))(params)
  chex.assert_trees_all_equal(probe, want)
