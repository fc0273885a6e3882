"""Monge SAM in some steps only: late, early, or every k-th.

When to use it: you cannot afford two gradients in every step. A few epochs of SAM at
the end of training gave nearly the same generalization and sharpness as SAM throughout
([Zhou et al., 2024](https://arxiv.org/abs/2410.10373)).

What to watch out for. In a skipped step `optax.conditionally_transform` passes the
gradient through, and the state of `msam` stays as it was:

* No second gradient is computed: under `jit` the condition is a branch. Under `vmap`
  it stays one if the optimizer's state is made inside the mapped function. If the state
  is itself mapped, both branches run in every step.
* `slope`, `radius` and `rise` describe the last step with a probe, and are zero before
  the first one.
* `finite` also describes the last step with a probe. Wrap the optimizer behind it in
  `optax.apply_if_finite`, which checks every step.
* `count` counts the steps with a probe, and a schedule of ρ follows it: late SAM starts
  the schedule at 0, and every k-th step advances it by one. For a schedule of training
  steps give `lambda count: schedule(start + count)` to late SAM, and
  `lambda count: schedule(k * count)` to every k-th step.
  The schedule of the learning rate counts all steps as usual.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from msam_optax import msam

STEPS, RHO = 20, 0.1
WHEN = {
  'late': lambda step: step >= STEPS - 5,
  'early': lambda step: step < 5,
  'every 4th': lambda step: step % 4 == 0,
}


def make_optimizer(when, rho=RHO):
  return optax.chain(
    optax.conditionally_transform(msam(rho=rho), when),
    optax.sgd(0.02, momentum=0.9),
  )


def loss_fn(params, batch):
  x, y = batch
  hidden = jnp.tanh(x @ params['w1'] + params['b1'])
  return jnp.mean((hidden @ params['w2'] + params['b2'] - y) ** 2)


def make_train_step(tx, loss_fn=loss_fn):
  @jax.jit
  def train_step(params, opt_state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    grad_fn = lambda params: jax.grad(loss_fn)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), opt_state, loss

  return train_step


def init():
  rng = np.random.default_rng(0)
  draw = lambda *shape: (0.5 * rng.normal(size=shape)).astype(np.float32)
  return {'w1': draw(3, 16), 'b1': draw(16), 'w2': draw(16, 2), 'b2': draw(2)}


def batches(steps, size=32):
  rng = np.random.default_rng(1)
  for _ in range(steps):
    x = rng.normal(size=(size, 3)).astype(np.float32)
    yield x, np.stack([np.sin(x[:, 0]), x[:, 1] - x[:, 2]], axis=1)


def train(when, rho=RHO):
  """The last parameters, the loss of each step, and what the state records of each."""
  tx = make_optimizer(when, rho)
  train_step = make_train_step(tx)
  params = init()
  opt_state, losses, records = tx.init(params), [], []
  for batch in batches(STEPS):
    params, opt_state, loss = train_step(params, opt_state, batch)
    losses.append(float(loss))
    records.append(jax.device_get(opt_state[0].inner_state))
  return params, losses, records


if __name__ == '__main__':
  for name, when in WHEN.items():
    _, losses, records = train(when)
    print(f'{name}: loss {losses[0]:.3f} → {losses[-1]:.3f}')
    print('  slope', *(f'{record.slope:.2f}' for record in records))
