"""The metric pulled back through a chart, against dense solves and closed forms."""

import chex
import hypothesis
from hypothesis import strategies as st
import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from msam_optax import LOCAL
from msam_optax import monge
from msam_optax import perturb
from msam_optax import pullback
from msam_optax import sharpness_aware
from msam_optax import testing
from msam_optax import value_and_grad
from tests import problems

PARAMS, BATCH = problems.mlp_params(), problems.batch()


def outputs(params, x=BATCH[0]):
  x = x.astype(params['hidden']['bias'].dtype)
  h = jnp.tanh(x @ params['hidden']['kernel'] + params['hidden']['bias'][None])
  return h @ params['out']['kernel'] + params['out']['bias'][None]


def ascend(metric, grads, params, **extra_args):
  state = metric.init(params)
  compiled = jax.jit(lambda *args, **kwargs: metric.ascend(*args, **kwargs)[0])
  return compiled(grads, state, params, **extra_args)


def vary(tree, axis):
  """Replicated arrays as ones that vary over the axis."""
  if hasattr(jax.lax, 'pcast'):
    return jax.lax.pcast(tree, axis, to='varying')
  return jax.lax.pvary(tree, axis)


def float64(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


def jacobian(chart, params):
  """Of a chart from and to pytrees, dense, ``[outputs, params]``."""
  flat, unravel = ravel_pytree(params)
  of_flat = lambda flat: ravel_pytree(chart(unravel(flat)))[0]
  return np.asarray(jax.jacobian(of_flat)(flat))


def vector(tree):
  return np.asarray(ravel_pytree(tree)[0])


# Against a dense solve.


def chart_of_pytrees(params):
  """Neither one to one nor onto, with an image of several arrays."""
  return {'all': outputs(params), 'squares': jax.tree.map(jnp.square, params)}


def test_dense_solve(x64):
  params, data = float64((PARAMS, BATCH))
  grads = jax.grad(problems.loss)(params, data)
  J, g = jacobian(chart_of_pytrees, params), vector(grads)
  for alpha, ridge in (0.0, 0.3), (1.7, 0.01):
    metric = pullback(chart_of_pytrees, alpha, ridge, tolerance=1e-11, max_steps=400)
    G = J.T @ J + ridge * np.eye(g.size) + alpha**2 * np.outer(g, g)
    u = np.linalg.solve(G, g)

    direction, slope, _ = ascend(metric, grads, params)

    np.testing.assert_allclose(vector(direction), u / np.sqrt(g @ u), atol=1e-7)
    np.testing.assert_allclose(slope, np.sqrt(g @ u), rtol=1e-8)


@pytest.mark.slow
def test_stopped_early_it_is_the_steepest_of_what_was_tried(x64):
  """Of length one under the metric, and the steepest in a Krylov space."""
  params, data = float64((PARAMS, BATCH))
  grads = jax.grad(problems.loss)(params, data)
  J, g = jacobian(chart_of_pytrees, params), vector(grads)
  A = J.T @ J + 0.01 * np.eye(g.size)
  krylov = [g / np.linalg.norm(g)]
  for steps in range(1, 6):
    metric = pullback(chart_of_pytrees, 0.0, 0.01, tolerance=0.0, max_steps=steps)
    direction, slope, _ = ascend(metric, grads, params)

    K = np.linalg.qr(np.stack(krylov, axis=1))[0]
    best = np.sqrt((K.T @ g) @ np.linalg.solve(K.T @ A @ K, K.T @ g))
    d = vector(direction)
    np.testing.assert_allclose([d @ A @ d, g @ d], [1.0, slope], rtol=1e-8)
    np.testing.assert_allclose(slope, best, rtol=1e-7)
    krylov.append(A @ krylov[-1])
    krylov[-1] /= np.linalg.norm(krylov[-1])


@pytest.mark.slow
def test_gradients_of_any_size():
  """In float32: the direction of the base does not depend on the length."""
  grads = jax.grad(problems.loss)(PARAMS, BATCH)
  metric = pullback(chart_of_pytrees, 0.0, 0.1)
  expected, slope, _ = ascend(metric, grads, PARAMS)
  for scale in 1e-30, 1e30:
    scaled = jax.tree.map(lambda g: scale * g, grads)
    got = ascend(metric, scaled, PARAMS)
    chex.assert_trees_all_close(got.direction, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.slope, scale * slope, rtol=1e-4)


# Covariance: the function that is perturbed does not depend on the coordinates.


def loss_of_weights(theta):
  return jnp.sum(jnp.cos(theta) * jnp.arange(1.0, 1.0 + theta.size, dtype=theta.dtype))


def bend(A, psi):
  """One to one and onto where the norm of A is less than one."""
  return psi + jnp.tanh(A @ psi)


@pytest.mark.slow
@hypothesis.settings(max_examples=5, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), alpha=st.floats(0.0, 10.0))
def test_invariant_under_random_coordinates(seed, alpha):
  rng = np.random.default_rng(seed)
  A = rng.normal(size=(4, 4))
  A *= 0.8 / np.linalg.norm(A, 2)
  turn, _ = np.linalg.qr(rng.normal(size=(4, 4)))
  turn, A, psi = (np.float32(x) for x in (turn, A, rng.normal(size=4)))
  change = lambda psi: turn @ bend(A, psi)
  testing.assert_invariant(
    monge(alpha),
    change,
    loss_of_weights,
    jnp.asarray(psi),
    metric_of_change=pullback(change, alpha),
    rtol=1e-3,
  )


CHANGES = {
  'exponential scales': (
    lambda p: p['sign'] * jnp.exp(p['log']),
    lambda rng: {'sign': np.sign(rng.normal(size=4)), 'log': rng.normal(size=4)},
  ),
  # More coordinates than weights.
  'weight normalization': (
    lambda p: p['scale'] * p['v'] / jnp.linalg.norm(p['v']),
    lambda rng: {'scale': np.array(1.7), 'v': rng.normal(size=4)},
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize(('change', 'draw'), CHANGES.values(), ids=CHANGES)
def test_invariant_under_parametrizations(change, draw, x64):
  params = jax.tree.map(jnp.asarray, draw(np.random.default_rng(0)))
  for alpha in 0.0, 2.0:
    testing.assert_invariant(
      monge(alpha),
      change,
      loss_of_weights,
      params,
      metric_of_change=pullback(change, alpha, tolerance=1e-12),
      rtol=1e-6,
    )


@pytest.mark.slow
def test_factors_of_a_matrix(x64):
  """Their Jacobian is of low rank, and any factors of the matrix move it alike."""
  rng = np.random.default_rng(3)
  A, B, M = (rng.normal(size=shape) for shape in ((5, 2), (2, 4), (2, 2)))
  target = rng.normal(size=(5, 4))
  product = lambda p: p['A'] @ p['B']
  loss = lambda p: jnp.sum((product(p) - target) ** 2)
  moves = []
  for a, b in (A, B), (A @ M, np.linalg.solve(M, B)):
    params = {'A': jnp.asarray(a), 'B': jnp.asarray(b)}
    ascent = ascend(pullback(product, 0.5), jax.grad(loss)(params), params)
    moves.append(jax.jvp(product, (params,), (ascent.direction,))[1])
    # The gradient, projected on the matrices that the factors can move to.
    J, g = jacobian(product, params), 2 * vector(product(params) - target)
    steepest = J @ np.linalg.lstsq(J, g, rcond=1e-9)[0]
    slope = np.linalg.norm(steepest)
    expected = steepest / (slope * np.sqrt(1 + 0.25 * slope**2))
    np.testing.assert_allclose(vector(moves[-1]), expected, atol=1e-4)
  np.testing.assert_allclose(*moves, atol=1e-4)


# Functions.


def test_outputs_move_along_the_gradient_of_the_loss(x64):
  """Of more parameters than outputs: as far as the radius, and straight uphill."""
  params, (x, y) = float64((PARAMS, BATCH))
  loss = lambda params: problems.loss(params, (x, y))
  metric = pullback(outputs, 0.0, arguments=('x',), max_steps=300)
  ascent = ascend(metric, jax.grad(loss)(params), params, x=x)
  at = lambda params: outputs(params, x)
  _, moved = jax.jvp(at, (params,), (ascent.direction,))
  error = at(params) - y
  np.testing.assert_allclose(moved, error / jnp.linalg.norm(error), atol=1e-4)


@pytest.mark.slow
def test_chart_gets_the_batch_from_update_or_has_it():
  x, _ = BATCH
  numbers = {'alpha': 0.5, 'ridge': 0.1}
  tx = sharpness_aware(pullback(outputs, **numbers, arguments=('x',)), 0.3)
  grad_fn = lambda params: jax.grad(problems.loss)(params, BATCH)

  @jax.jit
  def step(params, x):
    return tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn, x=x)

  updates, state = step(PARAMS, x)
  metric = pullback(lambda params: outputs(params, x), **numbers)
  _, grads = jax.jit(value_and_grad(problems.loss, metric, 0.3))(PARAMS, BATCH)
  chex.assert_trees_all_close(updates, grads, rtol=1e-4, atol=1e-6)
  ascent = ascend(metric, grad_fn(PARAMS), PARAMS)
  expected = grad_fn(perturb(PARAMS, ascent, 0.3))
  chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(state.slope, ascent.slope, rtol=1e-4)


# Where there is no inverse.


def test_what_the_chart_does_not_see_needs_a_ridge():
  w = {'seen': jnp.ones(3), 'not seen': jnp.ones(2)}
  chart = lambda p: jnp.stack([jnp.sum(p['seen']), p['seen'][0]])
  grad_fn = jax.grad(lambda p: jnp.sum(p['seen'] ** 2) + jnp.sum(p['not seen']))

  def step(metric):
    tx = sharpness_aware(metric, 0.1)
    return tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)[1]

  assert step(pullback(chart, 0.5, 1e-3)).finite
  assert not step(pullback(chart, 0.5)).finite
  assert not step(pullback(lambda p: jnp.ones(2), 0.5)).finite
  # A ridge of NaN, from a schedule of the user's, say.
  run = jax.jit(lambda ridge: step(pullback(chart, 0.5, ridge)).finite)
  assert not run(jnp.nan)


# Devices and derivatives.


@pytest.mark.cpu
def test_sharded_in_shard_map():
  """Products and inner products over parameters of which each device has a part."""
  M, w, g = (problems.normal(i, *shape) for i, shape in enumerate(((6, 4), (4,), (4,))))
  mesh = jax.make_mesh((2,), ('model',), axis_types=(jax.sharding.AxisType.Auto,))
  chart = lambda w, M: jnp.tanh(jax.lax.psum(M @ w, 'model'))
  metric = pullback(chart, 0.7, 0.05, arguments=('M',))
  tx = sharpness_aware(metric, 1.0, param_specs=P('model'))

  def step(w, g, M):
    update = tx.update(g, tx.init(w), w, grad_fn=lambda probe: probe, M=M)
    return update[0], update[1].slope

  mapped = jax.shard_map(
    step,
    mesh=mesh,
    in_specs=(P('model'), P('model'), P(None, 'model')),
    out_specs=(P('model'), P()),
  )
  probe, slope = jax.jit(mapped)(w, g, M)

  J = (1 - np.tanh(M @ w) ** 2)[:, None] * M
  G = J.T @ J + 0.05 * np.eye(4) + 0.7**2 * np.outer(g, g)
  u = np.linalg.solve(G.astype(np.float64), g)
  np.testing.assert_allclose(probe, w + u / np.sqrt(g @ u), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(slope, np.sqrt(g @ u), rtol=1e-5)


@pytest.mark.cpu
def test_sharded_beside_replicated_leaves():
  """In a `shard_map` that checks what differs from device to device."""
  specs = {'kernel': P('model'), 'bias': P()}
  w = {'kernel': jnp.array([0.3, -0.4, 1.0, 0.2]), 'bias': jnp.array([0.5])}
  metric = pullback(lambda p: jax.tree.map(jnp.sinh, p), 0.7)

  def step(**options):
    tx = sharpness_aware(metric, 1.0, **options)
    grad_fn = lambda w: jax.tree.map(lambda x: x + x**3, w)
    return lambda w: tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)[0]

  mesh = jax.make_mesh((2,), ('model',), axis_types=(jax.sharding.AxisType.Auto,))
  mapped = jax.shard_map(
    step(param_specs=specs), mesh=mesh, in_specs=(specs,), out_specs=specs
  )
  chex.assert_trees_all_close(jax.jit(mapped)(w), jax.jit(step())(w), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.cpu
@pytest.mark.parametrize('sync_ascent', [True, False])
def test_replicas_in_a_checked_shard_map(sync_ascent):
  """Parameters that vary by their type, and an ascent that is the mean or does not."""
  x, y = BATCH
  mesh = jax.make_mesh((2,), ('batch',), axis_types=(jax.sharding.AxisType.Auto,))
  metric = pullback(lambda p: jax.tree.map(jnp.sinh, p), 0.7)
  f = value_and_grad(
    problems.loss, metric, 0.5, axis_name='batch', sync_ascent=sync_ascent
  )

  def step(params, x, y):
    return f(vary(params, 'batch'), (x, y))[1]

  mapped = jax.shard_map(
    step, mesh=mesh, in_specs=(P(), P('batch'), P('batch')), out_specs=P()
  )
  grads = jax.jit(mapped)(PARAMS, x, y)

  if sync_ascent:
    expected = value_and_grad(problems.loss, metric, 0.5)(PARAMS, BATCH)[1]
  else:
    halves = [(x[:4], y[:4]), (x[4:], y[4:])]
    each = [value_and_grad(problems.loss, metric, 0.5)(PARAMS, h)[1] for h in halves]
    expected = jax.tree.map(lambda a, b: (a + b) / 2, *each)
  chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_derivative_of_the_step(x64):
  """With respect to the params, through the solve, against finite differences."""
  chart = lambda w: jnp.stack([jnp.sinh(w[0]) + w[1], w[1] ** 3 + w[1]])
  metric = pullback(chart, 0.5, 0.1, tolerance=1e-13)
  grads = jnp.array([1.0, -2.0])
  total = lambda w: jnp.sum(ascend(metric, grads, w).direction * jnp.array([1.0, 3.0]))
  w, h = jnp.array([0.3, 0.7]), 1e-5
  got = jax.grad(total)(w)
  for i, e in enumerate(np.eye(2)):
    expected = (total(w + h * e) - total(w - h * e)) / (2 * h)
    np.testing.assert_allclose(got[i], expected, rtol=1e-7)


def test_alpha_as_a_schedule():
  metric = pullback(jnp.sinh, optax.linear_schedule(1.0, 0.0, 2))
  w, g = jnp.array([0.3, -0.2]), jnp.array([2.0, 1.0])
  state = metric.init(w)
  for alpha in 1.0, 0.5:
    expected = ascend(pullback(jnp.sinh, alpha), g, w)
    got, state = metric.ascend(g, state, w, space=LOCAL)
    np.testing.assert_allclose(got.direction, expected.direction, rtol=1e-6)


# Errors.


@pytest.mark.parametrize(
  ('arguments', 'error', 'match'),
  [
    ({'chart': jnp.ones(2)}, TypeError, '`chart` of pullback'),
    ({'alpha': -1.0}, ValueError, '`alpha` must be finite and >= 0'),
    ({'ridge': -1.0}, ValueError, '`ridge` must be finite and >= 0'),
    ({'tolerance': np.nan}, ValueError, '`tolerance` must be finite and >= 0'),
    ({'max_steps': 0}, ValueError, '`max_steps` must be a whole number >= 1'),
    ({'arguments': 'x'}, TypeError, r"a sequence of names: `\('x',\)`"),
  ],
)
def test_arguments_are_checked(arguments, error, match):
  with pytest.raises(error, match=match):
    pullback(**{'chart': jnp.exp, **arguments})


@pytest.mark.parametrize(
  ('chart', 'options', 'error', 'match'),
  [
    (lambda w: (w, w > 0), {}, TypeError, r'real floating-point.*at \[1\].*bool'),
    (lambda w: w + 1j, {}, TypeError, r'real floating-point.*at the root.*complex64'),
    (lambda w: (), {}, ValueError, 'a pytree without arrays'),
    (lambda w, x: w, {'arguments': ('x',)}, ValueError, "takes the argument 'x'"),
  ],
)
def test_what_a_chart_returns_is_checked(chart, options, error, match):
  with (
    jax.numpy_dtype_promotion('standard'),
    pytest.raises(error, match=match),
  ):
    ascend(pullback(chart, **options), jnp.ones(2), jnp.ones(2))


def test_params_are_needed():
  with pytest.raises(ValueError, match=r'pullback\(\) needs the Jacobian'):
    ascend(pullback(jnp.exp), jnp.ones(2), None)
