"""Haiku: `transform_with_state`, dropout, and BatchNorm statistics.

When to use it: your model is a Haiku function. With `hk.transform` leave out the state.

What to watch out for:

* Both passes get the same key, so they drop the same units: `grad_fn` closes over it.
* Keep the state of the clean pass, and drop that of the pass at the probe.
"""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from msam_optax import msam

RHO = 0.1
tx = optax.chain(msam(rho=RHO), optax.sgd(0.1, momentum=0.9))


@hk.transform_with_state
def network(x, is_training):
  x = hk.Linear(16, with_bias=False)(x)
  norm = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)
  x = jnp.tanh(norm(x, is_training))
  if is_training:
    x = hk.dropout(hk.next_rng_key(), 0.1, x)
  return hk.Linear(2)(x)


def loss_fn(params, state, key, x, y):
  out, state = network.apply(params, state, key, x, is_training=True)
  return jnp.mean((out - y) ** 2), state


@jax.jit
def train_step(params, state, opt_state, key, x, y):
  value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
  (loss, new_state), grads = value_and_grad(params, state, key, x, y)

  def grad_fn(params):
    _, grads = value_and_grad(params, state, key, x, y)
    return grads

  updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
  return optax.apply_updates(params, updates), new_state, opt_state, loss


def init():
  return network.init(jax.random.key(0), np.zeros((1, 3), np.float32), is_training=True)


def batches(steps, size=32):
  rng = np.random.default_rng(0)
  for key in jax.random.split(jax.random.key(1), steps):
    x = rng.normal(1.0, 2.0, size=(size, 3)).astype(np.float32)
    yield key, x, np.stack([np.sin(x[:, 0]), x[:, 1] - x[:, 2]], axis=1)


def train(steps=20):
  params, state = init()
  opt_state = tx.init(params)
  losses = []
  for key, x, y in batches(steps):
    params, state, opt_state, loss = train_step(params, state, opt_state, key, x, y)
    losses.append(float(loss))
  return params, state, losses


if __name__ == '__main__':
  print('loss:', *(f'{loss:.3f}' for loss in train()[-1][::5]))
