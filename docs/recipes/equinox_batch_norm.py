"""Equinox: `filter_jit`, and BatchNorm statistics that move once per step.

When to use it: your model is an `eqx.Module`.

What to watch out for:

* Use the same filter, `eqx.is_inexact_array`, for `tx.init`, for `params` and for the
  gradients. The rest of the model, activation functions for example, goes back in with
  `eqx.combine`, inside `grad_fn`.
* Keep the state of the clean pass. `grad_fn` starts from the old state and drops the
  new one: statistics of perturbed parameters are not those of your model.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from msam_optax import msam

RHO = 0.1
tx = optax.chain(msam(rho=RHO), optax.sgd(0.1, momentum=0.9))


class Net(eqx.Module):
  """Linear, BatchNorm, Linear."""

  hidden: eqx.nn.Linear
  norm: eqx.nn.BatchNorm
  out: eqx.nn.Linear

  def __init__(self, key):
    hidden_key, out_key = jax.random.split(key)
    self.hidden = eqx.nn.Linear(3, 16, key=hidden_key)
    self.norm = eqx.nn.BatchNorm(16, axis_name='batch', momentum=0.9, mode='batch')
    self.out = eqx.nn.Linear(16, 2, key=out_key)

  def __call__(self, x, state):
    x, state = self.norm(self.hidden(x), state)
    return self.out(jnp.tanh(x)), state


def loss_fn(model, state, x, y):
  batched = jax.vmap(model, axis_name='batch', in_axes=(0, None), out_axes=(0, None))
  out, state = batched(x, state)
  return jnp.mean((out - y) ** 2), state


@eqx.filter_jit
def train_step(model, state, opt_state, x, y):
  value_and_grad = eqx.filter_value_and_grad(loss_fn, has_aux=True)
  (loss, new_state), grads = value_and_grad(model, state, x, y)
  params, static = eqx.partition(model, eqx.is_inexact_array)

  def grad_fn(params):
    _, grads = value_and_grad(eqx.combine(params, static), state, x, y)
    return grads

  updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
  return eqx.apply_updates(model, updates), new_state, opt_state, loss


def init():
  return eqx.nn.make_with_state(Net)(jax.random.key(0))


def batches(steps, size=32):
  rng = np.random.default_rng(0)
  for _ in range(steps):
    x = rng.normal(1.0, 2.0, size=(size, 3)).astype(np.float32)
    yield x, np.stack([np.sin(x[:, 0]), x[:, 1] - x[:, 2]], axis=1)


def train(steps=20):
  model, state = init()
  opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
  losses = []
  for x, y in batches(steps):
    model, state, opt_state, loss = train_step(model, state, opt_state, x, y)
    losses.append(float(loss))
  return model, state, losses


if __name__ == '__main__':
  print('loss:', *(f'{loss:.3f}' for loss in train()[-1][::5]))
