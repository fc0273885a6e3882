"""The two-pass transformation: its numbers, its state, and its edges."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax
from tests import by_hand
from tests.methods import every_kind
from tests.methods import every_kind_slowly
from tests.methods import every_method
from tests.methods import METHODS
from tests.methods import transformation
from tests.problems import batch
from tests.problems import loss
from tests.problems import mlp_params


@pytest.mark.usefixtures('x64')
@every_method
def test_update_and_scalars_are_those_by_hand(method):
  params, data = mlp_params(jnp.float64), batch(dtype=jnp.float64)
  grad_fn = lambda p: jax.grad(loss)(p, data)
  grads, tx = grad_fn(params), transformation(method)
  updates, state = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)

  expected = by_hand.update(method, params, [grad_fn])
  chex.assert_trees_all_close(updates, expected, rtol=1e-10, atol=1e-14)
  probe = by_hand.probe(method, params, grads)
  delta = jax.tree.map(jnp.subtract, probe, params)
  np.testing.assert_allclose(state.radius, optax.tree.norm(delta), rtol=1e-10)
  slope = by_hand.slope(method, params, grads)
  np.testing.assert_allclose(state.slope, slope, rtol=1e-10)


@pytest.mark.standard_promotion
@pytest.mark.parametrize('optimizer', ['sgd', 'momentum', 'adam', 'adamw', 'lion'])
def test_sam_equals_optax_step_for_step(optimizer):
  make = {
    'sgd': lambda: optax.sgd(0.1),
    'momentum': lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    'adam': lambda: optax.adam(0.01),
    'adamw': lambda: optax.adamw(0.01),
    'lion': lambda: optax.lion(0.01),
  }[optimizer]
  ours = optax.chain(msam_optax.sam(rho=0.1), make())
  theirs = optax.contrib.sam(
    make(), optax.chain(optax.contrib.normalize(), optax.sgd(0.1)), opaque_mode=True
  )
  assert_same_run(ours, theirs)


@pytest.mark.standard_promotion
@pytest.mark.parametrize('alpha', [0.0, 1.0, 10.0])
def test_monge_in_optax_wrapper_equals_msam(alpha):
  ours = optax.chain(msam_optax.msam(rho=0.1, alpha=alpha), optax.adam(0.01))
  adversary = optax.chain(
    msam_optax.normalize_by(msam_optax.monge(alpha)), optax.sgd(0.1)
  )
  theirs = optax.contrib.sam(optax.adam(0.01), adversary, opaque_mode=True)
  assert_same_run(ours, theirs)


def assert_same_run(ours, theirs, steps=5):
  @functools.partial(jax.jit, static_argnums=(0, 1))
  def step(update, arity, params, state, data):
    grad = jax.grad(loss)
    grad_fn = {
      1: lambda p: grad(p, data),
      2: lambda p, i: grad(p, data),
    }[arity]
    updates, state = update(grad(params, data), state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state

  a = b = mlp_params()
  state_a, state_b = ours.init(a), theirs.init(b)
  for i in range(steps):
    a, state_a = step(ours.update, 1, a, state_a, batch(i))
    b, state_b = step(theirs.update, 2, b, state_b, batch(i))
    chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-6)


def test_records_loss_at_probe_and_rise():
  params, data = mlp_params(), batch()
  value_and_grad_fn = jax.value_and_grad(lambda p: loss(p, data))
  value, grads = value_and_grad_fn(params)
  tx = optax.chain(msam_optax.msam(rho=0.2), optax.sgd(0.1))
  _, state = tx.update(
    grads, tx.init(params), params, value_and_grad_fn=value_and_grad_fn, value=value
  )
  n = float(optax.tree.norm(grads))
  delta = jax.tree.map(lambda g: 0.2 * g / (n * np.sqrt(1 + n**2)), grads)
  at_probe = loss(jax.tree.map(jnp.add, params, delta), data)
  chex.assert_trees_all_close(
    {
      name: optax.tree.get(state, name)
      for name in ('slope', 'radius', 'probe_value', 'rise')
    },
    {
      'slope': jnp.float32(n / np.sqrt(1 + n**2)),
      'radius': jnp.float32(0.2 / np.sqrt(1 + n**2)),
      'probe_value': at_probe,
      'rise': at_probe - value,
    },
    rtol=1e-5,
  )
  assert optax.tree.get(state, 'count') == 1


def test_value_and_grad_fn_gives_same_updates_as_grad_fn():
  params, data = mlp_params(), batch()
  value_and_grad_fn = jax.value_and_grad(lambda p: loss(p, data))
  _, grads = value_and_grad_fn(params)
  tx = msam_optax.msam()
  a, _ = tx.update(grads, tx.init(params), params, value_and_grad_fn=value_and_grad_fn)
  b, _ = tx.update(
    grads, tx.init(params), params, grad_fn=lambda p: value_and_grad_fn(p)[1]
  )
  chex.assert_trees_all_equal(a, b)


def test_radius_and_alpha_schedules_count_steps():
  rho = optax.linear_schedule(0.4, 0.0, 4)
  alpha = optax.linear_schedule(0.0, 8.0, 4)
  tx = msam_optax.msam(rho, alpha)
  params, data = mlp_params(), batch()
  grads = jax.grad(loss)(params, data)
  n = float(optax.tree.norm(grads))
  state = tx.init(params)
  for i in range(6):
    _, state = tx.update(
      grads, state, params, grad_fn=lambda p: jax.grad(loss)(p, data)
    )
    expected = rho(i) / np.sqrt(1 + (float(alpha(i)) * n) ** 2)
    np.testing.assert_allclose(state.radius, expected, rtol=1e-5)
    assert state.count == i + 1


def test_injected_hyperparameters_can_be_changed():
  make = optax.inject_hyperparams(msam_optax.msam)
  tx = make(rho=0.1, alpha=optax.constant_schedule(3.0))
  params, data = mlp_params(), batch()
  grads = jax.grad(loss)(params, data)
  n = float(optax.tree.norm(grads))
  update = jax.jit(
    lambda g, s, p: tx.update(g, s, p, grad_fn=lambda q: jax.grad(loss)(q, data))
  )
  state = tx.init(params)
  for rho in (0.1, 0.3):
    state.hyperparams['rho'] = jnp.asarray(rho, jnp.float32)
    _, state = update(grads, state, params)
    radius = optax.tree.get(state, 'radius')
    np.testing.assert_allclose(radius, rho / np.sqrt(1 + 9 * n**2), rtol=1e-5)
  assert optax.tree.get(state.inner_state, 'count') == 2


def test_functions_can_be_static_under_inject_hyperparams():
  make = optax.inject_hyperparams(
    msam_optax.msam, static_args=('mask', 'perturbation_dtype')
  )
  kernels = functools.partial(jax.tree.map, lambda p: p.ndim > 1)
  tx = make(rho=0.1, mask=kernels, perturbation_dtype=jnp.float32)
  params, data = mlp_params(), batch()
  grads = jax.grad(loss)(params, data)
  _, state = tx.update(
    grads, tx.init(params), params, grad_fn=lambda p: jax.grad(loss)(p, data)
  )
  n = float(optax.tree.norm([g for g in jax.tree.leaves(grads) if g.ndim > 1]))
  np.testing.assert_allclose(
    optax.tree.get(state, 'radius'), 0.1 / np.sqrt(1 + n**2), rtol=1e-5
  )


def test_masked_leaves_are_neither_moved_nor_in_the_norm():
  params, data = mlp_params(), batch()
  grads = jax.grad(loss)(params, data)
  seen = []

  def grad_fn(p):
    seen.append(p)
    return jax.grad(loss)(p, data)

  tx = msam_optax.msam(rho=0.2, mask={'hidden': True, 'out': False})
  updates, state = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
  n = float(optax.tree.norm(grads['hidden']))
  (probe,) = seen
  chex.assert_trees_all_equal(probe['out'], params['out'])
  chex.assert_trees_all_close(
    probe['hidden'],
    jax.tree.map(
      lambda w, g: w + 0.2 * g / (n * np.sqrt(1 + n**2)),
      params['hidden'],
      grads['hidden'],
    ),
    rtol=1e-6,
  )
  # They are updated all the same, with their gradient at the probe.
  chex.assert_trees_all_close(updates, jax.grad(loss)(probe, data))
  np.testing.assert_allclose(state.slope, n / np.sqrt(1 + n**2), rtol=1e-5)


def test_integer_and_key_leaves_pass_where_masked_out():
  params = {'w': jnp.array([3.0, 4.0]), 'steps': jnp.array(7), 'key': jax.random.key(0)}
  floating = {'w': True, 'steps': False, 'key': False}
  grad_fn = jax.grad(lambda p: jnp.sum(p['w'] ** 2), allow_int=True)
  grads = grad_fn(params)
  for tx in (msam_optax.sam(1.0, mask=floating), msam_optax.asam(1.0, mask=floating)):
    updates, _ = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
    np.testing.assert_allclose(np.asarray(updates['w']), [7.2, 9.6], rtol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@every_kind
def test_zero_gradient_goes_through_unperturbed(method, dtype):
  params = {'w': jnp.ones((2, 2), dtype), 'b': jnp.ones(2, dtype)}
  zeros = jax.tree.map(jnp.zeros_like, params)
  seen = []

  def grad_fn(p):
    seen.append(p)
    return zeros

  tx = transformation(method)
  updates, state = tx.update(zeros, tx.init(params), params, grad_fn=grad_fn)
  for probe in seen:
    chex.assert_trees_all_equal(probe, params)
  chex.assert_trees_all_equal(updates, zeros)
  chex.assert_tree_all_finite(state)
  assert state.radius == 0.0
  assert state.slope == 0.0


@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@every_kind
def test_non_finite_gradient_is_seen_and_does_not_stay(method, dtype, bad):
  params = {'w': jnp.ones((2, 2), dtype), 'b': jnp.ones(2, dtype)}
  grads = {'w': jnp.full((2, 2), bad, dtype), 'b': jnp.ones(2, dtype)}
  seen = []

  def grad_fn(p):
    seen.append(p)
    return jax.tree.map(jnp.ones_like, p)

  tx = transformation(method)
  updates, state = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
  for probe in seen:
    chex.assert_trees_all_equal(probe, params)
  assert not np.any(np.isfinite(np.asarray(updates['w'], np.float32)))
  if METHODS[method].combination is None:  # Others may mix leaves.
    chex.assert_trees_all_equal(updates['b'], jnp.ones(2, dtype))
  chex.assert_tree_all_finite(state)


def test_traced_radius_that_is_nan_is_seen():
  params = jnp.ones(3)
  tx = optax.inject_hyperparams(msam_optax.msam)(rho=0.1)
  state = tx.init(params)
  state.hyperparams['rho'] = jnp.float32(jnp.nan)
  updates, _ = jax.jit(lambda s: tx.update(params, s, params, grad_fn=jnp.ones_like))(
    state
  )
  assert np.all(np.isnan(updates))


@pytest.mark.standard_promotion
def test_non_finite_gradient_at_probe_comes_out():
  params, data = mlp_params(), batch()
  grads = jax.grad(loss)(params, data)
  tx = optax.chain(
    msam_optax.msam(), optax.apply_if_finite(optax.adam(0.1), max_consecutive_errors=5)
  )
  updates, state = tx.update(
    grads,
    tx.init(params),
    params,
    grad_fn=lambda p: jax.tree.map(lambda x: x * jnp.nan, p),
  )
  chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
  assert optax.tree.get(state, 'total_notfinite') == 1


@pytest.mark.parametrize('magnitude', [1e-30, 1.0, 1e30])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_magnitude_of_gradient_does_not_change_sam(magnitude, dtype):
  params = jnp.zeros(4, dtype)
  grads = jnp.asarray(np.array([3.0, 0.0, -4.0, 0.0]) * magnitude, dtype)
  seen = []

  def grad_fn(p):
    seen.append(p)
    return p

  tx = msam_optax.sam(rho=1.0)
  _, state = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
  np.testing.assert_allclose(
    np.asarray(seen[0], np.float64), [0.6, 0.0, -0.8, 0.0], rtol=1e-2
  )
  np.testing.assert_allclose(state.slope, 5 * magnitude, rtol=1e-2)


def test_half_precision_norm_neither_overflows_nor_drifts():
  # 300² is not finite in float16; a sum of 1e5 squares in bfloat16 is 0.3 % off.
  for dtype, entry, n in (('float16', 300.0, 4), ('bfloat16', 0.01, 100_000)):
    grads = jnp.full(n, entry, dtype)
    tx = msam_optax.sam()
    _, state = tx.update(grads, tx.init(grads), grads, grad_fn=lambda p: p)
    exact = float(grads[0]) * np.sqrt(n)
    np.testing.assert_allclose(state.slope, exact, rtol=1e-5)


def test_lost_perturbation_shows_in_radius_and_float32_probe_keeps_it():
  params = jnp.ones(4, jnp.bfloat16)
  seen = []

  def grad_fn(p):
    seen.append(p)
    return p

  lost = msam_optax.sam(rho=1e-3)
  _, state = lost.update(params, lost.init(params), params, grad_fn=grad_fn)
  chex.assert_trees_all_equal(seen[-1], params)
  assert state.radius == 0.0

  kept = msam_optax.sam(rho=1e-3, perturbation_dtype='float32')
  updates, state = kept.update(params, kept.init(params), params, grad_fn=grad_fn)
  assert seen[-1].dtype == jnp.float32
  np.testing.assert_allclose(seen[-1], 1 + 0.5e-3, rtol=1e-7)
  np.testing.assert_allclose(state.radius, 1e-3, rtol=1e-3)
  assert updates.dtype == jnp.bfloat16


@pytest.mark.slow
def test_weights_do_not_drift_at_learning_rate_zero():
  tx = optax.chain(msam_optax.msam(rho=0.1), optax.sgd(0.0))
  params = start = mlp_params(jnp.bfloat16)
  state = tx.init(params)

  @jax.jit
  def step(params, state, data):
    grad = jax.grad(loss)
    updates, state = tx.update(
      grad(params, data), state, params, grad_fn=lambda p: grad(p, data)
    )
    return optax.apply_updates(params, updates), state

  for i in range(50):
    params, state = step(params, state, batch(i, dtype=jnp.bfloat16))
  chex.assert_trees_all_equal(params, start)


@pytest.mark.parametrize('clip_first', [True, False], ids=['before', 'after'])
def test_clipping_before_changes_the_radius_of_msam(clip_first):
  params, data = mlp_params(), batch()
  grads = jax.tree.map(lambda g: 100 * g, jax.grad(loss)(params, data))
  n = float(optax.tree.norm(grads))
  clip, method = optax.clip_by_global_norm(1.0), msam_optax.msam(rho=0.1)
  tx = optax.chain(clip, method) if clip_first else optax.chain(method, clip)
  updates, state = tx.update(
    grads,
    tx.init(params),
    params,
    grad_fn=lambda p: jax.tree.map(lambda g: 100 * g, jax.grad(loss)(p, data)),
  )
  seen = 1.0 if clip_first else n
  radius = optax.tree.get(state, 'radius')
  np.testing.assert_allclose(radius, 0.1 / np.sqrt(1 + seen**2), rtol=1e-3)
  if not clip_first:
    np.testing.assert_allclose(optax.tree.norm(updates), 1.0, rtol=1e-5)


@pytest.mark.standard_promotion
def test_foreign_extra_arguments_reach_others():
  params, data = mlp_params(), batch()
  value, grads = jax.value_and_grad(loss)(params, data)
  tx = optax.chain(
    msam_optax.msam(),
    optax.adam(0.1),
    optax.contrib.reduce_on_plateau(patience=1),
  )
  update = functools.partial(
    tx.update, grad_fn=lambda p: jax.grad(loss)(p, data), value=value, unknown='ignored'
  )
  state = tx.init(params)
  for _ in range(3):
    _, state = update(grads, state, params)
  assert optax.tree.get(state, 'scale') < 1.0


@pytest.mark.slow
@pytest.mark.parametrize('sync_ascent', [False, True], ids=['own', 'synced'])
@every_kind_slowly
@pytest.mark.parametrize(
  'mapped', [pytest.param('pmap', marks=pytest.mark.cpu), 'vmap']
)
def test_mapped_axis_equals_loop_over_parts(mapped, method, sync_ascent):
  parts = 4
  tx = transformation(method, axis_name='i', sync_ascent=sync_ascent)
  params, batches = mlp_params(), [batch(step) for step in range(parts)]
  data = jax.tree.map(lambda *xs: jnp.stack(xs), *batches)

  def replica(params, data):
    value, grads = jax.value_and_grad(loss)(params, data)
    value_and_grad_fn = jax.value_and_grad(lambda p: loss(p, data))
    return tx.update(
      grads, tx.init(params), params, value_and_grad_fn=value_and_grad_fn, value=value
    )

  run = {'pmap': jax.pmap, 'vmap': jax.vmap}[mapped]
  run = run(replica, axis_name='i', in_axes=(None, 0))
  # One program; pmap is one already.
  updates, state = (run if mapped == 'pmap' else jax.jit(run))(params, data)

  value_and_grad_fn = jax.jit(jax.value_and_grad(loss))
  gradients = [lambda p, data=data: value_and_grad_fn(p, data)[1] for data in batches]
  expected = by_hand.update(method, params, gradients, synced=sync_ascent)
  # Each replica's scalars, as it would have them alone, and their mean.
  own = [gradient(params) for gradient in gradients]
  mean = jax.tree.map(lambda *gs: np.mean(gs, axis=0), *own)
  alone, scalars = transformation(method), []
  for data, g in zip(batches, own, strict=True):
    _, new = alone.update(
      mean if sync_ascent else g,
      alone.init(params),
      params,
      value_and_grad_fn=lambda p, data=data: value_and_grad_fn(p, data),
      value=value_and_grad_fn(params, data)[0],
    )
    scalars.append(np.array([getattr(new, name) for name in SCALARS]))
  for i in (0, parts - 1):
    got = jax.tree.map(lambda x, i=i: x[i], (updates, state))
    chex.assert_trees_all_close(got[0], expected, rtol=1e-4, atol=1e-6)
    recorded = np.array([getattr(got[1], name) for name in SCALARS])
    np.testing.assert_allclose(recorded, np.mean(scalars, 0), rtol=1e-4, atol=1e-6)
    assert got[1].finite


SCALARS = ('slope', 'radius', 'probe_value', 'rise')


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_state_is_the_same_before_and_after_in_scan():
  tx = optax.chain(
    msam_optax.msam(optax.constant_schedule(0.1), optax.constant_schedule(1.0)),
    optax.adam(0.1),
  )

  def step(carry, i):
    params, state = carry
    value_and_grad_fn = jax.value_and_grad(lambda p: loss(p, batch(i)))
    value, grads = value_and_grad_fn(params)
    updates, state = tx.update(
      grads, state, params, value=value, value_and_grad_fn=value_and_grad_fn
    )
    return (optax.apply_updates(params, updates), state), value

  params = mlp_params()
  (_, state), values = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(40))
  assert state[0].count == 40
  assert np.mean(values[-10:]) < np.mean(values[:10])


@pytest.mark.slow
def test_derivative_through_a_scanned_run():
  tx = optax.chain(msam_optax.msam(rho=0.1), optax.sgd(0.1))
  grad_fn = jax.grad(lambda w: jnp.sum(w**4))

  def final(w):
    def step(carry, _):
      w, state = carry
      updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
      return (w + updates, state), None

    (w, _), _ = jax.lax.scan(step, (w, tx.init(w)), length=3)
    return jnp.sum(w)

  w, shift = jnp.ones(2), jnp.array([1e-2, 0.0])
  numeric = (final(w + shift) - final(w - shift)) / 2e-2
  np.testing.assert_allclose(jax.grad(final)(w)[0], numeric, rtol=1e-2)
  # Where nothing moves, that of plain descent on w⁴: 1, and not NaN.
  np.testing.assert_allclose(jax.grad(final)(jnp.zeros(2)), 1.0)


@pytest.mark.slow
def test_gradient_flows_to_the_radius():
  """Through the probe: d/dρ of ½‖w + ρ u‖² summed over the update is known."""
  w = jnp.array([3.0, 4.0])
  tx = lambda rho: msam_optax.sam(rho)

  def first_update(rho):
    updates, _ = tx(rho).update(w, tx(rho).init(w), w, grad_fn=lambda p: p)
    return jnp.sum(updates)

  np.testing.assert_allclose(jax.grad(first_update)(0.5), 0.6 + 0.8, rtol=1e-6)
