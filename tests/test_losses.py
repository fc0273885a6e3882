"""The user's loss: totals with weights, loss scaling, and what it may return.

The truth is plain NumPy in float64: a linear regression, whose gradient is known.
"""

import functools

import chex
import equinox as eqx
from flax import linen as nn
from flax.linen import fp8_ops
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import msam_optax
from tests import by_hand
from tests import methods
from tests.devices.test_parallel import mesh
from tests.devices.test_parallel import on_devices
from tests.devices.test_parallel import vary
from tests.methods import every_method_slowly

ALPHA, RHO = 2.0, 0.3
METHOD = methods.monge_sam(ALPHA)._replace(rho=RHO)
both_syncs = pytest.mark.parametrize('sync', [False, True], ids=['own', 'synced'])
both_ways = pytest.mark.parametrize('vectorize', [False, True], ids=['scan', 'vmap'])
passes = pytest.mark.parametrize('once', [False, True], ids=['two copies', 'one loop'])

# Of the four parts one is full, one is empty, and two are in between.
REAL = np.array([1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 1, 0, 1])


def make_problem():
  """Parameters ``[3]``, inputs ``[16, 3]``, targets ``[16]``, and who is real."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return draw(3), (draw(16, 3), draw(16), REAL.astype(np.float32))


def dealt(batch, shards, devices=1):
  """The rows in an order in which micro-batch ``i`` of a device is its block ``i``."""

  def deal(a):
    blocks = a.reshape(devices, shards, -1, *a.shape[1:])
    return np.swapaxes(blocks, 1, 2).reshape(a.shape)

  return jax.tree.map(deal, batch)


def squares(w, batch):
  """The sum of squared errors over the real examples, and their number."""
  x, y, real = batch
  return jnp.sum((x @ w - y) ** 2 * real), jnp.sum(real)


def gradient_by_hand(parts=1, synced=False, method=METHOD):
  """The value and the gradient, with all means over real examples."""
  w, batch = make_problem()
  w, batch = np.float64(w), tuple(np.split(np.float64(a), parts) for a in batch)
  cuts = list(zip(*batch, strict=True))
  weights = [real.sum() for _, _, real in cuts]

  def gradient(w, cut, weight):
    x, y, real = cut
    return 2 * ((x @ w - y) * real) @ x / max(weight, 1)

  gradients = [
    functools.partial(gradient, cut=cut, weight=weight)
    for cut, weight in zip(cuts, weights, strict=True)
  ]
  total = sum(((x @ w - y) ** 2 * real).sum() for x, y, real in cuts)
  update = by_hand.update(method, w, gradients, weights=weights, synced=synced)
  return total / sum(weights), update


def drop_in(loss_fn=squares, method=METHOD, **options):
  return methods.drop_in(method, loss_fn, **{'has_weight': True, **options})


def assert_close(got, want, rtol=1e-5):
  # One entry is the difference of numbers that are a hundred times as large.
  want = jax.tree.map(np.float32, want)
  chex.assert_trees_all_close(got, want, rtol=rtol, atol=3e-7)


@passes
def test_a_weighted_loss_is_total_over_weight(once):
  w, batch = make_problem()
  assert_close(drop_in(compile_once=once)(w, batch), gradient_by_hand())


@both_syncs
@both_ways
@passes
def test_micro_batches_count_by_their_weights(once, vectorize, sync):
  w, batch = make_problem()
  value_and_grad_fn = drop_in(
    shards=4, vectorize_shards=vectorize, sync_ascent=sync, compile_once=once
  )
  value, grads = jax.jit(value_and_grad_fn)(w, dealt(batch, 4))
  assert_close((value, grads), gradient_by_hand(4, sync))
  equal = np.mean(
    [drop_in()(w, jax.tree.map(lambda a: a[i : i + 4], batch))[0] for i in (0, 4, 12)]
  )
  assert abs(value - equal) > 0.01


@both_syncs
@passes
@every_method_slowly
def test_parts_count_by_their_weights_in_every_method(method, once, sync):
  w, batch = make_problem()
  value_and_grad_fn = drop_in(
    method=method, shards=4, sync_ascent=sync, compile_once=once
  )
  got = jax.jit(value_and_grad_fn)(w, dealt(batch, 4))
  assert_close(got, gradient_by_hand(4, sync, method))


@both_ways
def test_one_shared_probe_equals_the_whole_batch(vectorize):
  w, batch = make_problem()
  value_and_grad_fn = drop_in(shards=4, vectorize_shards=vectorize, sync_ascent=True)
  assert_close(value_and_grad_fn(w, batch), gradient_by_hand())


@pytest.mark.slow
@pytest.mark.cpu
@pytest.mark.parametrize('shards', [None, 2])
@pytest.mark.parametrize('kind', ['checked', 'unchecked', 'vmap'])
@both_syncs
@passes
def test_devices_count_by_their_weights(once, sync, kind, shards):
  """The value is that of all devices, and one of them may be empty."""
  w, batch = make_problem()
  step = drop_in(axis_name='i', sync_ascent=sync, compile_once=once, shards=shards)
  batch = dealt(batch, shards or 1, devices=4)
  if kind == 'vmap':
    batch = jax.tree.map(lambda a: a.reshape(4, 4, *a.shape[1:]), batch)
    mapped = jax.jit(jax.vmap(step, axis_name='i', in_axes=(None, 0)))
    values, grads = mapped(w, batch)
    np.testing.assert_array_equal(grads, np.tile(grads[0], (4, 1)))
    got = values[0], grads[0]
  else:
    checked = kind == 'checked'
    got = on_devices(
      lambda w, batch: step(vary(w) if checked else w, batch),
      mesh(i=4),
      in_specs=(P(), P('i')),
      out_specs=P(),
      check_vma=checked,
    )(w, batch)
  assert_close(got, gradient_by_hand(4 * (shards or 1), sync))


@pytest.mark.cpu
@both_syncs
@pytest.mark.filterwarnings('ignore:.*pmap.*')
def test_pmap_counts_by_weights(sync):
  w, batch = make_problem()
  batch = jax.tree.map(lambda a: a.reshape(4, 4, *a.shape[1:]), batch)
  step = drop_in(axis_name='i', sync_ascent=sync)
  values, grads = jax.pmap(step, axis_name='i', in_axes=(None, 0))(w, batch)
  for got in zip(values, grads, strict=True):
    assert_close(got, gradient_by_hand(4, sync))


@pytest.mark.slow
@both_syncs
@passes
@pytest.mark.parametrize('what', ['total', 'weight'])
def test_what_is_not_finite_on_one_device_is_seen_on_all(what, once, sync):
  w, batch = make_problem()
  batch = jax.tree.map(lambda a: a.reshape(4, 4, *a.shape[1:]), batch)
  bad = jnp.array([0.0, np.nan, 0.0, 0.0])

  def loss_fn(w, batch):
    total, weight = squares(w, batch[0])
    spoil = lambda name: batch[1] if name == what else 0.0
    return total * (1 + spoil('total')), weight + spoil('weight')

  step = drop_in(loss_fn, axis_name='i', sync_ascent=sync, compile_once=once)
  _, grads = jax.vmap(step, axis_name='i', in_axes=(None, 0))(w, (batch, bad))
  assert np.isnan(grads).all()


@pytest.mark.parametrize('options', [{}, {'shards': 4}, {'loss_scale': 8.0}], ids=str)
def test_a_batch_that_is_all_empty_is_loud(options):
  w, (x, y, real) = make_problem()
  value, grads = drop_in(**options)(w, (x, y, 0 * real))
  assert np.isnan(value)
  assert np.isnan(grads).all()


@pytest.mark.slow
def test_an_empty_part_makes_no_nan_on_the_way():
  w, batch = make_problem()
  with jax.debug_nans(True), jax.disable_jit():
    got = drop_in(shards=4, vectorize_shards=True)(w, dealt(batch, 4))
    assert_close(got, gradient_by_hand(4))


@both_ways
def test_weights_matter_by_their_ratios_alone(vectorize):
  """Fractions of an example, as importance weights are: the slopes are the same."""
  w, batch = make_problem()
  small = lambda w, batch: jax.tree.map(lambda x: x / 64, squares(w, batch))
  value_and_grad_fn = drop_in(small, shards=4, vectorize_shards=vectorize)
  assert_close(value_and_grad_fn(w, dealt(batch, 4)), gradient_by_hand(4))


@passes
def test_weights_that_cancel_in_a_part_lose_nothing(once):
  """Weights 2 and -2 in one part, 3 in the other: 0 is not taken for emptiness."""
  x, n = jnp.array([1.0, 2.0, 5.0, 4.0]), jnp.array([2.0, 1.0, -2.0, 2.0])
  f = lambda w, batch: (jnp.sum(batch[1] * (batch[0] - w) ** 2), jnp.sum(batch[1]))
  value_and_grad_fn = msam_optax.value_and_grad(
    f, rho=0.0, has_weight=True, shards=2, compile_once=once
  )
  value, grad = value_and_grad_fn(jnp.float32(1.0), (x, n))
  np.testing.assert_allclose(value, (-2 * 16 + 1 + 2 * 9) / 3, rtol=1e-6)
  np.testing.assert_allclose(grad, -2 * (-2 * 4 + 1 + 2 * 3) / 3, rtol=1e-6)


@pytest.mark.slow
@both_ways
@passes
def test_counts_may_be_integers_and_totals_bfloat16(once, vectorize):
  """Neither 1/7 nor a mean of sevenths is rounded to bfloat16 on the way."""
  x = jnp.ones(16, jnp.bfloat16)

  def loss_fn(w, batch):
    x, real = batch
    return jnp.sum(w * x * real.astype(x.dtype)), jnp.sum(real)

  value_and_grad_fn = drop_in(
    loss_fn, shards=2, vectorize_shards=vectorize, compile_once=once, has_weight=True
  )
  real = jnp.arange(16) < 7
  value, grad = value_and_grad_fn(
    jnp.float32(1.0).astype(jnp.bfloat16), (x, real.astype(int))
  )
  assert (value.dtype, grad.dtype) == (jnp.float32, jnp.bfloat16)
  assert (value, grad) == (1.0, 1.0)


def test_the_weight_of_a_bfloat16_total_is_not_rounded():
  """The slope is 8, and not 8.016 as with 1/7 in bfloat16."""
  loss_fn = lambda w: (jnp.bfloat16(56.0) * w.astype(jnp.bfloat16), 7)
  _, grad = drop_in(loss_fn)(jnp.float32(1.0))
  np.testing.assert_allclose(grad, 8.0, rtol=1e-6)


@both_ways
@passes
def test_aux_beside_a_weight(once, vectorize):
  w, batch = make_problem()
  value_and_grad_fn = drop_in(
    lambda w, batch: (squares(w, batch), w[0] + batch[1][0]),
    has_aux=True,
    shards=4,
    vectorize_shards=vectorize,
    compile_once=once,
  )
  (value, aux), grads = value_and_grad_fn(w, dealt(batch, 4))
  assert_close((value, grads), gradient_by_hand(4))
  np.testing.assert_allclose(aux, w[0] + batch[1][::4], rtol=1e-6)


@pytest.mark.cpu
def test_weights_that_differ_where_gradients_are_summed_are_refused():
  w, batch = make_problem()
  message = r"weight may differ along the axis 'i'.*(pcast|pvary)"
  with pytest.raises(ValueError, match=message):
    on_devices(
      lambda w, batch: drop_in()(w, batch)[1],
      mesh(i=4),
      in_specs=(P(), P('i')),
      out_specs=P(),
    )(w, batch)


@pytest.mark.cpu
@pytest.mark.skipif(not hasattr(jax.lax, 'pcast'), reason='JAX itself fails before')
def test_a_loss_may_sum_over_devices_itself():
  w, batch = make_problem()
  summed = lambda w, batch: jax.lax.psum(squares(w, batch), 'i')
  got = on_devices(drop_in(summed), mesh(i=4), in_specs=(P(), P('i')), out_specs=P())(
    w, batch
  )
  assert_close(got, gradient_by_hand())


# ---- Loss scaling


@pytest.mark.slow
@passes
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
@pytest.mark.parametrize('shards', [None, 2])
def test_a_scaled_gradient_does_not_underflow(shards, dtype, once):
  """2⁻²⁶ is zero in float16, and α = 2²⁶ acts on the gradient as it is."""
  tiny, rho, alpha = 2.0**-26, 25.0, 2.0**26
  seen = []

  def loss_fn(w, x):
    """``2⁻²⁶ Σ w²/2``, in the middle in float16, where its cotangent is zero."""
    w = w.astype(jnp.float32)
    jax.debug.callback(seen.append, w)
    h = jnp.sum(w**2) / 2 * jnp.mean(x)
    return tiny * h.astype(jnp.float16).astype(jnp.float32)

  w, x = jnp.array([3.0, 4.0], dtype), jnp.ones(4)
  options = {'compile_once': once, 'shards': shards}
  metric = msam_optax.monge(alpha)
  _, plain = msam_optax.value_and_grad(loss_fn, metric, rho, **options)(w, x)
  assert (plain == 0).all()
  value_and_grad_fn = msam_optax.value_and_grad(
    loss_fn, metric, rho, loss_scale=2.0**20, **options
  )
  value, grads = jax.block_until_ready(value_and_grad_fn(w, x))
  jax.effects_barrier()
  np.testing.assert_allclose(value, tiny * 12.5, rtol=1e-3)
  assert grads.dtype == dtype
  n = 5 * tiny
  radius = rho / np.sqrt(1 + (alpha * n) ** 2)
  probe = np.array([3.0, 4.0]) * (1 + radius / 5)
  rtol = 1e-6 if dtype == 'float32' else 1e-3
  np.testing.assert_allclose(max(seen, key=np.linalg.norm), probe, rtol=rtol)
  np.testing.assert_allclose(np.float64(grads), probe * tiny, rtol, 2.0**-25)


@pytest.mark.slow
@passes
@both_syncs
@pytest.mark.parametrize('weight', [False, True], ids=['mean', 'weighted'])
def test_powers_of_two_change_no_bit(weight, sync, once):
  w, batch = make_problem()
  loss_fn = squares if weight else lambda w, batch: squares(w, batch)[0] / 8
  results = [
    drop_in(
      loss_fn,
      has_weight=weight,
      loss_scale=scale,
      shards=2,
      sync_ascent=sync,
      compile_once=once,
    )(w, batch)
    for scale in (1.0, jnp.float32(2.0**15), 2.0**-9)
  ]
  # Old compilers add up in another order where they see the scale.
  rtol = 0 if hasattr(jax.lax, 'pcast') else 1e-5
  for result in results[1:]:
    chex.assert_trees_all_close(result, results[0], rtol=rtol, atol=0)


def test_a_scale_may_be_traced():
  """As one that a training loop adapts is."""
  w, batch = make_problem()
  f = jax.jit(lambda w, batch, scale: drop_in(loss_scale=scale)(w, batch))
  assert_close(f(w, batch, 1024.0), gradient_by_hand())


@pytest.mark.slow
@passes
@both_syncs
@pytest.mark.parametrize('pass_', ['clean', 'probe'])
def test_a_scale_that_overflows_is_seen_on_all_devices(pass_, sync, once):
  """In the clean pass, or not before the probe; and on one device of two."""
  w = jnp.float32(11.0 if pass_ == 'clean' else 10.0)

  def loss_fn(w, x):
    return jnp.exp((w + x).astype(jnp.float16)).astype(jnp.float32)

  step = msam_optax.value_and_grad(
    loss_fn,
    msam_optax.euclidean(),
    rho=0.5,
    loss_scale=2.0,
    axis_name='i',
    sync_ascent=sync,
    compile_once=once,
  )
  values, grads = jax.vmap(step, axis_name='i', in_axes=(None, 0))(
    w, jnp.array([0.0, -5.0])
  )
  assert np.isfinite(values).all()
  assert not np.isfinite(grads).any()


@pytest.mark.parametrize(
  ('scale', 'error', 'match'),
  [
    (0.0, ValueError, 'must be > 0, got 0.0'),
    (-1.0, ValueError, 'must be > 0, got -1.0'),
    (jnp.ones(2), ValueError, '`loss_scale` must be a scalar'),
    ('8', TypeError, '`loss_scale` must be a real number'),
  ],
)
def test_a_wrong_scale_is_refused(scale, error, match):
  with pytest.raises(error, match=match):
    drop_in(loss_scale=scale)


def test_a_scale_and_a_half_precision_ascent_are_refused():
  with pytest.raises(ValueError, match='`perturbation_dtype` float16 it would underf'):
    drop_in(loss_scale=8.0, perturbation_dtype='float16')


# ---- What a loss returns


SCALAR = jnp.float32(1.0)


@pytest.mark.parametrize(
  ('returned', 'options', 'error', 'match'),
  [
    ((SCALAR, 0), {}, TypeError, r'not a tuple of 2: say `has_aux=True`.*has_weight'),
    ((SCALAR, 0, 0), {}, TypeError, 'not a tuple of 3'),
    (None, {}, TypeError, 'loss that `loss_fn` returns .* not None'),
    ({'loss': SCALAR}, {}, TypeError, 'must be a real scalar, not a dict'),
    (jnp.ones(2), {}, ValueError, r'has shape \(2,\): take the sum or the mean'),
    (jnp.int32(1), {}, TypeError, 'has dtype int32'),
    (jnp.complex64(1), {}, TypeError, 'has dtype complex64'),
    (SCALAR, {'has_aux': True}, TypeError, r'return `\(loss, aux\)`, not an array, f'),
    (((SCALAR, 1), 0), {'has_aux': True}, TypeError, '2: say `has_weight=True`'),
    (SCALAR, {'has_weight': True}, TypeError, r'`\(total, weight\)`, not an array'),
    (
      (SCALAR, 0),
      {'has_weight': True, 'has_aux': True},
      TypeError,
      r'`has_weight=True`, .* return `\(\(total, weight\), aux\)`, not an array',
    ),
    (
      (SCALAR, 1, 0),
      {'has_weight': True, 'has_aux': True},
      TypeError,
      r'`has_aux=True`, .* `\(\(total, weight\), aux\)`, not a tuple of 3',
    ),
    ((SCALAR, jnp.ones(2)), {'has_weight': True}, ValueError, r'weight .* shape \(2,'),
    ((SCALAR, True), {'has_weight': True}, TypeError, 'weight .* has dtype bool'),
    ((SCALAR, 1j), {'has_weight': True}, TypeError, 'weight .* has dtype complex'),
    ((SCALAR, 'n'), {'has_weight': True}, TypeError, 'weight .* not a str'),
    ((jnp.ones(2), 1), {'has_weight': True}, ValueError, r'total .* shape \(2,\)'),
  ],
)
def test_what_a_loss_may_not_return(returned, options, error, match):
  value_and_grad_fn = msam_optax.value_and_grad(lambda w: returned, **options)
  with pytest.raises(error, match=match):
    value_and_grad_fn(jnp.ones(3))


def test_a_loss_that_is_no_function_is_refused():
  with pytest.raises(TypeError, match='`loss_fn` must be a function'):
    msam_optax.value_and_grad(jnp.ones(3))


@pytest.mark.parametrize(
  ('params', 'match'),
  [
    (eqx.nn.MLP(1, 1, 1, 1, key=jax.random.key(0)), r'leaf at \.activation'),
    ({'w': jnp.ones(2), 'n': jnp.arange(2)}, r"at \['n'\] .* has dtype int32"),
    ({'w': jnp.ones(2), 'key': jax.random.key(0)}, r"at \['key'\] .* has dtype key"),
    ({'w': jnp.ones(2), 'name': 'float32'}, r"at \['name'\] .* is 'float32'"),
  ],
  ids=['function', 'integer', 'key', 'string'],
)
@passes
def test_parameters_that_have_no_gradient_are_named(once, params, match):
  value_and_grad_fn = msam_optax.value_and_grad(lambda p: SCALAR, compile_once=once)
  with pytest.raises(TypeError, match=match + r'.*eqx\.partition\(model, eqx\.is_inex'):
    value_and_grad_fn(params)


@pytest.mark.parametrize(
  ('argnums', 'match'),
  [
    (-9, '`argnums` is -9, but this call has 1 positional argument.'),
    (1, '`argnums` is 1, but this call has 1 positional'),
    ((0, -1), r'`argnums` is \(0, -1\): it names an argument twice'),
  ],
)
def test_parameters_that_are_not_there_are_named(argnums, match):
  value_and_grad_fn = msam_optax.value_and_grad(lambda w: jnp.sum(w), argnums=argnums)
  with pytest.raises(ValueError, match=match):
    value_and_grad_fn(jnp.ones(3))


# ---- FP8: what is in the place of some gradients is no gradient


def fp8_problem():
  model = nn.Dense(4, dot_general_cls=fp8_ops.Fp8DirectDotGeneralOp)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), jnp.float32)
  variables = model.init(jax.random.key(0), x)
  return variables, lambda variables: jnp.mean(model.apply(variables, x) ** 2)


@pytest.mark.slow
@passes
@pytest.mark.parametrize('scale', [None, 8.0])
def test_fp8_histories_are_those_of_the_clean_pass(scale, once):
  """By hand: the weights are moved uphill, by all of ρ, and nothing else is."""
  variables, loss_fn = fp8_problem()
  value_and_grad_fn = msam_optax.value_and_grad(
    loss_fn, msam_optax.monge(ALPHA), RHO, loss_scale=scale, compile_once=once
  )
  _, grads = jax.jit(value_and_grad_fn)(variables)
  unscaled = lambda g: {
    name: jax.tree.map(lambda x: x / (scale or 1.0), g[name])
    if name == 'params'
    else g[name]
    for name in g
  }
  grad_fn = lambda v: unscaled(jax.grad(lambda v: (scale or 1.0) * loss_fn(v))(v))
  clean = grad_fn(variables)
  n = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in jax.tree.leaves(clean['params'])))
  factor = np.float32(RHO / (n * np.sqrt(1 + (ALPHA * n) ** 2)))
  move = lambda w, g: w + factor * g
  probe = {
    **variables,
    'params': jax.tree.map(move, variables['params'], clean['params']),
  }
  want = {**clean, 'params': grad_fn(probe)['params']}
  chex.assert_trees_all_close(grads, want, rtol=1e-5, atol=1e-6)
  history = clean['_overwrite_with_gradient']['Fp8DirectDotGeneralOp_0']
  assert history['kernel_amax_history'][0] > 0


@pytest.mark.parametrize('options', [{'shards': 2}, {'axis_name': 'i'}], ids=str)
def test_fp8_histories_cannot_be_averaged(options):
  variables, loss_fn = fp8_problem()
  value_and_grad_fn = msam_optax.value_and_grad(lambda v, x: loss_fn(v), **options)
  name = next(iter(options))
  with pytest.raises(ValueError, match=f'new values, which `{name}` cannot average'):
    value_and_grad_fn(variables, jnp.ones(2))


@pytest.mark.parametrize('weight', [1e-5, 1e-3, 1e5])
def test_a_weight_beyond_the_range_of_a_half_precision_total(weight):
  """The total in float16, whose reciprocal weight is no number of it."""
  loss = lambda w: ((weight * w * w).astype(jnp.float16), jnp.float32(weight))
  if weight > 1:
    loss = lambda w: (w * w * jnp.float16(100), jnp.float32(weight))
  w = jnp.float16(2.0) if weight > 1 else jnp.float32(2.0)
  value_and_grad_fn = msam_optax.value_and_grad(loss, rho=0.0, has_weight=True)
  value, grad = value_and_grad_fn(w)
  scale = 100 / weight if weight > 1 else 1.0
  np.testing.assert_allclose(value, 4.0 * scale, rtol=2e-2)
  np.testing.assert_allclose(grad, 4.0 * scale, rtol=2e-2)
