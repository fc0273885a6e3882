"""Micro-batches on one device: m-sharpness, one shared probe, and what is refused."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.common import hlo
import msam_optax
from tests import by_hand
from tests.devices.test_parallel import assert_close
from tests.devices.test_parallel import drop_in
from tests.devices.test_parallel import expected
from tests.devices.test_parallel import has_explicit_sharding
from tests.devices.test_parallel import loss
from tests.devices.test_parallel import make_data
from tests.devices.test_parallel import make_params
from tests.devices.test_parallel import mapped
from tests.devices.test_parallel import place
from tests.devices.test_parallel import place_explicitly
from tests.methods import every_kind_slowly
from tests.methods import every_method
from tests.methods import METHODS

both_syncs = pytest.mark.parametrize('sync', [False, True], ids=['own', 'synced'])
both_ways = pytest.mark.parametrize('vectorize', [False, True], ids=['scan', 'vmap'])
passes = pytest.mark.parametrize('once', [False, True], ids=['two copies', 'one loop'])


@both_syncs
@both_ways
@passes
@every_kind_slowly
def test_equals_as_many_devices(method, once, vectorize, sync):
  value_and_grad_fn = drop_in(
    method, shards=4, vectorize_shards=vectorize, sync_ascent=sync, compile_once=once
  )
  value, grads = jax.jit(value_and_grad_fn)(make_params(), make_data())
  want_value, want = expected(method, shards=4, synced=sync)
  np.testing.assert_allclose(value, want_value, rtol=1e-6)
  assert_close(grads, want)


@both_ways
@every_kind_slowly
def test_one_shared_probe_equals_the_whole_batch(method, vectorize):
  value_and_grad_fn = drop_in(
    method, shards=8, vectorize_shards=vectorize, sync_ascent=True
  )
  assert_close(value_and_grad_fn(make_params(), make_data()), expected(method))


@pytest.mark.slow
@pytest.mark.cpu
@both_syncs
@both_ways
@passes
@pytest.mark.parametrize('check_vma', [False, True], ids=['unchecked', 'checked'])
def test_micro_batches_on_each_of_several_devices(check_vma, once, vectorize, sync):
  """Four devices with two micro-batches each are eight parts."""
  step = drop_in(
    'msam',
    axis_name='i',
    shards=2,
    vectorize_shards=vectorize,
    sync_ascent=sync,
    compile_once=once,
  )
  got = mapped(step, check_vma)
  assert_close(got, expected('msam', parts=4, shards=2, synced=sync)[1])


@pytest.mark.slow
@pytest.mark.cpu
@has_explicit_sharding
@both_syncs
@both_ways
@passes
@pytest.mark.parametrize(
  ('layout', 'shards'),
  [('fully-sharded', 2)]
  + [
    pytest.param(*pair, marks=pytest.mark.slow)
    for pair in [('fully-sharded', 8), ('data-parallel', 2), ('tensor-parallel', 2)]
  ],
)
def test_micro_batches_where_shardings_are_types(layout, shards, once, vectorize, sync):
  """Each lies over the devices as the batch did, and the gradients as parameters."""
  params, data, gathered, on = place_explicitly(layout)
  value_and_grad_fn = drop_in(
    'msam',
    gathered,
    shards=shards,
    vectorize_shards=vectorize,
    sync_ascent=sync,
    compile_once=once,
  )
  with jax.set_mesh(on):
    _, grads = jax.jit(value_and_grad_fn)(params, data)
  assert_close(grads, expected('msam', shards=shards, synced=sync)[1])
  for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True):
    assert g.sharding.is_equivalent_to(w.sharding, w.ndim)


@pytest.mark.slow
@pytest.mark.cpu
@has_explicit_sharding
@pytest.mark.parametrize('once', [False, True], ids=['two copies', 'one loop'])
def test_micro_batches_where_shardings_are_types_without_jit(once):
  params, data, gathered, on = place_explicitly('fully-sharded')
  with jax.set_mesh(on):
    _, grads = drop_in('msam', gathered, shards=2, compile_once=once)(params, data)
  assert_close(grads, expected('msam', shards=2)[1])


@pytest.mark.cpu
@has_explicit_sharding
def test_micro_batches_that_cannot_be_sharded_as_the_batch_is_are_refused():
  params, data, gathered, on = place_explicitly('fully-sharded')
  with (
    jax.set_mesh(on),
    pytest.raises(ValueError, match='on 4 devices cannot be cut'),
  ):
    drop_in('msam', gathered, shards=16)(params, data)


@pytest.mark.cpu
@both_syncs
@both_ways
def test_a_batch_that_is_sharded_stays_where_it_is(vectorize, sync):
  """Counted in the program: each device has its share of the products, and no more."""
  params, data, _ = place('data-parallel')
  compiled = lambda f: str(jax.jit(f).lower(params, data).compile().as_text())
  products = lambda program: hlo.matrix_flops(hlo.read(program))

  f = drop_in('msam', shards=2, vectorize_shards=vectorize, sync_ascent=sync)
  program = compiled(f)
  assert products(program) == 2 * products(compiled(jax.value_and_grad(loss)))
  assert not re.search('all-gather|all-to-all|collective-permute', program)
  _, grads = jax.jit(f)(params, data)
  assert_close(grads, expected('msam', shards=2, synced=sync)[1])


@pytest.mark.slow
@both_ways
def test_keyword_arguments_are_split_and_scalars_are_not(vectorize):
  """Each micro-batch sees its own rows, one whole scalar, and the same key."""

  def noisy(params, x, scale, *, y, key):
    noise = jax.random.normal(key, (8, 3))
    assert x.shape == (8, 3)
    return loss(params, (scale * x + noise, y))

  x, y = make_data()
  key, scale = jax.random.key(0), jnp.float32(0.5)
  value_and_grad_fn = msam_optax.value_and_grad(
    noisy,
    msam_optax.monge(),
    0.3,
    shards=4,
    data_argnums=1,
    data_argnames='y',
    vectorize_shards=vectorize,
  )
  got = value_and_grad_fn(make_params(), x, scale, y=y, key=key)
  noise = jnp.repeat(jax.random.normal(key, (8, 3)), 4, axis=0)
  want = by_hand.gradient('msam', loss, make_params(), (scale * x + noise, y), shards=4)
  assert_close(got, want)


@pytest.mark.slow
@both_ways
@passes
def test_aux_is_stacked_and_of_the_clean_pass(once, vectorize):
  def with_aux(params, data):
    return loss(params, data), {'first': data[0][0], 'w': params['out']['bias']}

  params, data = make_params(), make_data()
  value_and_grad_fn = msam_optax.value_and_grad(
    with_aux, shards=4, has_aux=True, vectorize_shards=vectorize, compile_once=once
  )
  (_, aux), _ = value_and_grad_fn(params, data)
  np.testing.assert_array_equal(aux['first'], data[0][:4])
  np.testing.assert_array_equal(aux['w'], np.tile(params['out']['bias'], (4, 1)))


@pytest.mark.parametrize('argnums', [1, -2, (1,), (1, 2)], ids=str)
def test_parameters_may_be_any_arguments(argnums):
  """Whatever holds parameters is not split."""
  rng = np.random.default_rng(0)
  x, a, b = (jnp.asarray(rng.normal(size=n), jnp.float32) for n in (4, 3, 2))
  f = lambda x, a, b: jnp.mean(jnp.cos(x)) * jnp.sum(jnp.sin(a)) + jnp.sum(b**2)
  if argnums != (1, 2):
    f = functools.partial(lambda g, x, a, b: g(x, a, jnp.array([b, b])), f)
    b = jnp.float32(0.1)
  value_and_grad_fn = msam_optax.value_and_grad(f, rho=0.1, argnums=argnums, shards=2)
  _, grads = value_and_grad_fn(x, a, b)
  parts = [
    msam_optax.value_and_grad(f, rho=0.1, argnums=argnums)(x[i::2], a, b)[1]
    for i in (0, 1)
  ]
  want = jax.tree.map(lambda *gs: sum(gs) / 2, *parts)
  chex.assert_trees_all_close(grads, want, rtol=1e-6)


@passes
@both_syncs
def test_bfloat16_gradients_are_summed_in_float32(sync, once):
  """A thousand equal gradients that a bfloat16 sum would stop counting."""
  f = lambda w, x: jnp.mean(x) * w
  value_and_grad_fn = msam_optax.value_and_grad(
    f, shards=1024, sync_ascent=sync, compile_once=once
  )
  _, grad = value_and_grad_fn(jnp.ones([], jnp.bfloat16), jnp.ones(1024, jnp.bfloat16))
  assert grad.dtype == jnp.bfloat16
  assert grad == 1.0


@pytest.mark.slow
@both_syncs
@passes
def test_perturbation_dtype_keeps_a_radius_that_bfloat16_would_lose(once, sync):
  """The loss is looked at w, and at float32 probes at the distance ρ from it."""
  params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), make_params())
  seen = []

  def watched(params, data):
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    jax.debug.callback(lambda *leaves: seen.append(leaves), *jax.tree.leaves(wide))
    return loss(wide, data)

  value_and_grad_fn = msam_optax.value_and_grad(
    watched,
    msam_optax.euclidean(),
    rho=1e-3,
    perturbation_dtype='float32',
    shards=2,
    sync_ascent=sync,
    compile_once=once,
  )
  _, grads = jax.block_until_ready(value_and_grad_fn(params, make_data()))
  jax.effects_barrier()
  chex.assert_trees_all_equal_dtypes(grads, params)
  start = [np.asarray(w, np.float64) for w in jax.tree.leaves(params)]
  distances = sorted(
    np.sqrt(sum(np.sum((x - w) ** 2) for x, w in zip(leaves, start, strict=True)))
    for leaves in seen
  )
  np.testing.assert_allclose(distances, [0, 0, 1e-3, 1e-3], rtol=1e-3)


@passes
def test_perturbation_dtype_leaves_masked_gradients_as_they_are(once):
  loss = lambda w: w['a'].astype(jnp.float32) * w['b'] / 3
  value_and_grad_fn = msam_optax.value_and_grad(
    loss,
    rho=0.0,
    mask={'a': True, 'b': False},
    perturbation_dtype='bfloat16',
    compile_once=once,
  )
  _, grads = value_and_grad_fn({'a': jnp.float32(1), 'b': jnp.float32(1)})
  np.testing.assert_allclose(grads['b'], 1 / 3, rtol=1e-6)


@passes
def test_a_gradient_that_is_not_finite_comes_out_so(once):
  f = lambda w, x: jnp.sum(jnp.where(w > 0, jnp.mean(x) * w, 0.0))
  x = jnp.array([1.0, 1.0, jnp.nan, 1.0])
  value_and_grad_fn = msam_optax.value_and_grad(f, shards=2, compile_once=once)
  _, grads = value_and_grad_fn(jnp.ones(3), x)
  assert np.isnan(grads).all()


@both_ways
def test_a_step_that_is_not_finite_in_one_micro_batch_is_seen_in_the_mean(vectorize):
  """The clean gradient of the last overflows in float16, and that at its probe not."""
  f = lambda w, x: jnp.mean(x) * 6e4 * w['a'].astype(jnp.float32) + w['b'] ** 2
  value_and_grad_fn = msam_optax.value_and_grad(
    f, shards=4, vectorize_shards=vectorize, perturbation_dtype=jnp.float32
  )
  w = {'a': jnp.float16(1), 'b': jnp.float32(3)}
  _, grads = value_and_grad_fn(w, jnp.array([0.0, 0.0, 0.0, 1.0]))
  np.testing.assert_allclose(grads['a'], 1.5e4)
  _, grads = value_and_grad_fn(w, jnp.array([0.0, 0.0, 0.0, 2.0]))
  assert np.isnan(grads['a'])
  assert np.isfinite(grads['b'])


@passes
def test_masks_and_zero_gradients_with_one_loop(once):
  """Masked leaves stay where they are, and a zero gradient is the plain one."""
  params = make_params()
  mask = {'hidden': True, 'out': False}
  sees = {}

  def watched(params, data):
    jax.debug.callback(
      lambda kernel, bias: sees.setdefault('at', []).append((kernel, bias)),
      params['hidden']['kernel'],
      params['out']['bias'],
    )
    return loss(params, data)

  value_and_grad_fn = msam_optax.value_and_grad(
    watched, rho=0.3, mask=mask, compile_once=once
  )
  jax.block_until_ready(value_and_grad_fn(params, make_data()))
  jax.effects_barrier()
  assert len(sees['at']) == 2
  kernels, biases = zip(*sees['at'], strict=True)
  np.testing.assert_array_equal(biases[0], biases[1])
  assert np.abs(kernels[0] - kernels[1]).max() > 1e-3
  flat = msam_optax.value_and_grad(lambda w: 0.0 * jnp.sum(w), compile_once=once)
  np.testing.assert_array_equal(flat(jnp.ones(3))[1], 0.0)


@every_method
def test_compile_once_holds_one_copy_of_the_gradient(method):
  """Counted in the program: matrix products in one pass, in copies, in a loop."""

  def products(value_and_grad_fn):
    text = jax.jit(value_and_grad_fn).lower(make_params(), make_data()).as_text()
    return text.count('stablehlo.dot_general')

  one = products(jax.value_and_grad(loss))
  passes = 1 + len(METHODS[method].scales)
  assert products(drop_in(method, compile_once=True)) == one
  assert products(drop_in(method)) == passes * one


@pytest.mark.standard_promotion
def test_training_with_a_schedule_inside_the_step():
  """The drop-in with all options in a jitted loop comes down as it should."""
  schedule, tx = optax.linear_schedule(0.2, 0.0, 50), optax.adam(3e-2)
  params, data = make_params(), make_data()

  def train_step(carry, step):
    params, state = carry
    value_and_grad_fn = drop_in_at(schedule(step))
    value, grads = value_and_grad_fn(params, data)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), value

  drop_in_at = lambda rho: msam_optax.value_and_grad(
    loss, rho=rho, shards=2, compile_once=True
  )
  _, values = jax.lax.scan(train_step, (params, tx.init(params)), jnp.arange(100))
  assert values[-1] < 0.7 * values[0]


@pytest.mark.parametrize(
  ('arguments', 'match'),
  [
    ((jnp.ones((6, 3)), jnp.ones((6, 4))), r'at \[1\]\[0\] has shape \(6, 3\)'),
    ((jnp.ones((8, 3)), jnp.ones((4, 4))), r'at \[1\]\[1\] has shape \(4, 4\)'),
  ],
)
def test_a_batch_that_cannot_be_cut_is_refused(arguments, match):
  value_and_grad_fn = msam_optax.value_and_grad(loss, shards=4)
  with pytest.raises(ValueError, match=match + r'.*into 4 equal micro-batches'):
    value_and_grad_fn(make_params(), arguments)


def test_a_raw_random_key_in_the_batch_is_refused():
  value_and_grad_fn = msam_optax.value_and_grad(
    lambda p, batch: loss(p, batch[:2]), shards=4
  )
  with pytest.raises(
    ValueError, match=r'at \[1\]\[2\] has shape \(2,\).*raw random key'
  ):
    value_and_grad_fn(make_params(), (*make_data(), jax.random.PRNGKey(0)))


def test_no_data_is_refused():
  value_and_grad_fn = msam_optax.value_and_grad(lambda w, c: c * jnp.sum(w), shards=2)
  with pytest.raises(ValueError, match='no argument that may hold it has an array'):
    value_and_grad_fn(jnp.ones(3), 2.0)


def with_class_weights(w, class_weights, batch):
  """A loss whose class weights are as many as examples in the batch."""
  x, label = batch
  return jnp.mean(class_weights[label] * (x - w) ** 2)


CLASS_WEIGHTS = jnp.array([1.0, 2.0, 4.0, 8.0])
LABELLED = jnp.array([1.0, 2.0, 3.0, 5.0]), jnp.array([3, 2, 1, 0])


@both_ways
@passes
@pytest.mark.parametrize('argnums', [2, (-1,)], ids=str)
def test_what_is_no_data_goes_whole_to_each_part(argnums, once, vectorize):
  """Half of the class weights would give another number, and no error."""
  value_and_grad_fn = msam_optax.value_and_grad(
    with_class_weights,
    rho=0.0,
    shards=2,
    vectorize_shards=vectorize,
    compile_once=once,
    data_argnums=argnums,
  )
  value, grad = value_and_grad_fn(jnp.float32(0.0), CLASS_WEIGHTS, LABELLED)
  np.testing.assert_allclose(value, (8 * 1 + 4 * 4 + 2 * 9 + 25) / 4, rtol=1e-6)
  np.testing.assert_allclose(grad, -2 * (8 * 1 + 4 * 2 + 2 * 3 + 5) / 4, rtol=1e-6)


@both_ways
def test_data_may_be_keyword_arguments(vectorize):
  f = lambda w, *, class_weights, x, label: with_class_weights(
    w, class_weights, (x, label)
  )
  x, label = LABELLED
  value_and_grad_fn = msam_optax.value_and_grad(
    f, rho=0.3, shards=2, data_argnames=('x', 'label'), vectorize_shards=vectorize
  )
  got = value_and_grad_fn(
    jnp.float32(0.0), class_weights=CLASS_WEIGHTS, x=x, label=label
  )
  want = by_hand.gradient(
    'msam',
    lambda w, batch: with_class_weights(w, CLASS_WEIGHTS, batch),
    jnp.float32(0.0),
    LABELLED,
    shards=2,
  )
  assert_close(got, want)


@both_ways
@passes
def test_model_state_goes_whole_to_each_part_and_comes_back(once, vectorize):
  """In Haiku's and Keras' order, ``loss(params, state, x, y) -> (loss, state)``."""

  def loss_fn(w, state, x, y):
    return jnp.mean((x @ w - state['mean'] - y) ** 2), {'mean': jnp.mean(x)}

  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  w, state, x, y = draw(3), {'mean': draw(2)[0], 'unused': draw(5)}, draw(8, 3), draw(8)
  value_and_grad_fn = msam_optax.value_and_grad(
    loss_fn,
    rho=0.3,
    shards=2,
    has_aux=True,
    data_argnums=(2, 3),
    vectorize_shards=vectorize,
    compile_once=once,
  )
  (value, new_state), grads = value_and_grad_fn(w, state, x, y)
  want = by_hand.gradient(
    'msam', lambda w, xy: loss_fn(w, state, *xy)[0], w, (x, y), shards=2
  )
  assert_close((value, grads), want)
  assert_close(new_state['mean'], np.float32([np.mean(x[::2]), np.mean(x[1::2])]))


def test_keys_of_examples_are_cut_with_them():
  noise = lambda key: jax.random.normal(key, ())
  f = lambda w, batch: jnp.mean(w * batch[0] * jax.vmap(noise)(batch[1]))
  keys = jax.random.split(jax.random.key(0), 4)
  x = jnp.arange(1.0, 5.0)
  _, grad = msam_optax.value_and_grad(f, shards=2)(jnp.float32(1.0), (x, keys))
  want = np.mean([a * noise(key) for a, key in zip(x, keys, strict=True)])
  np.testing.assert_allclose(grad, want, rtol=1e-6)


def test_data_that_cannot_be_told_from_other_arrays_is_asked_for():
  value_and_grad_fn = msam_optax.value_and_grad(lambda w, c, n, x, *, y, s: w, shards=2)
  with pytest.raises(
    ValueError,
    match=(
      r"number 1 \(float32\[4\]\), number 3 \(float32\[4\], int32\[4\]\), 'y'"
      r" \(int32\[4\]\)\. .*`data_argnums=\(1, 3\), data_argnames=\('y',\)` if all"
    ),
  ):
    value_and_grad_fn(SCALAR, CLASS_WEIGHTS, 3, LABELLED, y=LABELLED[1], s=SCALAR)


SCALAR = jnp.float32(1.0)


@pytest.mark.parametrize(
  ('options', 'match'),
  [
    ({'data_argnums': 3}, r'`data_argnums` is 3, but this call has 2 .*'),
    ({'data_argnums': -3}, r"`data_argnums` is -3, .* and \['y'\] by keyword"),
    ({'data_argnums': (1, -1)}, 'names an argument twice'),
    ({'data_argnums': (0, 1)}, 'number 0 holds parameters by `argnums`, and the batch'),
    ({'data_argnames': 'z'}, r"names 'z', but .* are \['y'\].*`data_argnums` the pos"),
    ({'data_argnums': ()}, 'no argument that may hold it has an array with axes'),
  ],
  ids=str,
)
def test_data_that_is_not_there_is_named(options, match):
  value_and_grad_fn = msam_optax.value_and_grad(lambda w, x, y: w, shards=2, **options)
  with pytest.raises(ValueError, match=match):
    value_and_grad_fn(SCALAR, jnp.ones(4), y=jnp.ones(4))


@pytest.mark.parametrize('options', [{'data_argnums': 1}, {'data_argnames': 'x'}])
def test_data_without_shards_is_refused(options):
  with pytest.raises(ValueError, match='name the arguments that `shards` cuts'):
    msam_optax.value_and_grad(loss, **options)


@pytest.mark.slow
def test_means_of_bfloat16_gradients_are_float32_until_the_end():
  """1 + 3/512 is 1 + 2⁻⁷ in bfloat16; with one device's 1 + 2⁻⁸ rounded before, 1."""
  x = 1 + jnp.array([[0.0, 2.0**-7], [2.0**-7, 2.0**-7]])
  f = lambda w, x: jnp.sum(w.astype(jnp.float32) * x)
  value_and_grad_fn = msam_optax.value_and_grad(
    f, rho=0.0, axis_name='i', shards=2, vectorize_shards=True
  )
  mapped = jax.vmap(value_and_grad_fn, axis_name='i', in_axes=(None, 0))
  _, grads = mapped(jnp.ones([], jnp.bfloat16), x)
  np.testing.assert_array_equal(np.float32(grads), 1 + 2.0**-7)


def test_parameters_that_are_not_positional_are_named():
  value_and_grad_fn = msam_optax.value_and_grad(loss, shards=4, compile_once=True)
  with pytest.raises(
    ValueError, match='`argnums` is 0, but this call has 0 positional'
  ):
    value_and_grad_fn(params=make_params(), data=make_data())


def test_vectorized_without_shards_is_refused():
  with pytest.raises(ValueError, match='`vectorize_shards` needs `shards`'):
    msam_optax.value_and_grad(loss, vectorize_shards=True)


def test_shards_may_be_a_numpy_integer():
  value_and_grad_fn = drop_in('msam', shards=np.int64(4))
  assert_close(
    value_and_grad_fn(make_params(), make_data()), expected('msam', shards=4)
  )


@pytest.mark.parametrize('shards', [0, -1, 2.0, True])
def test_a_wrong_number_of_shards_is_refused(shards):
  with pytest.raises(ValueError, match='`shards` must be a whole number >= 1'):
    msam_optax.value_and_grad(loss, shards=shards)


def test_synced_needs_parts():
  with pytest.raises(ValueError, match='or give `shards`'):
    msam_optax.value_and_grad(loss, sync_ascent=True)
