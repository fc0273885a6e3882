"""Equinox: the loops of its documentation, with one line more.

A model is a callable pytree with leaves that are no arrays, its filtered gradients
have None where it has those, and masks are made by ``eqx.tree_at``: models themselves.
"""

import functools

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msam_optax import adaptive
from msam_optax import asam
from msam_optax import value_and_grad
from tests.by_hand import adam
from tests.by_hand import sgd
from tests.by_hand import train
from tests.methods import cases
from tests.methods import DEFAULT
from tests.methods import drop_in
from tests.methods import every_kind_slowly
from tests.methods import is_default
from tests.methods import KINDS
from tests.methods import METHODS
from tests.methods import transformation
from tests.problems import init
from tests.problems import normal

# Equinox' layers and Optax' optimizers promote dtypes.
pytestmark = pytest.mark.standard_promotion

STEPS = 3
# Adam divides by gradients; where these are tiny, it shows how they were rounded.
EPS = 1e-3
X = normal(1, STEPS, 8, 3) + 0.5
Y = normal(2, STEPS, 8, 2)


def build(function, *args):
  """What a function builds, with numbers that need no program to be drawn."""
  model = eqx.filter_eval_shape(function, *args)
  arrays, static = eqx.partition(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))
  return eqx.combine(init(lambda: arrays), static)


def filtered(model):
  return eqx.filter(model, eqx.is_inexact_array)


def close(tree, expected):
  chex.assert_trees_all_close(tree, expected, rtol=1e-5, atol=2e-6)


def chain_step(loss_fn, tx):
  """Equinox' ``make_step``: the gradient function closes over what is no parameter."""

  @eqx.filter_jit
  def make_step(model, opt_state, *args):
    loss, grads = eqx.filter_value_and_grad(loss_fn)(model, *args)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    grad_fn = lambda params: eqx.filter_grad(loss_fn)(
      eqx.combine(params, static), *args
    )
    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
    return eqx.apply_updates(model, updates), opt_state, loss

  return make_step


def drop_in_step(method, loss_fn, tx, **options):
  """The same loop with another function that takes gradients."""

  @eqx.filter_jit
  def make_step(model, opt_state, *args):
    params, static = eqx.partition(model, eqx.is_inexact_array)
    loss_of_params = lambda params: loss_fn(eqx.combine(params, static), *args)
    loss, grads = drop_in(method, loss_of_params, **options)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return eqx.apply_updates(model, updates), opt_state, loss

  return make_step


def run(make_step, tx, model, batches):
  opt_state = tx.init(filtered(model))
  losses = []
  for batch in batches:
    model, opt_state, loss = make_step(model, opt_state, *batch)
    losses.append(loss)
  return model, losses


def by_hand(method, grad, model, batches, optimizer, **options):
  """Plain training of the arrays of a model, put back into it at the end."""
  params, static = eqx.partition(model, eqx.is_inexact_array)
  grad_fn = lambda params, _, batch: (grad(eqx.combine(params, static), *batch), None)
  params, _ = train(method, grad_fn, params, None, batches, optimizer, **options)
  return params


# A plain network; the activation function is a leaf.


def mlp_loss(model, x, y):
  return jnp.mean((jax.vmap(model)(x) - y) ** 2)


def make_mlp(key):
  return eqx.nn.MLP(3, 2, 8, 2, activation=jnp.tanh, key=key)


KEY = jax.random.key(0)
MLP = build(make_mlp, KEY)
MLP_LOSS = eqx.filter_jit(mlp_loss)
MLP_GRAD = eqx.filter_jit(eqx.filter_grad(mlp_loss))
BATCHES = list(zip(X, Y, strict=True))


@every_kind_slowly
def test_mlp_chain(method):
  tx = optax.chain(transformation(method), optax.adam(0.01, eps=EPS))
  model, losses = run(chain_step(mlp_loss, tx), tx, MLP, BATCHES)
  expected = by_hand(method, MLP_GRAD, MLP, BATCHES, adam(0.01, eps=EPS))
  close(filtered(model), expected)
  close(losses[0], MLP_LOSS(MLP, *BATCHES[0]))


@every_kind_slowly
def test_mlp_drop_in(method):
  tx = optax.adam(0.01, eps=EPS)
  model, losses = run(drop_in_step(method, mlp_loss, tx), tx, MLP, BATCHES)
  expected = by_hand(method, MLP_GRAD, MLP, BATCHES, adam(0.01, eps=EPS))
  close(filtered(model), expected)
  close(losses[0], MLP_LOSS(MLP, *BATCHES[0]))


def test_model_of_arrays_alone_needs_no_filter():
  linear = build(lambda key: eqx.nn.Linear(3, 2, key=key), KEY)
  grad_fn = lambda params, _, batch: (jax.jit(jax.grad(mlp_loss))(params, *batch), None)
  expected, _ = train('msam', grad_fn, linear, None, BATCHES[:1], sgd(0.1))
  _, grads = jax.jit(drop_in('msam', mlp_loss))(linear, *BATCHES[0])
  close(
    jax.tree.map(lambda w, g: np.float32(w - 0.1 * np.asarray(g)), linear, grads),
    expected,
  )


# BatchNorm, whose statistics go in and out as a state.


class BatchNormNet(eqx.Module):
  """Linear, BatchNorm, Linear."""

  linear1: eqx.nn.Linear
  norm: eqx.nn.BatchNorm
  linear2: eqx.nn.Linear

  def __init__(self, key, mode):
    key1, key2 = jax.random.split(key)
    self.linear1 = eqx.nn.Linear(3, 8, use_bias=False, key=key1)
    self.norm = eqx.nn.BatchNorm(8, axis_name='batch', momentum=0.9, mode=mode)
    self.linear2 = eqx.nn.Linear(8, 2, key=key2)

  def __call__(self, x, state):
    x, state = self.norm(self.linear1(x), state)
    return self.linear2(jnp.tanh(x)), state


@functools.cache
def make_batch_norm_net(mode):
  return eqx.nn.make_with_state(BatchNormNet)(KEY, mode)


def batch_norm_loss(model, state, x, y):
  batched = jax.vmap(model, axis_name='batch', in_axes=(0, None), out_axes=(0, None))
  out, state = batched(x, state)
  return jnp.mean((out - y) ** 2), state


BATCH_NORM_GRAD = eqx.filter_jit(eqx.filter_grad(batch_norm_loss, has_aux=True))


def batch_norm_chain(method):
  tx = optax.chain(transformation(method), optax.sgd(0.1, momentum=0.9))

  @eqx.filter_jit
  def make_step(model, state, opt_state, x, y):
    grad_and_state_fn = eqx.filter_grad(batch_norm_loss, has_aux=True)
    grads, new_state = grad_and_state_fn(model, state, x, y)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    grad_fn = lambda params: grad_and_state_fn(
      eqx.combine(params, static), state, x, y
    )[0]
    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
    return eqx.apply_updates(model, updates), new_state, opt_state

  return tx, make_step


def batch_norm_drop_in(method):
  tx = optax.sgd(0.1, momentum=0.9)

  @eqx.filter_jit
  def make_step(model, state, opt_state, x, y):
    params, static = eqx.partition(model, eqx.is_inexact_array)
    loss_fn = lambda params: batch_norm_loss(eqx.combine(params, static), state, x, y)
    (_, state_), grads = drop_in(method, loss_fn, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return eqx.apply_updates(model, updates), state_, opt_state

  return tx, make_step


BATCH_NORM = {'chain': batch_norm_chain, 'drop-in': batch_norm_drop_in}


@pytest.mark.parametrize(
  ('method', 'interface', 'mode'),
  cases(KINDS, BATCH_NORM, ['batch'], plain=is_default)
  # Here the statistics are in the output of the layer, so of both passes.
  + cases(['msam'], ['chain'], ['ema']),
)
def test_batch_norm_moves_once_by_the_clean_pass(method, interface, mode):
  model, state = make_batch_norm_net(mode)
  params, static = eqx.partition(model, eqx.is_inexact_array)
  grad_fn = lambda params, state, batch: BATCH_NORM_GRAD(
    eqx.combine(params, static), state, *batch
  )
  expected, statistics = train(method, grad_fn, params, state, BATCHES, sgd(0.1, 0.9))
  tx, make_step = BATCH_NORM[interface](method)
  opt_state = tx.init(params)
  for x, y in BATCHES:
    model, state, opt_state = make_step(model, state, opt_state, x, y)
  close(filtered(model), expected)
  close(jax.tree.leaves(state), jax.tree.leaves(statistics))


# Frozen layers: the last one is trained.


def last_layer_of(tree, *, chosen):
  """A model of bools, made as in Equinox' example of freezing parameters."""
  return eqx.tree_at(
    lambda tree: (tree.layers[-1].weight, tree.layers[-1].bias),
    jax.tree.map(lambda _: not chosen, tree),
    replace=(chosen, chosen),
  )


def frozen_loss(diff_model, static_model, x, y):
  return mlp_loss(eqx.combine(diff_model, static_model), x, y)


STATIC = eqx.filter(MLP, eqx.is_inexact_array, inverse=True)
FROZEN_GRAD = eqx.filter_jit(eqx.filter_grad(frozen_loss))


@functools.cache
def frozen_by_hand(method, optimizer=None):
  """The norm is that of the gradient of the last layer, and only that one moves."""
  optimizer = optimizer or adam(0.01, eps=EPS)
  params, static = eqx.partition(MLP, last_layer_of(MLP, chosen=True))
  grad_fn = lambda params, _, batch: (FROZEN_GRAD(params, static, *batch), None)
  params, _ = train(method, grad_fn, params, None, BATCHES, optimizer)
  return filtered(eqx.combine(params, static))


def masked_by_hand(method):
  """Gradients of all layers, of which the last alone is perturbed and changes.

  An update that has inner products in it, as GSAM's, has those of all gradients.
  """
  spec = last_layer_of(filtered(MLP), chosen=True)
  adam_of_last = adam(0.01, eps=EPS)

  def optimizer(params, grads):
    last, others = eqx.partition(params, spec)
    return eqx.combine(adam_of_last(last, eqx.filter(grads, spec)), others)

  grad_fn = lambda params, _, batch: (
    MLP_GRAD(eqx.combine(params, STATIC), *batch),
    None,
  )
  is_perturbed = lambda path, leaf: f'.layers[{len(MLP.layers) - 1}]' in path
  params, _ = train(
    method, grad_fn, filtered(MLP), None, BATCHES, optimizer, is_perturbed=is_perturbed
  )
  return params


@pytest.mark.parametrize('method', DEFAULT)
def test_frozen_by_partition_chain(method):
  tx = optax.chain(transformation(method), optax.adam(0.01, eps=EPS))
  filter_spec = last_layer_of(MLP, chosen=True)

  @eqx.filter_jit
  def make_step(model, opt_state, x, y):
    params, static = eqx.partition(model, filter_spec)
    grad_fn = lambda params: eqx.filter_grad(frozen_loss)(params, static, x, y)
    updates, opt_state = tx.update(grad_fn(params), opt_state, params, grad_fn=grad_fn)
    return eqx.apply_updates(model, updates), opt_state

  model, opt_state = MLP, tx.init(eqx.filter(MLP, filter_spec))
  for x, y in BATCHES:
    model, opt_state = make_step(model, opt_state, x, y)
  close(filtered(model), frozen_by_hand(method))


@pytest.mark.parametrize('method', DEFAULT)
def test_frozen_by_partition_drop_in(method):
  tx = optax.adam(0.01, eps=EPS)
  filter_spec = last_layer_of(MLP, chosen=True)

  @eqx.filter_jit
  def make_step(model, opt_state, x, y):
    params, static = eqx.partition(model, filter_spec)
    loss_fn = lambda params: frozen_loss(params, static, x, y)
    _, grads = drop_in(method, loss_fn)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return eqx.apply_updates(model, updates), opt_state

  model, opt_state = MLP, tx.init(eqx.filter(MLP, filter_spec))
  for x, y in BATCHES:
    model, opt_state = make_step(model, opt_state, x, y)
  close(filtered(model), frozen_by_hand(method))


@every_kind_slowly
def test_frozen_by_gradients_of_none(method):
  """The optimizer knows the whole model, and the gradients only the last layer.

  So it is in Equinox' example, which has SGD; Optax' newer Adam takes no such gradient.
  """
  tx = optax.chain(transformation(method), optax.sgd(0.1, momentum=0.9))
  filter_spec = last_layer_of(MLP, chosen=True)

  @eqx.filter_jit
  def make_step(model, opt_state, x, y):
    def grad_fn(params):
      diff, frozen = eqx.partition(params, filter_spec)
      return eqx.filter_grad(frozen_loss)(diff, eqx.combine(frozen, static), x, y)

    params, static = eqx.partition(model, eqx.is_inexact_array)
    updates, opt_state = tx.update(grad_fn(params), opt_state, params, grad_fn=grad_fn)
    return eqx.apply_updates(model, updates), updates, opt_state

  model, opt_state = MLP, tx.init(filtered(MLP))
  for x, y in BATCHES:
    model, updates, opt_state = make_step(model, opt_state, x, y)
    assert updates.layers[0].weight is None
    assert updates.layers[-1].weight is not None
  close(filtered(model), frozen_by_hand(method, sgd(0.1, 0.9)))


@every_kind_slowly
def test_frozen_by_masks_that_are_models_chain(method):
  trained = last_layer_of(filtered(MLP), chosen=True)
  frozen = last_layer_of(filtered(MLP), chosen=False)
  assert callable(trained)
  tx = optax.chain(
    transformation(method, mask=trained),
    optax.adam(0.01, eps=EPS),
    optax.masked(optax.set_to_zero(), frozen),
  )
  model, _ = run(chain_step(mlp_loss, tx), tx, MLP, BATCHES)
  close(filtered(model), masked_by_hand(method))


@every_kind_slowly
def test_frozen_by_masks_that_are_models_drop_in(method):
  trained = last_layer_of(filtered(MLP), chosen=True)
  frozen = last_layer_of(filtered(MLP), chosen=False)
  tx = optax.chain(optax.adam(0.01, eps=EPS), optax.masked(optax.set_to_zero(), frozen))
  make_step = drop_in_step(method, mlp_loss, tx, mask=trained)
  model, _ = run(make_step, tx, MLP, BATCHES)
  close(filtered(model), masked_by_hand(method))


# Dropout: one key a step, for both passes.


class DropoutNet(eqx.Module):
  """Linear, Dropout, Linear."""

  linear1: eqx.nn.Linear
  dropout: eqx.nn.Dropout
  linear2: eqx.nn.Linear

  def __init__(self, key):
    key1, key2 = jax.random.split(key)
    self.linear1 = eqx.nn.Linear(3, 16, key=key1)
    self.dropout = eqx.nn.Dropout(0.5)
    self.linear2 = eqx.nn.Linear(16, 2, key=key2)

  def __call__(self, x, key):
    return self.linear2(self.dropout(jnp.tanh(self.linear1(x)), key=key))


def dropout_loss(model, x, y, key):
  keys = jax.random.split(key, len(x))
  return jnp.mean((jax.vmap(model)(x, keys) - y) ** 2)


DROPOUT_GRAD = eqx.filter_jit(eqx.filter_grad(dropout_loss))


@every_kind_slowly
def test_dropout_has_one_key_for_both_passes(method):
  net = build(DropoutNet, KEY)
  keys = jax.random.split(jax.random.key(3), STEPS)
  batches = list(zip(X, Y, keys, strict=True))
  expected = by_hand(method, DROPOUT_GRAD, net, batches, sgd(0.1))
  tx = optax.chain(transformation(method), optax.sgd(0.1))
  model, _ = run(chain_step(dropout_loss, tx), tx, net, batches)
  close(filtered(model), expected)
  plain = optax.sgd(0.1)
  model, _ = run(drop_in_step(method, dropout_loss, plain), plain, net, batches)
  close(filtered(model), expected)


# An ensemble: every leaf has one dimension more.


class NormNet(eqx.Module):
  """Linear, LayerNorm, Linear."""

  linear1: eqx.nn.Linear
  norm: eqx.nn.LayerNorm
  linear2: eqx.nn.Linear

  def __init__(self, key):
    key1, key2 = jax.random.split(key)
    self.linear1 = eqx.nn.Linear(3, 8, key=key1)
    self.norm = eqx.nn.LayerNorm(8)
    self.linear2 = eqx.nn.Linear(8, 2, key=key2)

  def __call__(self, x):
    return self.linear2(self.norm(jnp.tanh(self.linear1(x))))


MEMBERS = 4


def ensemble(make):
  return build(lambda key: eqx.filter_vmap(make)(jax.random.split(key, MEMBERS)), KEY)


def ensemble_loss(models, x, y):
  return jnp.sum(eqx.filter_vmap(mlp_loss, in_axes=(0, None, None))(models, x, y))


def kernels(models):
  """A model of bools: the matrices of the linear layers."""
  return eqx.tree_at(
    lambda tree: (tree.linear1.weight, tree.linear2.weight),
    jax.tree.map(lambda _: False, models),
    replace=(True, True),
  )


@pytest.mark.slow
def test_ensemble_says_which_leaves_are_weights():
  """By their dimensions and names the stacked scales of LayerNorm would be ones."""
  models = ensemble(NormNet)
  assert models.norm.weight.ndim == 2
  expected = by_hand(
    'asam',
    eqx.filter_jit(eqx.filter_grad(ensemble_loss)),
    models,
    BATCHES,
    sgd(0.1),
    is_weight=lambda path, _: 'linear' in path and 'weight' in path,
  )
  weights = kernels(filtered(models))
  tx = optax.chain(asam(rho=METHODS['asam'].rho, weights=weights), optax.sgd(0.1))
  trained, _ = run(chain_step(ensemble_loss, tx), tx, models, BATCHES)
  close(filtered(trained), expected)

  tx, metric = optax.sgd(0.1), adaptive(weights=weights)

  @eqx.filter_jit
  def make_step(models, opt_state, x, y):
    value_and_grad_fn = value_and_grad(ensemble_loss, metric, rho=METHODS['asam'].rho)
    loss, grads = value_and_grad_fn(models, x, y)
    updates, opt_state = tx.update(grads, opt_state, models)
    return eqx.apply_updates(models, updates), opt_state, loss

  trained, _ = run(make_step, tx, models, BATCHES)
  close(filtered(trained), expected)


@every_kind_slowly
def test_members_that_train_on_their_own_have_their_own_norms(method):
  """``filter_vmap`` over the step: nothing is stacked inside, ASAM's default is right.

  Only the linear layers are trained, because a LayerNorm calls its scale a weight.
  """
  stacked = ensemble(make_mlp)
  tx = optax.chain(transformation(method), optax.sgd(0.1))
  opt_states = eqx.filter_vmap(lambda model: tx.init(filtered(model)))(stacked)
  make_step = chain_step(mlp_loss, tx)
  steps = eqx.filter_vmap(make_step, in_axes=(eqx.if_array(0), 0, None, None))
  models = stacked
  for x, y in BATCHES:
    models, opt_states, _ = steps(models, opt_states, x, y)
  for i in range(MEMBERS):
    member = jax.tree.map(lambda x: x[i] if isinstance(x, np.ndarray) else x, stacked)
    expected = by_hand(method, MLP_GRAD, member, BATCHES, sgd(0.1))
    close(jax.tree.map(lambda x: np.asarray(x)[i], filtered(models)), expected)
