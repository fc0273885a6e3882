"""Keras on JAX: `compile` and `fit` as before, with your own `train_step`.

When to use it: you train with `model.fit` on Keras' JAX backend.

What to watch out for:

* One name changes in `train_step`: `jax.value_and_grad` becomes the drop-in
  `msam_optax.value_and_grad`. The loss, the metrics, BatchNorm and the seeds of Dropout
  are those of the clean pass, once per step.
* Keras optimizers take no `grad_fn`, so the chain with `msam` does not work in `fit`.
* Do not use Keras' loss scaling (`mixed_float16`): the gradient of the scaled loss
  would reach the perturbation, which changes what α means. `mixed_bfloat16` needs no
  scaling.
"""

import os

os.environ['KERAS_BACKEND'] = 'jax'  # Keras reads it when it is imported.

import keras
import numpy as np

from msam_optax import monge
from msam_optax import value_and_grad

RHO = 0.1


class SharpnessAwareModel(keras.Model):
  """A functional model that `fit` trains with Monge SAM."""

  def train_step(self, state, data):
    trainable, non_trainable, optimizer_variables, metrics_variables = state
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    value_and_grad_fn = value_and_grad(
      self.compute_loss_and_updates, monge(alpha=1.0), rho=RHO, has_aux=True
    )
    (_, aux), grads = value_and_grad_fn(
      trainable,
      non_trainable,
      metrics_variables,
      x,
      y,
      sample_weight,
      training=True,
      optimizer_variables=optimizer_variables,
    )
    loss, y_pred, non_trainable, metrics_variables = aux
    trainable, optimizer_variables = self.optimizer.stateless_apply(
      optimizer_variables, grads, trainable
    )
    logs, metrics_variables = self.updated_metrics(
      metrics_variables, loss, y, y_pred, sample_weight
    )
    return logs, (trainable, non_trainable, optimizer_variables, metrics_variables)

  def updated_metrics(self, variables, loss, y, y_pred, sample_weight):
    """The logs and the new variables, as in Keras' guide to `train_step` with JAX."""
    logs, new_variables = {}, []
    for metric in self.metrics:
      start = len(new_variables)
      own = variables[start : start + len(metric.variables)]
      if metric.name == 'loss':
        own = metric.stateless_update_state(own, loss, sample_weight=len(y))
        logs['loss'] = metric.stateless_result(own)
      else:
        own = metric.stateless_update_state(own, y, y_pred, sample_weight)
        logs.update(metric.stateless_result(own))
      new_variables += own
    return logs, new_variables


def init():
  keras.utils.set_random_seed(0)
  inputs = keras.Input(shape=(3,))
  x = keras.layers.Dense(16, use_bias=False)(inputs)
  x = keras.layers.BatchNormalization(momentum=0.9)(x)
  x = keras.layers.Dropout(0.1, seed=1)(keras.ops.tanh(x))
  model = SharpnessAwareModel(inputs, keras.layers.Dense(2)(x))
  model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss='mse', metrics=['mae'])
  return model


def data(size=128):
  rng = np.random.default_rng(0)
  x = rng.normal(1.0, 2.0, size=(size, 3)).astype(np.float32)
  return x, np.stack([np.sin(x[:, 0]), x[:, 1] - x[:, 2]], axis=1)


def train(epochs=5):
  model = init()
  x, y = data()
  history = model.fit(
    x, y, batch_size=32, epochs=epochs, shuffle=False, verbose=0
  ).history
  return model, history['loss']


if __name__ == '__main__':
  print('loss:', *(f'{loss:.3f}' for loss in train()[-1]))
