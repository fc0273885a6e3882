"""Haiku: transformed functions, with and without state, in their usual loops."""

import functools

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import optax
import pytest

from tests import methods
from tests.by_hand import adam
from tests.by_hand import sgd
from tests.by_hand import train
from tests.methods import every_kind_slowly
from tests.methods import transformation
from tests.problems import init
from tests.problems import normal

# Haiku's layers and Optax' optimizers promote dtypes and ranks.
pytestmark = pytest.mark.standard_promotion

STEPS = 3
EPS = 1e-3
X = normal(1, STEPS, 8, 3) + 0.5
Y = normal(2, STEPS, 8, 2)
KEYS = jax.random.split(jax.random.key(3), STEPS)
BATCHES = list(zip(X, Y, KEYS, strict=True))

# Haiku calls the matrix of a linear layer w and its bias b; BatchNorm has scale and
# offset, each a matrix of one row.
LINEAR_WEIGHTS = lambda path, _: path.endswith("['w']")


def close(tree, expected):
  chex.assert_trees_all_close(tree, expected, rtol=1e-5, atol=2e-6)


@hk.transform
def network(x):
  x = jnp.tanh(hk.Linear(8)(x))
  x = hk.dropout(hk.next_rng_key(), 0.5, x)
  return hk.nets.MLP([8, 2], activation=jnp.tanh)(x)


def loss_fn(params, x, y, key):
  return jnp.mean((network.apply(params, key, x) - y) ** 2)


GRAD = jax.jit(jax.grad(loss_fn))


def by_hand(method, params):
  grad_fn = lambda params, _, batch: (GRAD(params, *batch), None)
  return train(
    method,
    grad_fn,
    params,
    None,
    BATCHES,
    adam(0.01, eps=EPS),
    is_weight=LINEAR_WEIGHTS,
  )[0]


@every_kind_slowly
def test_transform_chain(method):
  optimizer = optax.chain(transformation(method), optax.adam(0.01, eps=EPS))

  @jax.jit
  def update(params, opt_state, x, y, key):
    grad_fn = lambda params: jax.grad(loss_fn)(params, x, y, key)
    grads = grad_fn(params)
    updates, opt_state = optimizer.update(grads, opt_state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), opt_state

  initial = params = init(network.init, jax.random.key(0), X[0])
  opt_state = optimizer.init(params)
  for batch in BATCHES:
    params, opt_state = update(params, opt_state, *batch)
  close(params, by_hand(method, initial))


@every_kind_slowly
def test_transform_drop_in(method):
  optimizer = optax.adam(0.01, eps=EPS)

  @jax.jit
  def update(params, opt_state, x, y, key):
    loss, grads = methods.drop_in(method, loss_fn)(params, x, y, key)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  initial = params = init(network.init, jax.random.key(0), X[0])
  opt_state = optimizer.init(params)
  losses = []
  for batch in BATCHES:
    params, opt_state, loss = update(params, opt_state, *batch)
    losses.append(loss)
  close(params, by_hand(method, initial))
  close(losses[0], loss_fn(initial, *BATCHES[0]))


@hk.transform_with_state
def batch_norm_network(x, is_training):
  x = hk.Linear(8, with_bias=False)(x)
  x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(
    x, is_training
  )
  return hk.Linear(2)(jnp.tanh(x))


def loss_and_state(params, state, x, y):
  out, state = batch_norm_network.apply(params, state, None, x, is_training=True)
  return jnp.mean((out - y) ** 2), state


GRAD_AND_STATE = jax.jit(jax.grad(loss_and_state, has_aux=True))


@functools.cache
def init_batch_norm():
  init = jax.jit(functools.partial(batch_norm_network.init, is_training=True))
  return init(jax.random.key(0), X[0])


def chain(method):
  optimizer = optax.chain(transformation(method), optax.sgd(0.1, momentum=0.9))

  @jax.jit
  def update(params, state, opt_state, x, y):
    grad_and_state_fn = lambda params: jax.grad(loss_and_state, has_aux=True)(
      params, state, x, y
    )
    grads, new_state = grad_and_state_fn(params)
    updates, opt_state = optimizer.update(
      grads, opt_state, params, grad_fn=lambda params: grad_and_state_fn(params)[0]
    )
    return optax.apply_updates(params, updates), new_state, opt_state

  return optimizer, update


def drop_in(method):
  optimizer = optax.sgd(0.1, momentum=0.9)

  @jax.jit
  def update(params, state, opt_state, x, y):
    value_and_grad_fn = methods.drop_in(method, loss_and_state, has_aux=True)
    (_, state), grads = value_and_grad_fn(params, state, x, y)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), state, opt_state

  return optimizer, update


@pytest.mark.parametrize('interface', [chain, drop_in])
@every_kind_slowly
def test_batch_norm_moves_once_by_the_clean_pass(method, interface):
  params, state = init_batch_norm()
  expected, statistics = train(
    method,
    lambda params, state, batch: GRAD_AND_STATE(params, state, *batch),
    params,
    state,
    list(zip(X, Y, strict=True)),
    sgd(0.1, 0.9),
    is_weight=LINEAR_WEIGHTS,
  )
  optimizer, update = interface(method)
  opt_state = optimizer.init(params)
  for x, y in zip(X, Y, strict=True):
    params, state, opt_state = update(params, state, opt_state, x, y)
  close(params, expected)
  close(state, statistics)
