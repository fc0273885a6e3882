"""A moving average of the parameters, beside Monge SAM.

When to use it: you evaluate averaged weights.

What to watch out for:

* Train with the raw parameters, evaluate with the average. The average is made after
  the optimizer's step, from the parameters, never from the probe `w + δ`.
* `optax.incremental_update` starts from the initial parameters; `optax.ema` starts from
  zero and corrects its bias.
* With BatchNorm average the statistics as well, or recompute them for the average.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from msam_optax import msam

RHO, DECAY = 0.1, 0.9
tx = optax.chain(msam(rho=RHO), optax.sgd(0.02, momentum=0.9))


def loss_fn(params, batch):
  x, y = batch
  hidden = jnp.tanh(x @ params['w1'] + params['b1'])
  return jnp.mean((hidden @ params['w2'] + params['b2'] - y) ** 2)


@jax.jit
def train_step(params, average, opt_state, batch):
  loss, grads = jax.value_and_grad(loss_fn)(params, batch)
  grad_fn = lambda params: jax.grad(loss_fn)(params, batch)
  updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
  params = optax.apply_updates(params, updates)
  average = optax.incremental_update(params, average, step_size=1 - DECAY)
  return params, average, opt_state, loss


def init():
  rng = np.random.default_rng(0)
  draw = lambda *shape: (0.5 * rng.normal(size=shape)).astype(np.float32)
  return {'w1': draw(3, 16), 'b1': draw(16), 'w2': draw(16, 2), 'b2': draw(2)}


def batches(steps, size=32):
  rng = np.random.default_rng(1)
  for _ in range(steps):
    x = rng.normal(size=(size, 3)).astype(np.float32)
    yield x, np.stack([np.sin(x[:, 0]), x[:, 1] - x[:, 2]], axis=1)


def train(steps=20):
  params = average = init()
  opt_state, losses = tx.init(params), []
  for batch in batches(steps):
    params, average, opt_state, loss = train_step(params, average, opt_state, batch)
    losses.append(float(loss))
  return params, average, losses


if __name__ == '__main__':
  _, average, losses = train()
  (held_out,) = batches(1, size=1000)
  print('loss:', *(f'{loss:.3f}' for loss in losses[::5]))
  print(f'average, held out: {float(loss_fn(average, held_out)):.3f}')
