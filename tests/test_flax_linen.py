"""Flax Linen: a model with BatchNorm and Dropout, and Flax's own TrainState."""

from typing import Any

import chex
from flax import linen as nn
from flax import serialization
from flax.training import train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msam_optax import msam
from msam_optax.flax_linen import reestimate_batch_stats
from msam_optax.flax_linen import TrainState
from tests import by_hand
from tests.methods import drop_in
from tests.methods import every_kind_slowly
from tests.methods import transformation

pytestmark = pytest.mark.standard_promotion


class Model(nn.Module):
  """Dense, BatchNorm, Dropout, Dense."""

  @nn.compact
  def __call__(self, x, train):
    x = nn.Dense(8)(x)
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
    x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
    return nn.Dense(2)(x)


class BatchNormState(TrainState):
  """A train state that carries batch statistics."""

  batch_stats: dict


MODEL = Model()
X = jax.random.normal(jax.random.key(1), (16, 3)) * 2 + 1
Y = jax.random.normal(jax.random.key(2), (16, 2))


def chain(method, optimizer):
  return optax.chain(transformation(method), optimizer)


def create(tx):
  variables = MODEL.init(jax.random.key(0), X, train=False)
  return BatchNormState.create(apply_fn=MODEL.apply, tx=tx, **variables)


def loss_fn(params, state, key):
  out, new = state.apply_fn(
    {'params': params, 'batch_stats': state.batch_stats},
    X,
    train=True,
    rngs={'dropout': key},
    mutable=['batch_stats'],
  )
  return jnp.mean((out - Y) ** 2), new['batch_stats']


@jax.jit
def train_step(state, key):
  value_and_grad_fn = jax.value_and_grad(lambda p: loss_fn(p, state, key), has_aux=True)
  (loss, batch_stats), grads = value_and_grad_fn(state.params)
  state = state.apply_gradients(
    grads=grads,
    grad_fn=lambda params: value_and_grad_fn(params)[1],
    batch_stats=batch_stats,
  )
  return state, loss


@every_kind_slowly
def test_statistics_are_those_of_one_clean_pass(method):
  state, key = create(chain(method, optax.sgd(0.1))), jax.random.key(7)
  clean = jax.jit(loss_fn)(state.params, state, key)
  after, loss = train_step(state, key)
  chex.assert_trees_all_equal(after.batch_stats, clean[1])
  chex.assert_trees_all_close(loss, clean[0], rtol=1e-6)
  assert after.step == 1


@every_kind_slowly
def test_step_is_that_by_hand_with_one_dropout_key(method):
  state, key = create(chain(method, optax.sgd(0.1))), jax.random.key(7)
  grad = jax.grad(lambda p: loss_fn(p, state, key)[0])
  update = by_hand.update(method, state.params, [grad])
  expected = by_hand.sgd(0.1)(state.params, update)
  after, _ = train_step(state, key)
  chex.assert_trees_all_close(after.params, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@every_kind_slowly
def test_drop_in_does_the_same_with_flax_own_state(method):
  key = jax.random.key(7)
  ours = create(chain(method, optax.sgd(0.1)))
  flax_state = train_state.TrainState.create(
    apply_fn=MODEL.apply, params=ours.params, tx=optax.sgd(0.1)
  )
  value_and_grad_fn = drop_in(method, lambda p: loss_fn(p, ours, key), has_aux=True)
  (_, batch_stats), grads = value_and_grad_fn(flax_state.params)
  after, _ = train_step(ours, key)
  chex.assert_trees_all_close(
    flax_state.apply_gradients(grads=grads).params, after.params, rtol=1e-5, atol=1e-6
  )
  chex.assert_trees_all_close(batch_stats, after.batch_stats, rtol=1e-6)


def test_is_flax_train_state_for_plain_optimizers():
  params = {'w': jnp.array([1.0, 2.0])}
  grads = {'w': jnp.array([0.5, -0.5])}
  make = dict(apply_fn=None, params=params, tx=optax.adam(0.1))
  ours = TrainState.create(**make).apply_gradients(grads=grads)
  flax_own = train_state.TrainState.create(**make).apply_gradients(grads=grads)
  chex.assert_trees_all_equal(ours.params, flax_own.params)
  chex.assert_trees_all_equal(ours.opt_state, flax_own.opt_state)
  assert ours.tx is make['tx']


def test_missing_grad_fn_is_named():
  params = {'w': jnp.ones(2)}
  state = TrainState.create(apply_fn=None, params=params, tx=msam())
  with pytest.raises(ValueError, match='`grad_fn = lambda params'):
    state.apply_gradients(grads=params)


@pytest.mark.slow
@every_kind_slowly
def test_serialization_round_trip_continues_bit_for_bit(method):
  state = create(chain(method, optax.adam(0.1)))
  keys = jax.random.split(jax.random.key(3), 4)
  for key in keys[:2]:
    state, _ = train_step(state, key)
  saved = serialization.to_bytes(state)
  restored = serialization.from_bytes(create(state.tx), saved)
  for key in keys[2:]:
    state, _ = train_step(state, key)
    restored, _ = train_step(restored, key)
  chex.assert_trees_all_equal(restored, state)


@pytest.mark.parametrize('kind', ['object', 'transformation'])
def test_accumulation_around_the_method_gets_grad_fn(kind):
  """``MultiSteps(chain(msam, …), k)``, whose type does not say that it forwards."""
  inner = optax.chain(msam(rho=0.5), optax.sgd(0.1))
  steps = optax.MultiSteps(inner, every_k_schedule=2)
  tx = steps if kind == 'object' else steps.gradient_transformation()
  params = {'w': jnp.array([0.3, 0.4])}
  loss = lambda params: jnp.sum(params['w'] ** 2)
  state = TrainState.create(apply_fn=None, params=params, tx=tx)
  for _ in range(2):
    state = state.apply_gradients(
      grads=jax.grad(loss)(state.params), grad_fn=jax.grad(loss)
    )
  # Twice the same gradient is one step: at w + 0.5 w / (0.5 √2), so 2 w (1 + 1/√2).
  w = np.array([0.3, 0.4])
  want = w - 0.2 * w * (1 + 0.5**0.5)
  chex.assert_trees_all_close(state.params['w'], want, rtol=1e-6)
  assert state.tx is tx


def test_an_optimizer_that_takes_no_extra_arguments_gets_none():
  params = {'w': jnp.ones(2)}
  plain = optax.sgd(0.1)
  tx = optax.GradientTransformation(plain.init, lambda g, s, p: plain.update(g, s, p))
  state = TrainState.create(apply_fn=None, params=params, tx=tx)
  state = state.apply_gradients(grads=params, grad_fn=lambda p: p)
  chex.assert_trees_all_close(state.params['w'], jnp.array([0.9, 0.9]), rtol=1e-6)


class ValuesState(TrainState):
  """A train state with a field whose name is near to that of an extra argument."""

  values: jax.Array


def test_an_extra_argument_of_optax_is_no_misspelt_field():
  params = {'w': jnp.ones(2)}
  tx = optax.chain(msam(), optax.sgd(0.1))
  loss = lambda params: jnp.sum(params['w'] ** 2)
  state = ValuesState.create(apply_fn=None, params=params, tx=tx, values=jnp.zeros(1))
  state = state.apply_gradients(
    grads=jax.grad(loss)(params),
    value_and_grad_fn=jax.value_and_grad(loss),
    value=loss(params),
    values=jnp.ones(1),
  )
  assert optax.tree.get(state.opt_state, 'rise') > 0
  assert state.values == 1


def test_reestimated_statistics_are_means_over_batches():
  """Of the layer's inputs at the parameters given, whatever was there before."""
  state = create(optax.sgd(0.1))
  params = jax.tree.map(lambda w: 2 * w, state.params)
  key = jax.random.key(7)

  @jax.jit
  def forward(batch_stats, x):
    variables = {'params': params, 'batch_stats': batch_stats}
    rngs = {'dropout': key}
    new = MODEL.apply(variables, x, train=True, rngs=rngs, mutable=['batch_stats'])[1]
    return new['batch_stats']

  batches = [X[:6], X[6:11] - 3.0, X[11:]]
  before = {**state.batch_stats, 'spectral': {'sigma': jnp.array(3.0)}}
  with_other = lambda stats, x: {
    **forward({'BatchNorm_0': stats['BatchNorm_0']}, x),
    'spectral': {'sigma': stats['spectral']['sigma'] + 1},
  }
  after = reestimate_batch_stats(with_other, before, batches)
  kernel, bias = (np.asarray(params['Dense_0'][k]) for k in ('kernel', 'bias'))
  inputs = [np.asarray(x) @ kernel + bias for x in batches]
  expected = {
    'mean': np.mean([h.mean(0) for h in inputs], 0),
    'var': np.mean([h.var(0) for h in inputs], 0),
  }
  chex.assert_trees_all_close(after['BatchNorm_0'], expected, rtol=1e-4, atol=1e-4)
  assert after['spectral']['sigma'] == 3.0


def test_statistics_that_cannot_be_reestimated_are_refused():
  stats = {'norm': {'mean': jnp.zeros(2), 'var': jnp.ones(2)}}
  with pytest.raises(ValueError, match=r"\['norm'\]\['mean'\] as they are"):
    reestimate_batch_stats(lambda stats, x: stats, stats, [X])
  with pytest.raises(ValueError, match='`batches` is empty'):
    reestimate_batch_stats(lambda stats, x: stats, stats, [])
  with pytest.raises(ValueError, match='no leaf called "mean" or "var"'):
    reestimate_batch_stats(lambda stats, x: stats, {'norm': jnp.zeros(2)}, [X])
  with pytest.raises(ValueError, match=r'`forward` must return the new statistics'):
    reestimate_batch_stats(lambda stats, x: {'batch_stats': stats}, stats, [X])


@pytest.mark.standard_promotion
def test_without_a_gradient_it_takes_both():
  params, tx = {'w': jnp.array([0.3, 0.4])}, msam(rho=0.5, alpha=0.0)
  tx = optax.chain(tx, optax.sgd(1.0))
  state = TrainState.create(apply_fn=None, params=params, tx=tx)
  f = jax.value_and_grad(lambda p: jnp.sum(p['w'] ** 2) / 2)
  step = jax.jit(lambda state: state.apply_gradients(value_and_grad_fn=f))
  new = step(state)
  # The gradient at the probe, w + w, is 2w.
  np.testing.assert_allclose(new.params['w'], -params['w'], rtol=1e-6)
  np.testing.assert_allclose(optax.tree.get(new.opt_state, 'loss'), 0.125, rtol=1e-6)
  assert new.step == 1
  fp8 = {'params': params, '_overwrite_with_gradient': {}}
  with pytest.raises(ValueError, match='which the clean pass overwrites'):
    state.replace(params=fp8).apply_gradients(value_and_grad_fn=f)


def test_without_a_gradient_params_may_be_one_array():
  """Which Flax's state takes, and in which no name can be looked up."""
  w, tx = jnp.array([0.3, 0.4]), optax.chain(msam(rho=0.5, alpha=0.0), optax.sgd(1.0))
  state = TrainState.create(apply_fn=None, params=w, tx=tx)
  new: Any = state.apply_gradients(value_and_grad_fn=lambda w: (0.0, w))
  # The gradient at the probe, w + w, is 2w.
  np.testing.assert_allclose(new.params, -w, rtol=1e-6)
