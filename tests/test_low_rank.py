"""Metrics of several gradients against dense solves in NumPy."""

import functools

import chex
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msam_optax import adaptive
from msam_optax import Ascent
from msam_optax import diagonal_fisher
from msam_optax import euclidean
from msam_optax import fisher_alpha
from msam_optax import low_rank_monge
from msam_optax import monge
from msam_optax import msam
from msam_optax import neighborhood_monge
from msam_optax import sharpness_aware
from msam_optax import smoothed
from tests.devices.test_parallel import has_explicit_sharding
from tests.devices.test_parallel import mesh
from tests.devices.test_parallel import NamedSharding
from tests.devices.test_parallel import on_devices
from tests.devices.test_parallel import P
from tests.test_averages import climb

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(4, 6))
W = RNG.normal(size=6)
ADAPTIVE = adaptive(0.1, weights=True)
B_ADAPTIVE = np.diag((np.abs(W) + 0.1) ** -2)
precise = pytest.mark.usefixtures('x64')


def dense(g, rows, alpha, B=None):
  """The direction under ``B + (α²/r) Σ gᵢgᵢᵀ``, the slope, and that matrix."""
  rows = np.asarray(rows, np.float64)
  G = np.eye(len(g)) if B is None else B
  G = G + alpha**2 / len(rows) * rows.T @ rows
  u = np.linalg.solve(G, g)
  return u / np.sqrt(g @ u), np.sqrt(g @ u), G


def ascend(metric, g, w=W, grad_fn=None, **kwargs):
  """The first step, in one program."""

  @jax.jit
  def first(g, w, kwargs):
    return metric.ascend(g, metric.init(w), w, grad_fn=grad_fn, **kwargs)[0]

  return first(g, w, kwargs)


# Gradients that are given.


@functools.cache
def compiled(alpha_dtype):
  del alpha_dtype
  return jax.jit(
    lambda g, rows, w, alpha: ascend(
      low_rank_monge(alpha=alpha, base=ADAPTIVE), g, w, gradients=rows
    )
  )


@precise
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
  st.integers(0, 2**32 - 1), st.floats(0.0, 100.0), st.sampled_from(['mean', 'any'])
)
def test_is_a_dense_solve(seed, alpha, kind):
  rng = np.random.default_rng(seed)
  rows, w = rng.normal(size=(3, 6)), rng.normal(size=6)
  g = rows.mean(axis=0) if kind == 'mean' else rng.normal(size=6)

  direction, slope, _ = compiled('float64')(g, rows, w, alpha)

  expected, s, _ = dense(g, rows, alpha, np.diag((np.abs(w) + 0.1) ** -2))
  np.testing.assert_allclose(direction, expected, atol=1e-8 * np.abs(expected).max())
  np.testing.assert_allclose(slope, s, rtol=1e-9)


@precise
def test_one_gradient_is_monge_and_all_are_the_empirical_fisher_matrix():
  """The bridge: from the mean of a batch, over micro-batches, to its examples."""
  x, y = RNG.normal(size=(12, 6)), RNG.normal(size=12)
  loss = lambda w, x, y: jnp.mean((x @ w - y) ** 2)
  example_grads = -2 * (y - x @ W)[:, None] * x
  g = jax.grad(loss)(jnp.asarray(W), x, y)
  in_parts = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))

  for parts in (1, 3, 12):
    gradients = in_parts(W, x.reshape(parts, -1, 6), y.reshape(parts, -1))
    direction, slope, _ = ascend(low_rank_monge(alpha=0.5), g, gradients=gradients)
    means = example_grads.reshape(parts, -1, 6).mean(axis=1)
    expected, s, _ = dense(np.asarray(g), means, 0.5)
    np.testing.assert_allclose(direction, expected, rtol=1e-8)
    np.testing.assert_allclose(slope, s, rtol=1e-10)
    if parts == 1:
      of_monge = ascend(monge(0.5), g)
      chex.assert_trees_all_close((direction, slope), of_monge[:2], rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize('size', [1e-30, 1e-3, 1e3, 1e5, 1e30])
@pytest.mark.parametrize('kind', ['mean', 'one of them', 'nearly the same'])
def test_float32_at_any_magnitude(kind, size):
  """In the length of the metric, which counts what is steep the most."""
  rows = ROWS[:3].copy()
  if kind == 'nearly the same':
    rows[1:] = rows[0] + 1e-3 * rows[1:]
  g = rows[0] if kind == 'one of them' else rows.mean(axis=0)
  alpha = 1.0 if 1e-3 <= size <= 1e5 else 3.0 / size

  single = lambda x: jnp.asarray(size * x, jnp.float32)
  metric = low_rank_monge(alpha=alpha)
  direction, slope, _ = ascend(metric, single(g), np.float32(W), gradients=single(rows))

  expected, s, G = dense(g, rows, alpha * size)
  error = np.asarray(direction, np.float64) - expected
  assert np.sqrt(error @ G @ error) < (1e-3 if kind == 'nearly the same' else 1e-5)
  np.testing.assert_allclose(slope / np.float32(size), s, rtol=1e-4)


def test_a_gradient_that_is_nearly_along_the_others():
  """Rounding leaves a part of it along them, which a long metric counts 10⁴ times."""
  alpha, m = 1e4, ROWS.ravel() / np.linalg.norm(ROWS)
  noise = RNG.normal(size=(3, m.size))
  rows = np.stack([m, m + 0.01 * noise[0], m + 0.01 * noise[1]]).astype(np.float32)
  g = (rows.mean(axis=0) + 0.001 * noise[2]).astype(np.float32)

  direction, slope, _ = ascend(low_rank_monge(alpha=alpha), g, g, gradients=rows)

  # By a root of the matrix, which is better conditioned.
  root = np.vstack([np.eye(m.size), alpha / np.sqrt(3) * rows])
  u, *_ = np.linalg.lstsq(root, np.append(g, np.zeros(3)), rcond=None)
  s = np.sqrt(g @ u)
  error = np.asarray(direction, np.float64) - u / s
  assert np.linalg.norm(root @ error) < 2e-3
  np.testing.assert_allclose(slope, s, rtol=1e-5)


@pytest.mark.slow
def test_gradients_that_are_the_same_or_zero():
  rows = np.stack([ROWS[0], ROWS[0], 0 * ROWS[0]]).astype(np.float32)
  ascent = ascend(low_rank_monge(alpha=2.0), rows[0], np.float32(W), gradients=rows)
  expected, s, _ = dense(rows[0].astype(np.float64), rows, 2.0)
  np.testing.assert_allclose(ascent.direction, expected, rtol=1e-5)
  np.testing.assert_allclose(ascent.slope, s, rtol=1e-6)
  none = ascend(low_rank_monge(), rows[0], np.float32(W), gradients=0 * rows)
  chex.assert_trees_all_close(none[:2], ascend(euclidean(), rows[0])[:2], rtol=1e-6)
  zero = ascend(low_rank_monge(), 0 * rows[0], np.float32(W), gradients=rows)
  chex.assert_trees_all_equal(zero, Ascent(np.zeros(6, np.float32), np.float32(0)))


TREE = {'a': jnp.array([[0.5, -1.0], [0.3, 0.2]]), 'b': jnp.array([1.0, -0.4])}
TREES = jax.tree.map(lambda x: jnp.stack([x, 1 - x, 2 * x * x]), TREE)


def test_gradients_of_all_leaves_and_a_metric_of_some():
  """The user gives those of all, and a mask or None leaves out what is not moved."""
  metric = low_rank_monge(alpha=1.5)
  expected, _, _ = dense(np.ravel(TREE['a']), np.reshape(TREES['a'], (3, 4)), 1.5)
  for options, g in [
    ({'mask': {'a': True, 'b': False}}, TREE),
    ({}, {'a': TREE['a'], 'b': None}),
  ]:
    tx = sharpness_aware(metric, 0.1, **options)
    w = jax.tree.map(jnp.zeros_like, TREE)
    grad_fn = lambda probe, g=g: {**probe, 'b': None} if g['b'] is None else probe
    update = jax.jit(
      lambda g: tx.update(g, tx.init(w), w, grad_fn=grad_fn, gradients=TREES)
    )
    probe, _ = update(g)
    np.testing.assert_allclose(np.ravel(probe['a']), 0.1 * expected, rtol=1e-5)


def test_each_replica_has_its_own_gradients():
  tx = sharpness_aware(low_rank_monge(), 0.1, axis_name='i')
  w = jnp.zeros(6)
  rows = ROWS.reshape(2, 2, 6).astype(np.float32)

  def step(rows):
    g = jnp.mean(rows, axis=0)
    return tx.update(g, tx.init(w), w, grad_fn=lambda p: p, gradients=rows)[0]

  probes = jax.jit(jax.vmap(step, axis_name='i'))(rows)
  deltas = [0.1 * dense(x.mean(axis=0), x, 1.0)[0] for x in rows]
  np.testing.assert_allclose(probes[0], np.mean(deltas, axis=0), atol=1e-6)


# Those that are remembered.


@precise
@pytest.mark.parametrize('rank', [1, 2, 3])
def test_remembers_the_last_gradients(rank):
  gradients = RNG.normal(size=(5, 6))

  ascents, state = climb(low_rank_monge(rank, 1.3, ADAPTIVE), gradients, w=W)

  for i, g in enumerate(gradients):
    rows = gradients[max(0, i + 1 - rank) : i + 1]
    direction, slope, _ = dense(g, rows, 1.3, B_ADAPTIVE)
    np.testing.assert_allclose(ascents.direction[i], direction, rtol=1e-8)
    np.testing.assert_allclose(ascents.slope[i], slope, rtol=1e-9)
  assert state.count == 5
  last = {tuple(row) for row in gradients[5 - rank :]}
  assert {tuple(row) for row in np.asarray(state.gradients)} == last
  if rank == 1:
    chex.assert_trees_all_close(
      ascents, climb(monge(1.3, ADAPTIVE), gradients, w=W)[0], rtol=1e-9
    )


def test_a_gradient_that_is_not_finite_is_not_remembered():
  metric = low_rank_monge(2)
  rows = ROWS[:3].astype(np.float32)
  spoilt = rows[0].copy()
  spoilt[1] = np.inf

  with_bad = np.stack([spoilt, rows[0], rows[1], spoilt, rows[2]])
  ascents, state = climb(metric, with_bad, w=W.astype(np.float32))

  expected, expected_state = climb(metric, rows, w=W.astype(np.float32))
  chex.assert_trees_all_equal(state, expected_state)
  kept = jax.tree.map(lambda x: x[jnp.array([1, 2, 4])], ascents)
  chex.assert_trees_all_close(kept, expected, rtol=1e-6)
  assert not np.any(ascents.direction[jnp.array([0, 3])])


def test_half_precision_remembers_what_it_gets():
  """Rounded in memory, and exact in the step that it is of."""
  w = jnp.zeros(6, jnp.bfloat16)
  tx = sharpness_aware(
    low_rank_monge(2, alpha=100.0), 1.0, perturbation_dtype='float32'
  )
  state = tx.init(w)
  assert state.metric_state.gradients.dtype == jnp.bfloat16
  wide = sharpness_aware(monge(100.0), 1.0, perturbation_dtype='float32')
  g = jnp.asarray(ROWS[0], jnp.float32)
  step = lambda t: t.update(g, t.init(w), w, grad_fn=lambda p: p)[0]
  probes = jax.jit(lambda: [step(t) for t in (tx, wide)])()
  np.testing.assert_allclose(*probes, rtol=1e-5)


@pytest.mark.slow
def test_memory_of_sharded_leaves_and_replicas():
  metric = low_rank_monge(2, base=ADAPTIVE)
  w = {'a': jnp.asarray(W, jnp.float32), 'b': jnp.ones(3)}
  specs = {'a': P('model'), 'b': P()}
  tx = sharpness_aware(metric, 0.1, axis_name='data', param_specs=specs)
  alone = sharpness_aware(metric, 0.1, axis_name='data')

  def steps(tx, w, x):
    update, state = None, tx.init(w)
    for i in range(3):
      grad_fn = lambda w, i=i: jax.tree.map(lambda p: p * x[i % 2] + x[1 - i % 2], w)
      update, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
    return update

  x = np.array([[[0.3, 1.5]], [[-0.7, 0.4]]], np.float32)
  sharded = on_devices(
    lambda w, x: steps(tx, w, x[0, 0]),
    mesh(data=2, model=2),
    (specs, P('data')),
    specs,
    check_vma=False,
  )(w, x)
  whole = jax.vmap(lambda x: steps(alone, w, x[0]), axis_name='data')(x)
  chex.assert_trees_all_close(sharded, jax.tree.map(lambda y: y[0], whole), atol=1e-6)


# Those nearby.

H = np.diag([1.0, 4.0, 9.0])
quadratic = jax.grad(lambda w: 0.5 * jnp.sum(jnp.array([1.0, 4.0, 9.0]) * w**2))


@pytest.mark.slow
def test_samples_are_gradients_on_a_sphere_around():
  """The gradient is linear, and so the metric known from the points."""
  seen = []

  def grad_fn(w):
    jax.debug.callback(lambda w: seen.append(np.asarray(w)), w)
    return quadratic(w)

  w = jnp.array([0.3, -0.2, 0.1])
  metric = neighborhood_monge(3, 0.5, 1.3, key=jax.random.key(1))
  step = jax.jit(lambda s: metric.ascend(quadratic(w), s, w, grad_fn=grad_fn))
  state = metric.init(w)
  for count in (1, 2):
    (direction, slope, _), state = step(state)
    jax.effects_barrier()
    points = np.stack(seen)
    seen.clear()
    assert points.shape == (3, 3)
    np.testing.assert_allclose(
      np.linalg.norm(points - np.asarray(w)[None], axis=1), 0.5, rtol=1e-6
    )
    expected, s, _ = dense(H @ w, points @ H, 1.3)
    np.testing.assert_allclose(direction, expected, atol=1e-5)
    np.testing.assert_allclose(slope, s, rtol=1e-5)
    assert state.count == count
  first, _ = metric.ascend(quadratic(w), metric.init(w), w, grad_fn=grad_fn)
  assert np.max(np.abs(first.direction - direction)) > 1e-3


def test_a_radius_of_zero_is_monge():
  w = jnp.array([0.3, -0.2, 0.1])
  metric = neighborhood_monge(2, 0.0, 1.3, key=jax.random.key(1))
  got = ascend(metric, quadratic(w), w, grad_fn=quadratic)
  expected = ascend(monge(1.3), quadratic(w), w)
  chex.assert_trees_all_close(got[:2], expected[:2], rtol=1e-5)


def test_noise_in_a_chain_under_a_mask_and_when_resumed():
  """It costs a gradient a sample, and only what is perturbed is moved."""
  metric = neighborhood_monge(2, 0.1, key=jax.random.key(0))
  tx = sharpness_aware(metric, 0.1, mask={'a': True, 'b': False})
  calls = []

  def grad_fn(w):
    jax.debug.callback(lambda w: calls.append(w), w)
    return jax.tree.map(lambda p: p**3, w)

  step = jax.jit(lambda s: tx.update(grad_fn(TREE), s, TREE, grad_fn=grad_fn))
  update, state = step(tx.init(TREE))
  jax.effects_barrier()
  assert len(calls) == 4  # At the params, two samples, at the probe.
  for w in calls:
    np.testing.assert_array_equal(w['b'], TREE['b'])
  later = step(state)
  resumed = step(jax.tree.map(jnp.asarray, jax.device_get(state)))
  chex.assert_trees_all_equal(later, resumed)
  assert not np.array_equal(later[0]['a'], update['a'])


def test_parts_of_a_leaf_have_different_noise():
  seen = []

  def step(w):
    def grad_fn(w):
      jax.debug.callback(lambda w: seen.append(np.asarray(w)), w)
      return w

    tx = sharpness_aware(
      neighborhood_monge(1, 0.5, key=jax.random.key(0)), 0.1, param_specs=P('model')
    )
    return tx.update(w, tx.init(w), w, grad_fn=grad_fn)[0]

  w = jnp.ones(4)
  on_devices(step, mesh(model=2), P('model'), P('model'), check_vma=False)(w)
  jax.effects_barrier()
  moves = [x - 1 for x in seen]
  samples = [m for m in moves if np.linalg.norm(m) > 0.1]  # The probe is nearer.
  assert len(samples) == 2
  assert not np.allclose(*samples)
  np.testing.assert_allclose(np.linalg.norm(np.concatenate(samples)), 0.5, rtol=1e-5)


@pytest.mark.slow
@has_explicit_sharding
@pytest.mark.parametrize(
  'metric',
  [low_rank_monge(2), neighborhood_monge(2, 0.1, key=jax.random.key(0))],
  ids=['low_rank_monge', 'neighborhood_monge'],
)
def test_where_shardings_are_types(metric):
  w = {'a': jnp.arange(32.0).reshape(8, 4) / 32, 'b': jnp.ones(3)}
  layout = jax.make_mesh((4,), ('x',), axis_types=(jax.sharding.AxisType.Explicit,))
  tx = sharpness_aware(metric, 0.1)

  @jax.jit
  def two_steps(w, state):
    update, grad_fn = None, lambda w: jax.tree.map(lambda p: p**3, w)
    for _ in range(2):
      update, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
    return update

  expected = two_steps(w, tx.init(w))
  with jax.set_mesh(layout):
    specs = {'a': P('x'), 'b': P()}
    sharded = jax.tree.map(
      lambda x, spec: jax.device_put(x, NamedSharding(layout, spec)), w, specs
    )
    got = two_steps(sharded, tx.init(sharded))
  chex.assert_trees_all_close(jax.device_get(got), expected, rtol=1e-5)


# α of the Fisher matrix.


@pytest.mark.parametrize('size', [0.1, 1.0, 30.0, 1e30])
def test_fisher_alpha_is_the_least_squares_fit(size):
  rows = size * (ROWS + 1.0)
  g = rows.mean(axis=0)

  alpha = fisher_alpha(jnp.float32(g), jnp.float32(rows))

  # ‖I + α² g gᵀ − F‖² is a parabola in α². Three values have its minimum; in units.
  unit, F, one = g / size, rows.T @ rows / len(rows) / size**2, np.eye(6) / size**2
  value = lambda x: np.sum((one + x * np.outer(unit, unit) - F) ** 2)
  low, mid, high = value(0.0), value(1.0), value(2.0)
  curvature = low - 2 * mid + high
  square = max(0.0, (3 * low - 4 * mid + high) / (-2 * curvature) * -1.0)
  np.testing.assert_allclose(alpha, np.sqrt(square), rtol=1e-4, atol=1e-12)


def test_fisher_alpha_of_nothing_is_zero():
  assert fisher_alpha(jnp.zeros(3), jnp.zeros((2, 3))) == 0


def test_fisher_alpha_inside_a_step():
  @jax.jit
  def step(w, rows):
    g = jnp.mean(rows, axis=0)
    tx = msam(0.1, alpha=fisher_alpha(g, rows))
    return tx.update(g, tx.init(w), w, grad_fn=lambda probe: probe)

  rows = 30 * ROWS.astype(np.float32)
  probe, _ = step(jnp.zeros(6), rows)
  g = rows.mean(axis=0)
  n = np.linalg.norm(g)
  square = (np.mean((rows @ g) ** 2) - n**2) / n**4
  np.testing.assert_allclose(probe, 0.1 * g / n / np.sqrt(1 + square * n**2), rtol=1e-4)


# What is wrong.


@pytest.mark.parametrize(
  ('make', 'error', 'message'),
  [
    (lambda: low_rank_monge(0), ValueError, '`rank` must be a whole number >= 1'),
    (lambda: low_rank_monge(2.0), TypeError, '`rank` must be a whole number'),
    (lambda: low_rank_monge(True), TypeError, '`rank` must be a whole number'),
    (lambda: low_rank_monge(2, alpha=-1.0), ValueError, '`alpha` must be finite and'),
    (lambda: low_rank_monge(alpha=lambda i: 1.0), TypeError, '`alpha` must be a real'),
    (lambda: low_rank_monge(2, base=euclidean), TypeError, '`base` must be a Metric'),
    (
      lambda: low_rank_monge(2, base=smoothed()).init(W),
      ValueError,
      r'`base` of low_rank_monge\(\) must be a matrix',
    ),
    (
      lambda: ascend(low_rank_monge(), ROWS[0]),
      ValueError,
      r'without a rank .*gradients=gradients',
    ),
    (
      lambda: ascend(low_rank_monge(2), ROWS[0], gradients=ROWS),
      ValueError,
      r'low_rank_monge\(rank=2\) remembers',
    ),
    (
      lambda: ascend(low_rank_monge(), ROWS[0], gradients=ROWS[0]),
      ValueError,
      r'at the root the gradient has the shape \(6,\), and they have \(6,\)',
    ),
    (
      lambda: ascend(
        low_rank_monge(), TREE, TREE, gradients={**TREES, 'b': TREES['b'][:2]}
      ),
      ValueError,
      r"as many in each leaf, .* at \['b'\] .* they have \(2, 2\)",
    ),
    (
      lambda: ascend(low_rank_monge(), TREE, TREE, gradients=[TREES['a']]),
      ValueError,
      '`gradients` must have the structure of the gradient',
    ),
    (
      lambda: neighborhood_monge(0, 0.1, key=jax.random.key(0)),
      ValueError,
      '`samples` must be a whole number >= 1',
    ),
    (
      lambda: neighborhood_monge(1, -0.1, key=jax.random.key(0)),
      ValueError,
      '`radius` must be finite and >= 0',
    ),
    (
      lambda: neighborhood_monge(1, 0.1, key=0),
      TypeError,
      r'`key` of neighborhood_monge\(\) must be one random key',
    ),
    (
      lambda: ascend(neighborhood_monge(1, 0.1, key=jax.random.key(0)), ROWS[0]),
      ValueError,
      r'neighborhood_monge\(\) takes gradients near the params',
    ),
  ],
  ids=range(16),
)
def test_refuses(make, error, message):
  with pytest.raises(error, match=message):
    make()


def test_what_goes_wrong_in_a_compiled_step_is_seen():
  rows = ROWS.astype(np.float32)
  spoilt = rows.copy()
  spoilt[1, 0] = np.nan
  for metric, gradients in [
    (low_rank_monge(base=diagonal_fisher()), rows),
    (low_rank_monge(), spoilt),
  ]:
    ascent = ascend(metric, rows[0], gradients=gradients)
    assert np.isnan(ascent.slope)
    assert np.isnan(ascent.direction).all()

  @jax.jit
  def run(alpha):
    return ascend(low_rank_monge(2, alpha), rows[0], w=rows[0])

  assert np.isnan(run(jnp.float32(-1.0)).direction).all()


@pytest.mark.slow
def test_derivative_where_gradients_are_few(x64):
  """Against finite differences, also while a part of the memory is empty."""
  metric = low_rank_monge(3, 1.3)
  rows = jnp.asarray(ROWS[:2], float)

  @jax.jit
  def total(x):
    g, w = rows[0] * x + jnp.sin(x * rows[1]), jnp.zeros_like(rows[0])
    ascent, state = metric.ascend(g, metric.init(w), w)
    other, _ = metric.ascend(g**2 + rows[1], state, w)
    return jnp.sum(ascent.direction * rows[1]) + jnp.sum(other.direction * rows[0])

  x, h = 0.7, 1e-5
  expected = (total(x + h) - total(x - h)) / (2 * h)
  np.testing.assert_allclose(jax.grad(total)(x), expected, rtol=1e-7)


def test_a_checkpoint_is_of_arrays():
  """Zeros for what was not seen yet, of the shapes and dtypes of the params."""
  state = low_rank_monge(3).init(TREE)
  chex.assert_trees_all_equal(
    state.gradients, jax.tree.map(lambda w: jnp.zeros((3, *w.shape)), TREE)
  )
  tx = sharpness_aware(low_rank_monge(3), 0.1)
  mapped = optax.tree.map_params(tx, lambda x: x, tx.init(TREE))
  chex.assert_trees_all_equal(mapped, tx.init(TREE))


def test_the_memory_of_weakly_typed_parameters_is_strongly_typed():
  params = {'w': jnp.array([0.3, 0.4]), 'b': jnp.array(1.2)}
  tx = sharpness_aware(low_rank_monge(2), 0.1)
  state = tx.init(params)
  _, new = tx.update(params, state, params, grad_fn=lambda params: params)
  types = [[jax.typeof(x) for x in jax.tree.leaves(s)] for s in (state, new)]
  assert types[0] == types[1]
