"""Metrics with a memory against their rules in NumPy, over steps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax
from msam_optax import adaptive
from msam_optax import Ascent
from msam_optax import diagonal_fisher
from msam_optax import euclidean
from msam_optax import max_norm
from msam_optax import monge
from msam_optax import monge_average
from msam_optax import residual
from msam_optax import sharpness_aware
from msam_optax import smoothed
from tests.devices.test_parallel import mesh
from tests.devices.test_parallel import on_devices
from tests.devices.test_parallel import P
from tests.devices.test_parallel import vary

RNG = np.random.default_rng(0)
STEPS = RNG.normal(size=(4, 6))
W = RNG.normal(size=6)
ADAPTIVE = adaptive(0.1, weights=True)


def climb(metric, gradients, w=W, state=None, **kwargs):
  """The ascents of one step after the other, in one program; and the last state."""
  w = jax.tree.map(jnp.asarray, w)
  state = metric.init(w) if state is None else state

  def step(state, g):
    ascent, state = metric.ascend(g, state, w, **kwargs)
    return state, ascent

  state, ascents = jax.lax.scan(step, state, gradients)
  return ascents, state


# The rules, as the authors have them.


def vasso(gradients, B, theta):
  """Li & Giannakis: the first mean is the first gradient; then θ is the new one's."""
  d = None
  for g in gradients:
    d = g if d is None else (1 - theta) * d + theta * g
    u = np.linalg.solve(B, d)
    yield u / np.sqrt(d @ u)


def friendly(gradients, B, sigma, decay):
  """Li et al.: the mean that is subtracted has not seen this gradient."""
  m = None
  for g in gradients:
    rest = g if m is None else g - sigma * m
    m = g if m is None else decay * m + (1 - decay) * g
    u = np.linalg.solve(B, rest)
    yield u / np.sqrt(rest @ u)


def langevin(gradients, B, decay, alpha):
  """Yu et al.: the mean begins at zero, and has seen this gradient."""
  m = np.zeros_like(gradients[0])
  for g in gradients:
    m = decay * m + (1 - decay) * g
    # By a root of the matrix, which is better conditioned where m is long.
    root = np.vstack([np.sqrt(B), alpha * m])
    u = np.linalg.lstsq(root, np.append(g / np.sqrt(np.diag(B)), 0.0), rcond=None)[0]
    yield u / np.sqrt(g @ u)


BASES = {
  'euclidean': (euclidean(), np.eye(6)),
  'adaptive': (ADAPTIVE, np.diag((np.abs(W) + 0.1) ** -2)),
}
RULES = {
  'smoothed': (lambda base: smoothed(base, 0.3), lambda g, B: vasso(g, B, 0.7)),
  'residual': (
    lambda base: residual(base, 0.8, 0.6),
    lambda g, B: friendly(g, B, 0.8, 0.6),
  ),
  'monge_average': (
    lambda base: monge_average(0.7, 1.3, base),
    lambda g, B: langevin(g, B, 0.7, 1.3),
  ),
}
every_rule = pytest.mark.parametrize('name', RULES)


@every_rule
@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(('base', 'matrix'), BASES.values(), ids=BASES)
def test_is_the_rule_of_the_authors(name, base, matrix):
  make, rule = RULES[name]

  ascents, _ = climb(make(base), STEPS)

  expected = np.stack(list(rule(STEPS, matrix)))
  np.testing.assert_allclose(ascents.direction, expected, rtol=1e-10)
  slopes = np.sum(STEPS * expected, axis=1)
  np.testing.assert_allclose(ascents.slope, slopes, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(
  ('metric', 'limit'),
  [
    (smoothed(ADAPTIVE, 0), ADAPTIVE),
    (residual(ADAPTIVE, sigma=0.0), ADAPTIVE),
    (monge_average(0.0, 1.3, ADAPTIVE), monge(1.3, ADAPTIVE)),
    (monge_average(0.9, 0.0, ADAPTIVE), ADAPTIVE),
    (monge_average(1, 1.3, ADAPTIVE), ADAPTIVE),
  ],
  ids=['no decay', 'no sigma', 'no decay, Monge', 'no alpha', 'no new ones'],
)
def test_limits(metric, limit):
  got, expected = climb(metric, STEPS)[0], climb(limit, STEPS)[0]
  chex.assert_trees_all_close(got, expected, rtol=1e-10)


def test_the_authors_defaults():
  """θ = 0.9 is how much a new gradient counts, σ = 1, and λ = 0.9 of the mean stays."""
  for metric, rule in [
    (smoothed(), vasso(STEPS, np.eye(6), 0.9)),
    (residual(), friendly(STEPS, np.eye(6), 1.0, 0.9)),
    (monge_average(), langevin(STEPS, np.eye(6), 0.9, 1.0)),
  ]:
    ascents, _ = climb(metric, STEPS.astype(np.float32))
    np.testing.assert_allclose(ascents.direction, np.stack(list(rule)), atol=2e-6)


@pytest.mark.parametrize('size', [1e3, 1e5])
def test_a_mean_that_is_long_costs_no_digits(size):
  """The form that subtracts has an error of 4e-2 at ``α²‖m‖² = 1e6``."""
  gradients = (size * STEPS).astype(np.float32)

  ascents, _ = climb(monge_average(0.5), gradients)

  exact = np.stack(list(langevin(gradients.astype(np.float64), np.eye(6), 0.5, 1.0)))
  np.testing.assert_allclose(ascents.direction[1:], exact[1:], atol=1e-6)
  slopes = np.sum(gradients * exact, axis=1)
  np.testing.assert_allclose(ascents.slope, slopes, rtol=3e-6)


@every_rule
@pytest.mark.parametrize('size', [1e-30, 1e30])
def test_at_any_magnitude(name, size):
  make, rule = RULES[name]
  metric = make(euclidean())
  if name == 'monge_average':
    metric = monge_average(0.7, 1.3 / size)
  ascents, _ = climb(metric, (size * STEPS).astype(np.float32))
  exact = np.stack(list(rule(STEPS, np.eye(6))))
  np.testing.assert_allclose(ascents.direction, exact, atol=2e-6)
  slopes = np.sum(STEPS * exact, axis=1)
  np.testing.assert_allclose(ascents.slope / size, slopes, atol=1e-5)


@every_rule
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_step_that_is_not_finite_has_not_been(name, bad):
  metric = RULES[name][0](euclidean())
  gradients = STEPS.astype(np.float32)
  spoilt = gradients[1].copy()
  spoilt[2] = bad
  with_bad = np.stack([spoilt, gradients[0], spoilt, gradients[1]])

  ascents, state = climb(metric, with_bad)

  expected, expected_state = climb(metric, gradients[:2])
  chex.assert_trees_all_equal(state, expected_state)
  pick = lambda rows: jax.tree.map(lambda x: x[np.array(rows)], ascents)
  chex.assert_trees_all_equal(pick([1, 3]), expected)
  assert not np.any(pick([0, 2]).direction)
  assert state.count == 2


@every_rule
def test_a_zero_gradient_has_no_direction_and_is_remembered(name):
  metric = RULES[name][0](euclidean())
  gradients = STEPS[:2].astype(np.float32)
  gradients[1] = 0.0

  ascents, state = climb(metric, gradients)

  last = jax.tree.map(lambda x: x[1], ascents)
  chex.assert_trees_all_equal(last, Ascent(np.zeros(6, np.float32), np.float32(0)))
  assert np.linalg.norm(state.average) < np.linalg.norm(gradients[0])


def test_memory_of_half_precision_is_float32():
  """In bfloat16 a mean would not move by a thousandth."""
  g = {'a': jnp.ones(3, jnp.bfloat16), 'b': jnp.ones(2, jnp.float32)}
  ascents, state = climb(
    smoothed(decay=0.999), jax.tree.map(lambda x: jnp.stack([x, 2 * x, 2 * x]), g), w=g
  )
  for leaf in jax.tree.leaves(state.average):
    assert leaf.dtype == jnp.float32
    np.testing.assert_allclose(leaf, 1.001999, rtol=1e-6)
  assert ascents.direction['a'].dtype == jnp.bfloat16


# Over Monge, and in a chain.


def test_monge_over_a_mean_bounds_the_rise_of_this_batch():
  alpha, rho = 2.0, 0.5
  tx = sharpness_aware(monge(alpha, smoothed(decay=0.6)), rho)
  w, state, d = jnp.asarray(W, jnp.float32), None, None
  state = tx.init(w)
  step = jax.jit(lambda g, s: tx.update(g, s, w, grad_fn=lambda probe: probe - w))
  for g in STEPS:
    delta, state = step(jnp.asarray(g, jnp.float32), state)
    d = g if d is None else 0.6 * d + 0.4 * g
    unit = d / np.linalg.norm(d)
    expected = rho * unit / np.sqrt(1 + alpha**2 * (g @ unit) ** 2)
    np.testing.assert_allclose(delta, expected, atol=1e-6)
    np.testing.assert_allclose(rho * state.slope, g @ expected, atol=1e-6)
    assert abs(g @ expected) < rho / alpha


@every_rule
def test_the_memory_is_of_the_mean_over_replicas(name):
  make, rule = RULES[name]
  tx = sharpness_aware(make(euclidean()), 0.1, axis_name='i')
  w = jnp.zeros(6)
  gradients = STEPS.reshape(2, 2, 6).astype(np.float32)  # Steps, replicas.

  def both_steps(gradients):
    probes, state = None, tx.init(w)
    for g in gradients:
      probes, state = tx.update(g, state, w, grad_fn=lambda probe: probe)
    return probes, state

  probes, state = jax.jit(jax.vmap(both_steps, in_axes=1, axis_name='i'))(gradients)

  means = gradients.mean(axis=1, dtype=np.float64)
  if name == 'smoothed':  # All go the same way.
    deltas = [list(rule(means, np.eye(6)))[1]]
  elif name == 'residual':
    rests = [g - 0.8 * means[0] for g in gradients[1]]
    deltas = [rest / np.linalg.norm(rest) for rest in rests]
  else:
    m = 0.7 * 0.3 * means[0] + 0.3 * means[1]
    us = [np.linalg.solve(np.eye(6) + 1.69 * np.outer(m, m), g) for g in gradients[1]]
    deltas = [u / np.sqrt(g @ u) for u, g in zip(us, gradients[1], strict=True)]
  np.testing.assert_allclose(probes[0], 0.1 * np.mean(deltas, axis=0), atol=1e-6)
  memory = state.metric_state.average
  np.testing.assert_array_equal(memory[0], memory[1])


@pytest.mark.slow
@every_rule
def test_sharded_over_devices(name):
  """Parts of the leaves on two devices, replicas on two more."""
  metric = RULES[name][0](ADAPTIVE)
  w = {'a': jnp.asarray(W, jnp.float32), 'b': jnp.ones(3)}
  specs = {'a': P('model'), 'b': P()}
  tx = sharpness_aware(metric, 0.1, axis_name='data', param_specs=specs)
  alone = sharpness_aware(metric, 0.1, axis_name='data')

  def steps(tx, w, x):
    update, state = None, tx.init(w)
    for i in range(2):
      grad_fn = lambda w, i=i: jax.tree.map(lambda p: p * x[i] + x[1 - i], w)
      update, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
    return update, state.metric_state.average

  x = np.array([[[0.3, 1.5]], [[-0.7, 0.4]]], np.float32)
  sharded = on_devices(
    lambda w, x: steps(tx, w, x[0, 0]),
    mesh(data=2, model=2),
    (specs, P('data')),
    (specs, specs),
    check_vma=False,
  )(w, x)
  whole = jax.vmap(lambda x: steps(alone, w, x[0]), axis_name='data')(x)
  chex.assert_trees_all_close(sharded, jax.tree.map(lambda y: y[0], whole), atol=1e-6)


def test_replicas_in_a_checked_shard_map():
  """The memory that they share does not vary over the axis, and so is given back."""
  tx = sharpness_aware(residual(), 0.1, axis_name='i')
  w = jnp.ones(3)
  state = tx.init(w)

  def step(w, state, x):
    w = vary(w)
    grad_fn = lambda w: w * x[0]
    update, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
    return update, state.metric_state

  x = np.array([[1.0, 2.0, 3.0], [3.0, 0.0, 1.0]], np.float32)
  run = on_devices(step, mesh(i=2), (P(), P(), P('i')), (P(), P()))
  _, metric_state = run(w, state, x)
  np.testing.assert_allclose(metric_state.average, x.mean(axis=0))


# What is wrong.


@pytest.mark.parametrize('base', [diagonal_fisher(), monge(), max_norm()], ids=range(3))
def test_a_base_that_is_no_matrix_gives_nan(base):
  ascents, _ = climb(monge_average(0.9, base=base), STEPS.astype(np.float32))
  assert np.isnan(ascents.slope[2:]).all()
  assert np.isnan(ascents.direction[2:]).all()


@pytest.mark.parametrize('base', [smoothed(), monge(lambda count: 1.0)], ids=range(2))
def test_a_base_with_a_state_is_no_matrix(base):
  with pytest.raises(ValueError, match=r'`base` of monge_average\(\) must be a matrix'):
    monge_average(base=base).init(jnp.ones(2))


def test_a_memory_of_a_memory():
  """The base may have one where it need not be a matrix: its direction is of m."""
  inner, outer = smoothed(decay=0.5), smoothed(smoothed(decay=0.5), decay=0.2)
  gradients = STEPS.astype(np.float32)
  ascents, state = climb(outer, gradients)
  d = [gradients[0]]
  for g in gradients[1:]:
    d.append(0.2 * d[-1] + 0.8 * g)
  expected, inner_state = climb(inner, np.stack(d))
  np.testing.assert_allclose(ascents.direction, expected.direction, atol=1e-6)
  np.testing.assert_allclose(state.base.average, inner_state.average, rtol=1e-6)


@pytest.mark.parametrize(
  'make',
  [
    lambda x: smoothed(decay=x),
    lambda x: residual(decay=x),
    lambda x: residual(sigma=-x),
    lambda x: monge_average(decay=x),
    lambda x: monge_average(alpha=-x),
  ],
  ids=range(5),
)
def test_numbers_out_of_range(make):
  with pytest.raises(ValueError, match=r'must be (between 0 and 1|finite and >= 0)'):
    make(1.5)
  g = jnp.ones(2)

  @jax.jit
  def run(x):
    metric = make(x)
    return metric.ascend(g, metric.init(g), g)

  ascent, state = run(jnp.float32(1.5))
  assert np.isnan(ascent.slope)
  assert np.isnan(ascent.direction).all()
  chex.assert_tree_all_finite(state)


def test_alpha_of_an_average_may_be_a_schedule():
  alphas = jnp.array([0.0, 2.0])
  metric = monge_average(0.0, lambda count: alphas[count])
  ascents, _ = climb(metric, np.array([[0.6, 0.8]] * 2, np.float32), w=np.ones(2))
  np.testing.assert_allclose(ascents.slope, [1.0, 1 / np.sqrt(5)], rtol=1e-6)


def test_a_memory_has_no_place_in_the_drop_in():
  f = msam_optax.value_and_grad(lambda w: jnp.sum(w**2), smoothed(), 0.1)
  with pytest.raises(ValueError, match='keeps a state from step to step'):
    f(jnp.ones(2))


def test_numbers_may_change_under_inject_hyperparams():
  @optax.inject_hyperparams
  def friendly_sam(rho, sigma):
    return sharpness_aware(residual(sigma=sigma), rho)

  tx = friendly_sam(rho=0.1, sigma=lambda count: jnp.array([1.0, 0.0])[count])
  w = jnp.zeros(2)
  state = tx.init(w)
  step = jax.jit(lambda g, s: tx.update(g, s, w, grad_fn=lambda probe: probe))
  for g in ([1.0, 0.0], [3.0, 4.0]):
    probe, state = step(jnp.array(g), state)
  np.testing.assert_allclose(probe, [0.06, 0.08], rtol=1e-6)
