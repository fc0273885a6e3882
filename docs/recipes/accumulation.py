"""Gradient accumulation: one optimizer step from several micro-batches.

When to use it: the batch does not fit into memory.

What to watch out for:

* Each micro-batch has its own probe, and the gradients at the probes are averaged. This
  is m-sharpness, with m the number of micro-batches. It differs from SAM of the whole
  batch.
* When micro-batches arrive one by one, put `MultiSteps` behind `msam` (`stream_step`).
  A schedule of ρ then counts micro-batches.
* When the whole batch is at hand, let the drop-in cut it (`batch_step`): row `i` goes
  into micro-batch `i % k`. `sync_ascent=True` gives one shared perturbation instead.
* `MultiSteps` around `msam` needs a `grad_fn` over all micro-batches. With that of the
  last one it silently uses the last one alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from msam_optax import monge
from msam_optax import msam
from msam_optax import value_and_grad

RHO, MICROBATCHES = 0.1, 4
optimizer = optax.sgd(0.02, momentum=0.9)
accumulated = optax.MultiSteps(optimizer, every_k_schedule=MICROBATCHES)
tx = optax.chain(msam(rho=RHO), accumulated.gradient_transformation())


def loss_fn(params, batch):
  x, y = batch
  hidden = jnp.tanh(x @ params['w1'] + params['b1'])
  return jnp.mean((hidden @ params['w2'] + params['b2'] - y) ** 2)


@jax.jit
def stream_step(params, opt_state, microbatch):
  """One micro-batch; the parameters move with every k-th."""
  loss, grads = jax.value_and_grad(loss_fn)(params, microbatch)
  grad_fn = lambda params: jax.grad(loss_fn)(params, microbatch)
  updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
  return optax.apply_updates(params, updates), opt_state, loss


@jax.jit
def batch_step(params, opt_state, batch):
  """One batch, whose k micro-batches the drop-in runs one after the other."""
  value_and_grad_fn = value_and_grad(
    loss_fn, monge(alpha=1.0), rho=RHO, shards=MICROBATCHES
  )
  loss, grads = value_and_grad_fn(params, batch)
  updates, opt_state = optimizer.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss


def init():
  rng = np.random.default_rng(0)
  draw = lambda *shape: (0.5 * rng.normal(size=shape)).astype(np.float32)
  return {'w1': draw(3, 16), 'b1': draw(16), 'w2': draw(16, 2), 'b2': draw(2)}


def batches(steps, size=32):
  rng = np.random.default_rng(1)
  for _ in range(steps):
    x = rng.normal(size=(size, 3)).astype(np.float32)
    yield x, np.stack([np.sin(x[:, 0]), x[:, 1] - x[:, 2]], axis=1)


def train_on_stream(steps=20):
  params = init()
  opt_state, losses = tx.init(params), []
  for batch in batches(steps):
    parts = [
      jax.tree.map(lambda rows, i=i: rows[i::MICROBATCHES], batch)
      for i in range(MICROBATCHES)
    ]
    for microbatch in parts:
      params, opt_state, loss = stream_step(params, opt_state, microbatch)
      losses.append(float(loss))
  return params, losses


def train_on_batches(steps=20):
  params = init()
  opt_state, losses = optimizer.init(params), []
  for batch in batches(steps):
    params, opt_state, loss = batch_step(params, opt_state, batch)
    losses.append(float(loss))
  return params, losses


if __name__ == '__main__':
  print('loss:', *(f'{loss:.3f}' for loss in train_on_batches()[-1][::5]))
