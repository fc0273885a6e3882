"""A transformation that is given no gradient: it takes both, in one loop."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import msam_optax
from tests import by_hand
from tests.methods import every_kind
from tests.methods import every_method
from tests.methods import METHODS
from tests.methods import transformation
from tests.problems import batch
from tests.problems import loss
from tests.problems import mlp_params


def both_passes(tx, state, params, f, **extra):
  """One step, compiled: operation by operation there is no loop."""
  update = lambda state, params: tx.update(
    None, state, params, value_and_grad_fn=f, **extra
  )
  return jax.jit(update)(state, params)


def quadratic(params):
  """Half the sum of the squares of all entries, whose gradient is the params."""
  return sum(jnp.sum(jnp.square(w)) for w in jax.tree.leaves(params)) / 2


def copies_of(name, function, *args):
  """How often a primitive occurs in a program, its inner ones included."""
  return str(jax.make_jaxpr(function)(*args)).count(f' {name} ')


@pytest.mark.usefixtures('x64')
@every_method
def test_steps_are_those_by_hand(method):
  """Of several steps, for what remembers; with the same state as two calls leave."""
  tx, params = transformation(method), mlp_params(jnp.float64)
  state = others = tx.init(params)
  memory = {}

  @jax.jit
  def step(state, params, data):
    f = lambda p: jax.value_and_grad(loss)(p, data)
    return tx.update(None, state, params, value_and_grad_fn=f)

  @jax.jit
  def in_two_calls(state, params, data):
    f = lambda p: jax.value_and_grad(loss)(p, data)
    value, grads = f(params)
    return tx.update(grads, state, params, value_and_grad_fn=f, value=value)

  for i in range(4):
    data = batch(i, dtype=jnp.float64)
    updates, new = step(state, params, data)
    _, others = in_two_calls(others, params, data)
    gradient = lambda p, data=data: jax.grad(loss)(p, data)
    expected = by_hand.update(method, params, [gradient], memory=memory)
    chex.assert_trees_all_close(updates, expected, rtol=1e-9, atol=1e-13)
    chex.assert_trees_all_close(new, others, rtol=1e-9, atol=1e-13)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    np.testing.assert_allclose(new.loss, loss(params, data), rtol=1e-12)
    state, params = new, jax.tree.map(lambda w, u: w - 0.1 * u, params, updates)


@pytest.mark.standard_promotion
def test_sam_equals_optax_step_for_step():
  ours = optax.chain(msam_optax.sam(rho=0.1), optax.adam(0.01))
  adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
  theirs = optax.contrib.sam(optax.adam(0.01), adversary, opaque_mode=True)

  @jax.jit
  def step(a, b, data):
    grad = jax.grad(loss)
    (params, state), (their_params, their_state) = a, b
    f = lambda p: jax.value_and_grad(loss)(p, data)
    updates, state = ours.update(None, state, params, value_and_grad_fn=f)
    their_updates, their_state = theirs.update(
      grad(their_params, data),
      their_state,
      their_params,
      grad_fn=lambda p, _: grad(p, data),
    )
    a = optax.apply_updates(params, updates), state
    return a, (optax.apply_updates(their_params, their_updates), their_state)

  params = mlp_params()
  a, b = (params, ours.init(params)), (params, theirs.init(params))
  for i in range(5):
    a, b = step(a, b, batch(i))
    chex.assert_trees_all_close(a[0], b[0], rtol=1e-5, atol=1e-6)


@every_kind
def test_the_program_holds_one_copy_of_the_gradient(method):
  tx, params = transformation(method), mlp_params()
  f = jax.value_and_grad(lambda p: loss(p, batch()))

  def once(state, params):
    return tx.update(None, state, params, value_and_grad_fn=f)

  def twice(state, params):
    return tx.update(f(params)[1], state, params, value_and_grad_fn=f)

  state = tx.init(params)
  assert copies_of('tanh', f, params) == 1
  assert copies_of('tanh', once, state, params) == 1
  passes = 1 + len(METHODS[method].scales)
  assert copies_of('tanh', twice, state, params) == passes


def test_a_loop_takes_no_gradient_in_vain():
  """Those of a metric are taken in the turn of the probe alone, not in the first."""
  calls = []

  def ascend(grads, state, params, *, grad_fn, space, **extra_args):
    again = grad_fn(jax.tree.map(lambda w: 2 * w, params))
    return msam_optax.euclidean().ascend(again, state, params, space=space)

  def f(w):
    jax.debug.callback(lambda: calls.append(1))
    return quadratic(w), w

  metric = msam_optax.Metric(lambda params: optax.EmptyState(), ascend)
  tx = msam_optax.sharpness_aware(metric, 0.5)
  w = jnp.array([0.6, 0.8])
  updates, state = both_passes(tx, tx.init(w), w, f)
  jax.effects_barrier()
  assert len(calls) == 3
  np.testing.assert_allclose(updates, 1.5 * w, rtol=1e-6)
  np.testing.assert_allclose(state.slope, 2.0, rtol=1e-6)


def test_a_step_that_may_skip_its_probes_takes_one_gradient_then():
  calls = []

  def f(w):
    jax.debug.callback(lambda: calls.append(1))
    return quadratic(w), w

  tx = msam_optax.look_sam(0.1, every=3)
  w, taken = jnp.array([0.6, 0.8]), []
  state = tx.init(w)
  step = jax.jit(lambda state: tx.update(None, state, w, value_and_grad_fn=f))
  for _ in range(4):
    _, state = step(state)
    jax.effects_barrier()
    taken.append(len(calls))
    np.testing.assert_allclose(state.loss, 0.5, rtol=1e-6)
  assert taken == [2, 3, 4, 6]


def test_operation_by_operation_is_the_same():
  params, tx = mlp_params(), msam_optax.msam(rho=0.3)
  f = jax.value_and_grad(lambda p: loss(p, batch()))
  eager = tx.update(None, tx.init(params), params, value_and_grad_fn=f)
  chex.assert_trees_all_close(
    eager, both_passes(tx, tx.init(params), params, f), rtol=1e-5, atol=1e-7
  )
  # It may then be what no program is made of.
  traced = []
  with_numpy = lambda w: (traced.append(isinstance(w, jax.core.Tracer)), (0.0, w))[1]
  tx.update(None, tx.init(params), params, value_and_grad_fn=with_numpy)
  assert traced == [False, False]


def test_grad_fn_alone_gives_both_gradients_and_no_loss():
  w, tx = jnp.array([0.6, 0.8]), msam_optax.sam(rho=0.5)
  update = lambda w: tx.update(None, tx.init(w), w, grad_fn=lambda w: w)
  updates, state = jax.jit(update)(w)
  np.testing.assert_allclose(updates, 1.5 * w, rtol=1e-6)
  assert (state.loss, state.probe_value, state.rise) == (0.0, 0.0, 0.0)


def test_a_value_that_is_given_is_recorded():
  w, tx = jnp.array([0.6, 0.8]), msam_optax.sam(rho=0.5)
  _, state = both_passes(tx, tx.init(w), w, jax.value_and_grad(quadratic), value=0.25)
  np.testing.assert_allclose(state.loss, 0.25)
  np.testing.assert_allclose(state.rise, 1.5**2 / 2 - 0.25, rtol=1e-6)
  _, state = tx.update(w, tx.init(w), w, grad_fn=lambda w: w, value=0.25)
  np.testing.assert_allclose(state.loss, 0.25)


def test_the_metric_knows_the_loss():
  """As the ``value`` that two calls would give it."""

  def ascend(grads, state, params, *, space, value=None, **extra_args):
    ascent, _ = msam_optax.euclidean().ascend(grads, (), params, space=space)
    return ascent, jnp.asarray(value, jnp.float32)

  metric = msam_optax.Metric(lambda params: jnp.zeros([]), ascend)
  tx = msam_optax.sharpness_aware(metric, 0.5)
  w = jnp.array([0.6, 0.8])
  f = jax.value_and_grad(quadratic)
  for extra, known in (({}, 0.5), ({'value': 0.25}, 0.25)):
    _, state = both_passes(tx, tx.init(w), w, f, **extra)
    np.testing.assert_allclose(state.metric_state, known, rtol=1e-6)


def test_leaves_without_a_gradient():
  """None, as Equinox has for what is not trained, and what integers and keys have."""
  params = {'w': jnp.array([0.6, 0.8]), 'frozen': jnp.ones(3), 'steps': jnp.array(7)}
  mask = {'w': True, 'frozen': True, 'steps': False}

  def f(p):
    value, grads = jax.value_and_grad(lambda p: quadratic(p['w']), allow_int=True)(p)
    return value, {**grads, 'frozen': None}

  tx = msam_optax.sam(rho=0.5, mask=mask)
  updates, state = both_passes(tx, tx.init(params), params, f)
  expected, _ = tx.update(f(params)[1], tx.init(params), params, value_and_grad_fn=f)
  assert updates['frozen'] is None
  assert updates['steps'].dtype == expected['steps'].dtype == jax.dtypes.float0
  np.testing.assert_allclose(updates['w'], [0.9, 1.2], rtol=1e-6)
  np.testing.assert_allclose(state.radius, 0.5, rtol=1e-6)


def test_complex_leaves_and_masks():
  params = {'w': jnp.array([0.6, 0.8]), 'z': jnp.array([1.0 + 2.0j])}

  def f(p):
    value = lambda p: quadratic(p['w']) + jnp.sum(jnp.abs(p['z']) ** 2) / 2
    return jax.value_and_grad(value)(p)

  for method in ('msam', 'gsam'):
    tx = transformation(method, mask={'w': True, 'z': False})
    chex.assert_trees_all_close(
      both_passes(tx, tx.init(params), params, f)[0],
      tx.update(f(params)[1], tx.init(params), params, value_and_grad_fn=f)[0],
      rtol=1e-5,
    )


def test_overwritten_leaves_get_the_values_of_the_clean_pass():
  params = {
    'params': {'w': jnp.array([0.6, 0.8])},
    '_overwrite_with_gradient': {'scale': jnp.array([3.0])},
  }

  def f(p):
    w = p['params']['w']
    new = {'scale': p['_overwrite_with_gradient']['scale'] + jnp.sum(w)}
    return quadratic(w), {'params': {'w': w}, '_overwrite_with_gradient': new}

  tx = msam_optax.sam(rho=0.5)
  updates, _ = both_passes(tx, tx.init(params), params, f)
  np.testing.assert_allclose(updates['params']['w'], [0.9, 1.2], rtol=1e-6)
  new = updates['_overwrite_with_gradient']['scale']
  np.testing.assert_allclose(new, 4.4, rtol=1e-6)


@pytest.mark.parametrize('probe', [None, jnp.float32], ids=['as-is', 'float32'])
def test_half_precision_keeps_its_dtypes(probe):
  params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), mlp_params())
  seen = []

  def f(p):
    seen.extend(w.dtype for w in jax.tree.leaves(p))
    data = jax.tree.map(lambda x: x.astype(seen[-1]), batch())
    return jax.value_and_grad(loss)(p, data)

  tx = msam_optax.msam(rho=0.3, perturbation_dtype=probe)
  updates, state = both_passes(tx, tx.init(params), params, f)
  chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))
  wide = jax.tree.map(lambda w: w.astype(jnp.float32), params)
  exact = by_hand.update('msam', wide, [lambda p: jax.grad(loss)(p, batch())])
  as_float = jax.tree.map(lambda u: u.astype(jnp.float32), updates)
  chex.assert_trees_all_close(as_float, exact, rtol=0.1, atol=0.03)
  assert seen[-1] == (probe or jnp.bfloat16)


@pytest.mark.parametrize('magnitude', [1e-30, 1e30])
def test_magnitude_of_the_gradient_does_not_matter(magnitude):
  w, tx = jnp.zeros(2), msam_optax.sam(rho=1.0)
  direction = jnp.array([3.0, -4.0])
  f = lambda w: (0.0, jnp.where(jnp.any(w != 0), w, magnitude * direction))
  updates, state = both_passes(tx, tx.init(w), w, f)
  np.testing.assert_allclose(updates, [0.6, -0.8], rtol=1e-5)
  np.testing.assert_allclose(state.slope, 5 * magnitude, rtol=1e-5)


@pytest.mark.parametrize('bad_pass', ['clean', 'probe'])
def test_what_is_not_finite_is_seen_and_does_not_stay(bad_pass):
  w, tx = {'a': jnp.ones(2), 'b': jnp.ones(2)}, msam_optax.vasso(rho=0.5)

  def f(p):
    bad = jnp.all(p['a'] == 1) == (bad_pass == 'clean')
    return 0.0, {'a': jnp.where(bad, jnp.nan, p['a']), 'b': p['b']}

  updates, state = both_passes(tx, tx.init(w), w, f)
  assert np.isnan(updates['a']).all()
  assert np.isfinite(updates['b']).all()
  assert not state.finite
  chex.assert_tree_all_finite(state)


def test_a_healthy_step_makes_no_nan_and_a_zero_gradient_no_probe():
  jax.config.update('jax_debug_nans', True)
  try:
    for method in ('msam', 'gsam', 'cr_sam', 'friendly_sam'):
      params, tx = mlp_params(), transformation(method)
      f = jax.value_and_grad(lambda p: loss(p, batch()))
      chex.assert_tree_all_finite(both_passes(tx, tx.init(params), params, f))
      flat = lambda p: (0.0, jax.tree.map(jnp.zeros_like, p))
      updates, state = both_passes(tx, tx.init(params), params, flat)
      chex.assert_trees_all_equal(updates, flat(params)[1])
      assert state.radius == 0.0
  finally:
    jax.config.update('jax_debug_nans', False)


def test_an_infinite_radius_is_not_seen_by_the_clean_pass():
  w = jnp.array([3.0, 4.0])
  tx = msam_optax.msam(rho=np.inf, max_rise=2.0)
  f = jax.value_and_grad(quadratic)
  updates, state = both_passes(tx, tx.init(w), w, f)
  expected: Any = tx.update(w, tx.init(w), w, value_and_grad_fn=f)[0]
  np.testing.assert_allclose(updates, expected, rtol=1e-6)
  np.testing.assert_allclose(state.loss, 12.5, rtol=1e-6)


def test_under_vmap_over_radii_with_schedules_and_derivatives():
  f, w = jax.value_and_grad(quadratic), jnp.array([0.6, 0.8])
  tx = optax.inject_hyperparams(msam_optax.sam)(rho=0.1)

  @functools.partial(jax.vmap, in_axes=(0, None))
  def updates_at(rho, w):
    state = tx.init(w)
    state.hyperparams['rho'] = rho
    return tx.update(None, state, w, value_and_grad_fn=f)[0]

  radii = jnp.array([0.1, 0.5, 1.0])
  expected = (1 + radii)[:, None] * w[None]
  np.testing.assert_allclose(jax.jit(updates_at)(radii, w), expected, rtol=1e-6)
  # The update is (1 + ρ/‖w‖) w, of which the derivative in ρ is the direction.
  slopes = jax.jacobian(lambda rho: updates_at(rho[None], w)[0])(jnp.array(0.5))
  np.testing.assert_allclose(slopes, w, rtol=1e-5)

  scheduled = msam_optax.sam(optax.linear_schedule(0.0, 1.0, 2))
  state = scheduled.init(w)
  for rho in (0.0, 0.5, 1.0):
    updates, state = both_passes(scheduled, state, w, f)
    np.testing.assert_allclose(updates, (1 + rho) * w, rtol=1e-6)


@pytest.mark.standard_promotion
def test_trains_in_a_scan_and_gives_its_buffers_away():
  tx = optax.chain(msam_optax.vasso(rho=0.1), optax.adam(0.05))

  @functools.partial(jax.jit, donate_argnums=0)
  def train(carry):
    def step(carry, i):
      params, state = carry
      f = lambda p: jax.value_and_grad(loss)(p, batch(i))
      updates, state = tx.update(None, state, params, value_and_grad_fn=f)
      value = optax.tree.get(state, 'loss')
      return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(step, carry, jnp.arange(40))

  params = mlp_params()
  (_, state), values = train((params, tx.init(params)))
  assert state[0].count == 40
  assert np.mean(values[-10:]) < np.mean(values[:10])


@pytest.mark.cpu
@pytest.mark.parametrize('sync_ascent', [False, True], ids=['own', 'synced'])
@every_kind
def test_replicas(method, sync_ascent):
  """In a checked ``shard_map``, against a loop over the parts of the batch."""
  parts = 4
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:parts]), ('i',))
  tx = transformation(method, axis_name='i', sync_ascent=sync_ascent)
  params, batches = mlp_params(), [batch(i) for i in range(parts)]
  data = jax.tree.map(lambda *xs: jnp.concatenate(xs), *batches)

  def replica(params, data):
    params = jax.tree.map(lambda w: as_varying(w, 'i'), params)
    f = lambda p: jax.value_and_grad(loss)(p, data)
    return tx.update(None, tx.init(params), params, value_and_grad_fn=f)

  run = jax.shard_map(replica, mesh=mesh, in_specs=(P(), P('i')), out_specs=P())
  updates, state = jax.jit(run)(params, data)
  gradients = [lambda p, d=d: jax.grad(loss)(p, d) for d in batches]
  expected = by_hand.update(method, params, gradients, synced=sync_ascent)
  chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-6)
  clean = np.mean([loss(params, d) for d in batches])
  np.testing.assert_allclose(state.loss, clean, rtol=1e-5)


@pytest.mark.cpu
def test_a_state_of_each_replica_and_parameters_in_parts():
  """A memory of the gradient of each device, and leaves that are spread over them."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ('i', 'j'))
  w, x = jnp.arange(1.0, 5.0), jnp.array([1.0, 3.0])
  metric = msam_optax.smoothed(decay=0.5)
  tx = msam_optax.sharpness_aware(metric, 0.5, axis_name='i', param_specs=P('j'))

  def replica(w, x):
    w = as_varying(w, 'i')
    f = lambda w: jax.value_and_grad(lambda w: jnp.sum(w**2) * x[0] / 2)(w)
    _, state = tx.update(None, tx.init(w), w, value_and_grad_fn=f)
    return tx.update(None, state, w, value_and_grad_fn=f)[0]

  specs = P('j'), P('i')
  run = jax.shard_map(replica, mesh=mesh, in_specs=specs, out_specs=P('j'))
  updates = jax.jit(run)(w, x)
  # Each goes along w, and the mean of x (w + w/(2‖w‖)) is that with the mean of x.
  expected = 2.0 * w * (1 + 0.5 / np.linalg.norm(w))
  np.testing.assert_allclose(updates, expected, rtol=1e-5)


def as_varying(w, axis):
  if hasattr(jax.lax, 'pcast'):
    return jax.lax.pcast(w, axis, to='varying')
  return jax.lax.pvary(w, axis)


@pytest.mark.standard_promotion
def test_wrappers_between():
  """Which of Optax's hand None on, and which cannot."""
  w, f = jnp.array([0.3, 0.4]), jax.value_and_grad(quadratic)
  sgd, sam = optax.sgd(1.0), msam_optax.sam(rho=0.5)
  for tx in (
    optax.named_chain(('ascent', sam), ('descent', sgd)),
    optax.chain(sam, optax.apply_if_finite(sgd, 3)),
    optax.contrib.schedule_free(optax.chain(sam, sgd), 1.0),
  ):
    updates, state = both_passes(tx, tx.init(w), w, f)
    expected: Any = tx.update(w, tx.init(w), w, value_and_grad_fn=f)[0]
    np.testing.assert_allclose(updates, expected, rtol=1e-5)
    np.testing.assert_allclose(optax.tree.get(state, 'loss'), 0.125, rtol=1e-6)
  wrappers: list[Any] = [
    optax.MultiSteps(optax.chain(sam, sgd), 2),
    optax.apply_if_finite(optax.chain(sam, sgd), 3),
  ]
  for tx in wrappers:
    with pytest.raises((TypeError, ValueError), match=r'structure|Expected None'):
      tx.update(None, tx.init(w), w, value_and_grad_fn=f)


def test_what_is_wrong_is_named():
  w = {'w': jnp.array([0.3, 0.4])}
  f = jax.value_and_grad(quadratic)
  tx = msam_optax.msam()
  state = tx.init(w)
  for update in (tx.update, jax.jit(tx.update, static_argnames='value_and_grad_fn')):
    with_aux = lambda p: ((0.0, {'stats': 1}), p)
    with pytest.raises(
      ValueError, match=r'must be a scalar(.|\n)*has_aux=True\)`, for'
    ):
      update(None, state, w, value_and_grad_fn=with_aux)
    with pytest.raises(
      ValueError, match=r"like the params, but there is an extra leaf .*'b'"
    ):
      update(None, state, w, value_and_grad_fn=lambda p: (0.0, {**p, 'b': p['w']}))
    with pytest.raises(ValueError, match='selects no leaf, or no leaf has a gradient'):
      update(None, state, w, value_and_grad_fn=lambda p: (0.0, {'w': None}))
    with pytest.raises(ValueError, match='given no gradients, but an empty dict'):
      update({}, state, w, value_and_grad_fn=f)
  with pytest.raises(ValueError, match='Or it takes both'):
    tx.update(None, state, w)
  with pytest.raises(ValueError, match='needs them'):
    tx.update(None, state, value_and_grad_fn=f)
  forgotten: Any = tx.update  # None, the first argument.
  with pytest.raises(ValueError, match=r'needs them.*`tx\.update\(None, state, params'):
    forgotten(state, w, value_and_grad_fn=f)
  for tx in (
    msam_optax.lagged(optax.sgd(0.1)),
    msam_optax.momentum_sam(optax.sgd(0.1, momentum=0.9)),
  ):
    with pytest.raises(ValueError, match='one gradient per step'):
      tx.update(None, tx.init(w), w, value_and_grad_fn=f)
