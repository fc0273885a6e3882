"""Keras on JAX: its own ``train_step`` through ``fit``, and Optax in a plain loop.

Variables are lists of arrays without names, so ASAM tells weights by their dimensions.
"""

import functools
import os
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.by_hand import adam
from tests.by_hand import sgd
from tests.by_hand import train
from tests.methods import drop_in
from tests.methods import every_kind_slowly
from tests.methods import transformation
from tests.problems import normal

# Keras reads its backend when it is imported; what runs afterwards, processes that
# other tests start among it, is to find the environment as it was.
with mock.patch.dict(os.environ, KERAS_BACKEND='jax'):
  import keras

# Keras' layers and Optax' optimizers promote dtypes and ranks.
pytestmark = pytest.mark.standard_promotion

STEPS, SIZE = 3, 8
X = normal(1, STEPS * SIZE, 3) + 0.5
Y = normal(2, STEPS * SIZE, 2)
BATCHES = list(zip(np.split(X, STEPS), np.split(Y, STEPS), strict=True))
EPS = 1e-3


def close(tree, expected):
  chex.assert_trees_all_close(tree, expected, rtol=1e-5, atol=2e-6)


def make_model(cls=keras.Model):
  """Dense, BatchNorm, Dropout, Dense; the same numbers each time."""
  keras.utils.set_random_seed(0)
  inputs = keras.Input(shape=(3,))
  x = keras.layers.Dense(8, use_bias=False)(inputs)
  x = keras.layers.BatchNormalization(momentum=0.9)(x)
  x = keras.layers.Dropout(0.5, seed=1)(keras.ops.tanh(x))
  return cls(inputs, keras.layers.Dense(2)(x))


def values(variables):
  """Copies, since ``fit`` donates the arrays of its variables."""
  return [np.array(v.value) for v in variables]


@functools.cache
def plain_gradient():
  model = make_model()

  def loss_fn(trainable, non_trainable, x, y):
    out, new = model.stateless_call(trainable, non_trainable, x, training=True)[:2]
    return jnp.mean((out - y) ** 2), new

  return jax.jit(jax.grad(loss_fn, has_aux=True))


def by_hand(method, optimizer):
  """Plain passes of the model: parameters, and the other variables."""
  model, grad = make_model(), plain_gradient()
  return train(
    method,
    lambda params, state, batch: grad(params, state, *batch),
    values(model.trainable_variables),
    values(model.non_trainable_variables),
    BATCHES,
    optimizer,
  )


class SharpnessAwareModel(keras.Model):
  """The model of Keras' guide to ``fit`` with JAX, and the drop-in."""

  method: str

  def compute_loss_and_updates(
    self,
    trainable_variables,
    non_trainable_variables,
    metrics_variables,
    x,
    y,
    sample_weight,
    training=False,
  ):
    y_pred, non_trainable_variables = self.stateless_call(
      trainable_variables, non_trainable_variables, x, training=training
    )[:2]
    loss, variables = self.stateless_compute_loss(
      trainable_variables,
      non_trainable_variables,
      metrics_variables,
      x=x,
      y=y,
      y_pred=y_pred,
      sample_weight=sample_weight,
      training=training,
    )
    _, non_trainable_variables, metrics_variables = variables
    return loss, (y_pred, non_trainable_variables, metrics_variables)

  def train_step(self, state, data):
    trainable, non_trainable, optimizer_variables, metrics_variables = state
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    grad_fn = drop_in(self.method, self.compute_loss_and_updates, has_aux=True)
    (loss, (y_pred, non_trainable, metrics_variables)), grads = grad_fn(
      trainable,
      non_trainable,
      metrics_variables,
      x,
      y,
      sample_weight,
      training=True,
    )
    trainable, optimizer_variables = self.optimizer.stateless_apply(
      optimizer_variables, grads, trainable
    )
    new_metrics, logs = [], {}
    for metric in self.metrics:
      start = len(new_metrics)
      own = metrics_variables[start : start + len(metric.variables)]
      if metric.name == 'loss':
        own = metric.stateless_update_state(own, loss, sample_weight=sample_weight)
      else:
        own = metric.stateless_update_state(own, y, y_pred)
      logs[metric.name] = metric.stateless_result(own)
      new_metrics += own
    return logs, (trainable, non_trainable, optimizer_variables, new_metrics)


@every_kind_slowly
def test_fit_with_the_drop_in(method):
  model = make_model(SharpnessAwareModel)
  model.method = method
  optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
  model.compile(optimizer=optimizer, loss='mse', metrics=['mae'])
  model.fit(X, Y, batch_size=SIZE, epochs=1, shuffle=False, verbose=0)
  params, others = by_hand(method, sgd(0.1, 0.9))
  close(values(model.trainable_variables), params)
  # Statistics of BatchNorm, and the state of Dropout's seeds: one pass a step.
  close(values(model.non_trainable_variables), [np.asarray(x) for x in others])


def test_fit_logs_the_clean_loss():
  model = make_model(SharpnessAwareModel)
  model.method = 'msam'
  x, y = BATCHES[0]
  forward = jax.jit(lambda *variables: model.stateless_call(*variables, training=True))
  out, _ = forward(
    values(model.trainable_variables), values(model.non_trainable_variables), x
  )
  model.compile(optimizer=keras.optimizers.SGD(0.1), loss='mse', metrics=['mae'])
  logs = model.fit(x, y, batch_size=SIZE, shuffle=False, verbose=0).history
  close(logs['loss'][0], np.mean((out - y) ** 2))
  close(logs['mae'][0], np.mean(np.abs(out - y)))


@pytest.mark.parametrize('interface', ['chain', 'drop-in'])
@every_kind_slowly
def test_optax_in_a_plain_loop(method, interface):
  model = make_model()
  head = [transformation(method)] if interface == 'chain' else []
  tx = optax.chain(*head, optax.adam(0.01, eps=EPS))

  def loss_fn(trainable, non_trainable, x, y):
    out, new = model.stateless_call(trainable, non_trainable, x, training=True)[:2]
    return jnp.mean((out - y) ** 2), new

  @jax.jit
  def train_step(trainable, non_trainable, opt_state, x, y):
    grad_and_state_fn = lambda params: jax.grad(loss_fn, has_aux=True)(
      params, non_trainable, x, y
    )
    if interface == 'chain':
      grads, new = grad_and_state_fn(trainable)
      extra = {'grad_fn': lambda params: grad_and_state_fn(params)[0]}
    else:
      sharpness_aware = drop_in(method, loss_fn, has_aux=True)
      (_, new), grads = sharpness_aware(trainable, non_trainable, x, y)
      extra = {}
    updates, opt_state = tx.update(grads, opt_state, trainable, **extra)
    return optax.apply_updates(trainable, updates), new, opt_state

  trainable = [v.value for v in model.trainable_variables]
  non_trainable = [v.value for v in model.non_trainable_variables]
  opt_state = tx.init(trainable)
  for x, y in BATCHES:
    trainable, non_trainable, opt_state = train_step(
      trainable, non_trainable, opt_state, x, y
    )
  params, others = by_hand(method, adam(0.01, eps=EPS))
  close(trainable, params)
  close(non_trainable, others)
