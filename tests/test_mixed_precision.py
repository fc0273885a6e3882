"""Half precision as people run it: loss scaling, flags of both passes, debugging."""

import functools

import chex
from flax.training.dynamic_scale import DynamicScale
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax
from msam_optax import flax_linen
from msam_optax import msam
from tests.methods import cases
from tests.methods import drop_in
from tests.methods import every_kind_slowly
from tests.methods import is_default
from tests.methods import KINDS
from tests.methods import transformation
from tests.problems import batch
from tests.problems import loss as mlp_loss
from tests.problems import mlp_params

# exp overflows float16 above 11.09: not here, and 0.05 further up.
EDGE = jnp.array([11.06])


def exponential(params):
  """``Σ exp(w)``, computed in float16."""
  return jnp.sum(jnp.exp(params.astype(jnp.float16))).astype(jnp.float32)


def test_the_flag_is_of_both_passes():
  """A step whose clean gradient is finite, and whose gradient at the probe is not."""
  grads = jax.grad(exponential)(EDGE)
  assert np.isfinite(grads).all()
  tx = msam_optax.sam(0.05)
  state = tx.init(EDGE)
  assert state.finite
  updates, state = tx.update(grads, state, EDGE, grad_fn=jax.grad(exponential))
  assert not jnp.isfinite(updates).any()
  assert not state.finite
  near = EDGE - 1.0
  _, state = tx.update(
    jax.grad(exponential)(near), state, near, grad_fn=jax.grad(exponential)
  )
  assert state.finite


@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf])
@pytest.mark.parametrize('at', ['clean', 'probe', 'masked'])
def test_the_flag_sees_each_entry(at, bad):
  params = {'w': jnp.ones((2, 2)), 'b': jnp.ones(2)}
  broken = {**params, 'b': params['b'].at[1].set(bad)}
  tx = msam(mask={'w': True, 'b': at != 'masked'})
  clean, at_probe = (params, broken) if at == 'probe' else (broken, params)
  updates, state = tx.update(clean, tx.init(params), params, grad_fn=lambda p: at_probe)
  assert not state.finite
  assert jnp.isfinite(updates['w']).all()


@pytest.mark.slow
def test_the_flag_is_the_same_on_all_replicas():
  tx = msam(axis_name='i')

  def step(grads):
    w = jnp.ones(2)
    return tx.update(grads, tx.init(w), w, grad_fn=lambda w: grads)[1].finite

  grads = jnp.ones((4, 2))
  assert jax.vmap(step, axis_name='i')(grads).all()
  assert not jax.vmap(step, axis_name='i')(grads.at[2, 0].set(jnp.inf)).any()


INTERFACES = {
  'chain': {},
  'drop-in': {},
  'compiled once': {'compile_once': True},
}


@pytest.mark.slow
@pytest.mark.parametrize('at', ['clean', 'probe'])
@pytest.mark.parametrize('sync_ascent', [False, True], ids=['own', 'synced'])
@pytest.mark.parametrize(
  ('method', 'interface'), cases(KINDS, INTERFACES, plain=is_default)
)
def test_what_is_not_finite_on_one_replica_is_so_on_all(
  method, interface, sync_ascent, at
):
  """And the same there: replicas that take different steps are never one again."""
  mapped = {'axis_name': 'i', 'sync_ascent': sync_ascent}

  def broken(w, x):
    """Finite at the parameters, or not, where ``x`` says so."""
    where = jnp.all(w == 1.0) == (at == 'clean')
    return jnp.sum(jnp.square(w)) * jnp.where(where, x, 1.0)

  def step(x):
    w = jnp.ones((2, 2))
    if interface != 'chain':
      return drop_in(method, broken, **mapped, **INTERFACES[interface])(w, x)[1]
    tx, grad_fn = transformation(method, **mapped), lambda w: jax.grad(broken)(w, x)
    return tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)[0]

  bad = jnp.ones((3, 4)).at[:, 2].set(jnp.array([jnp.nan, jnp.inf, -jnp.inf]))
  updates = jax.jit(jax.vmap(jax.vmap(step, axis_name='i')))(bad)
  assert not jnp.isfinite(updates).any()
  np.testing.assert_array_equal(updates, np.repeat(updates[:, :1], 4, axis=1))


def test_apply_if_finite_behind_the_method_sees_the_probe():
  tx = optax.chain(
    msam_optax.sam(0.05),
    optax.apply_if_finite(optax.sgd(1e-3), max_consecutive_errors=3),
  )
  updates, state = tx.update(
    jax.grad(exponential)(EDGE), tx.init(EDGE), EDGE, grad_fn=jax.grad(exponential)
  )
  np.testing.assert_array_equal(updates, [0.0])
  assert not optax.tree.get(state, 'last_finite')


def half_loss(params, data):
  """The mean squared error of the network, computed in float16."""
  half = functools.partial(jax.tree.map, lambda x: x.astype(jnp.float16))
  return mlp_loss(half(params), half(data)).astype(jnp.float32)


def chain_step(state, dynamic_scale, data, *, loss=half_loss):
  """Flax's recipe with the transformation, as the documentation has it."""
  value_and_grad_fn = dynamic_scale.value_and_grad(lambda params: loss(params, data))
  _, finite, value, grads = value_and_grad_fn(state.params)
  new = state.apply_gradients(
    grads=grads, grad_fn=lambda params: value_and_grad_fn(params)[3]
  )
  finite &= optax.tree.get(new.opt_state, 'finite')
  state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)
  return state, flax_linen.scale_by_both_passes(dynamic_scale, finite), value


def drop_in_step(
  state, dynamic_scale, data, *, loss=half_loss, metric=msam_optax.monge(), rho=0.1
):
  """The same with the drop-in, whose gradient is at the probe."""
  value_and_grad_fn = msam_optax.value_and_grad(
    loss, metric, rho, loss_scale=dynamic_scale.scale
  )
  value, grads = value_and_grad_fn(state.params, data)
  finite = jnp.array([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]).all()
  new = state.apply_gradients(grads=grads)
  state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)
  return state, flax_linen.scale_by_both_passes(dynamic_scale, finite), value


def make_state(interface, method, params):
  """A Flax state for a interface: the method is in the chain, or in the gradient."""
  descent = optax.sgd(0.05)
  tx = optax.chain(method, descent) if interface == 'chain' else descent
  return flax_linen.TrainState.create(apply_fn=None, params=params, tx=tx)


@pytest.mark.slow
@pytest.mark.standard_promotion
@pytest.mark.parametrize('interface', ['chain', 'drop-in'])
def test_loss_scaling_trains_as_float32_does(interface):
  """Too large a scale backs off without a trace; then it is a step like any other."""
  state = make_state(interface, msam(0.1), mlp_params())
  scale = DynamicScale(scale=2.0**20, growth_interval=100)
  step = jax.jit(chain_step if interface == 'chain' else drop_in_step)
  value_and_grad_fn = jax.jit(msam_optax.value_and_grad(mlp_loss, rho=0.1))
  params, scales = mlp_params(), [2.0**20]
  for _ in range(12):
    data, taken = batch(int(state.step)), int(state.step)
    state, scale, _ = step(state, scale, data)
    scales.append(float(scale.scale))
    if int(state.step) > taken:
      grads = value_and_grad_fn(params, data)[1]
      params = jax.tree.map(lambda w, g: w - 0.05 * g, params, grads)
  # Halved until the numbers of float16 hold the gradients, and then left alone.
  assert 4 <= int(state.step) <= 8
  halved = 12 - int(state.step)
  assert scales == [2.0 ** max(20 - i, 20 - halved) for i in range(13)]
  chex.assert_trees_all_close(state.params, params, atol=2e-3)


@pytest.mark.standard_promotion
@pytest.mark.parametrize('interface', ['chain', 'drop-in'])
def test_a_probe_that_overflows_is_skipped_and_the_scale_backs_off(interface):
  """8192 exp(2) is a number of float16, and 8192 exp(2.5), at the probe, is not."""
  params = {'w': jnp.array([2.0])}
  scale = DynamicScale(scale=8192.0)
  assert scale.value_and_grad(exponential)(params['w']).finite
  state = make_state(interface, msam_optax.sam(0.5), params)
  step = {'chain': chain_step, 'drop-in': drop_in_step}[interface]
  options = {'loss': lambda params, _: exponential(params['w'])}
  if interface == 'drop-in':
    options |= {'metric': msam_optax.euclidean(), 'rho': 0.5}
  state, scale, _ = step(state, scale, None, **options)
  np.testing.assert_array_equal(state.params['w'], params['w'])
  assert (int(state.step), float(scale.scale)) == (0, 4096.0)
  state, scale, _ = step(state, scale, None, **options)
  np.testing.assert_allclose(state.params['w'], 2.0 - 0.05 * np.exp(2.5), rtol=1e-3)
  assert (int(state.step), float(scale.scale)) == (1, 4096.0)


@pytest.mark.standard_promotion
def test_accumulation_behind_the_method_is_skipped_as_well():
  """Neither a clean pass nor a probe that overflows leaves a trace in the sums."""
  accumulated = optax.MultiSteps(optax.sgd(0.05), 2).gradient_transformation()
  state = flax_linen.TrainState.create(
    apply_fn=None,
    params={'w': jnp.array([2.0])},
    tx=optax.chain(msam_optax.sam(0.5), accumulated),
  )
  scale, loss = DynamicScale(scale=2.0**14), lambda p, _: exponential(p['w'])
  scales = []
  for _ in range(4):
    state, scale, _ = chain_step(state, scale, None, loss=loss)
    scales.append(float(scale.scale))
  # 2¹⁴ is too large for the clean pass, and 2¹³ for the probe.
  assert scales == [2.0**13, 2.0**12, 2.0**12, 2.0**12]
  want = 2.0 - 0.05 * np.exp(2.5)
  np.testing.assert_allclose(float(state.params['w'][0]), want, rtol=1e-3)


@pytest.mark.parametrize('finite', [True, False])
def test_the_scale_follows_flax(finite):
  """What Flax's own scale becomes where its own gradient is, or is not, finite."""
  for steps in (0, 3):
    old = DynamicScale(growth_interval=3, scale=64.0, fin_steps=steps)
    target = jnp.float32(1.0 if finite else np.inf)
    want = old.value_and_grad(lambda x: x * target)(jnp.float32(1.0)).dynamic_scale
    got = flax_linen.scale_by_both_passes(old, jnp.array(finite))
    chex.assert_trees_all_equal(got, want)


def test_the_rise_of_a_loss_in_another_precision():
  """The loss at the params in bfloat16, and the one at the probe in float32."""
  f = lambda w: jnp.sum(jnp.square(w))
  w = jnp.array([3.0, 4.0])
  tx = msam_optax.sam(0.5)
  _, state = tx.update(
    jax.grad(f)(w),
    tx.init(w),
    w,
    value_and_grad_fn=jax.value_and_grad(f),
    value=f(w).astype(jnp.bfloat16),
  )
  np.testing.assert_allclose(state.rise, 5.25, rtol=1e-6)


@pytest.fixture
def debugging():
  jax.config.update('jax_debug_nans', True)
  jax.config.update('jax_debug_infs', True)
  yield
  jax.config.update('jax_debug_nans', False)
  jax.config.update('jax_debug_infs', False)


@pytest.mark.slow
@pytest.mark.usefixtures('debugging')
@pytest.mark.parametrize('eager', [False, True], ids=['jit', 'disable_jit'])
@every_kind_slowly
def test_a_healthy_step_makes_no_nan_on_its_way(method, eager):
  """Nor an infinity, at any size of the gradient, nor where it is zero."""
  tx = transformation(method)
  for size in (0.0, 1.0) if eager else (0.0, 1.0, 1e-25, 1e15):
    f = lambda p, size=size: size * mlp_loss(p, batch())
    with jax.disable_jit(eager):
      params = mlp_params()
      value, grads = jax.value_and_grad(f)(params)
      _, state = tx.update(
        grads,
        tx.init(params),
        params,
        value_and_grad_fn=jax.value_and_grad(f),
        value=value,
      )
    assert state.finite


@pytest.mark.slow
@pytest.mark.usefixtures('debugging')
@pytest.mark.parametrize('options', [{}, {'compile_once': True}], ids=str)
@pytest.mark.parametrize('eager', [False, True], ids=['jit', 'disable_jit'])
@every_kind_slowly
def test_a_healthy_drop_in_makes_no_nan_on_its_way(method, eager, options):
  with jax.disable_jit(eager):
    value, _ = drop_in(method, mlp_loss, **options)(mlp_params(), batch())
  assert np.isfinite(value)


@pytest.mark.usefixtures('debugging')
def test_a_healthy_weight_makes_no_infinity_on_its_way():
  loss = lambda w, x: (jnp.sum(jnp.square(w - x)), jnp.float32(x.size))
  value_and_grad_fn = msam_optax.value_and_grad(loss, rho=0.1, has_weight=True)
  with jax.disable_jit():
    value, _ = value_and_grad_fn(jnp.zeros(()), jnp.array([1.0, 3.0]))
  np.testing.assert_allclose(value, 5.0)


@pytest.mark.usefixtures('debugging')
def test_a_sick_step_is_still_stopped():
  tx = msam_optax.sam(0.05)
  with pytest.raises(FloatingPointError):
    tx.update(jnp.ones(2), tx.init(EDGE[:0]), jnp.ones(2), grad_fn=lambda w: w / 0.0)
