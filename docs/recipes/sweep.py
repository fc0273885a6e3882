"""A sweep over seeds and radii that is compiled once.

When to use it: a small model, and a grid of ρ (or α, or learning rates) with several
seeds. All runs train side by side in one program.

What to watch out for:

* Make the optimizer inside the mapped function. `rho` and `alpha` may be traced values:
  to sweep ρ/α as well, map over `alpha` in the same way.
* Each run has its own gradient norm: `vmap` sums nothing over the mapped axes.
* ρ = 0 is plain training, so the baseline is a point of the grid. It costs two
  gradients like the others.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from msam_optax import msam

SEEDS = np.arange(3)
RHOS = np.array([0.0, 0.05, 0.1, 0.2], np.float32)


def loss_fn(params, batch):
  x, y = batch
  hidden = jnp.tanh(x @ params['w1'] + params['b1'])
  return jnp.mean((hidden @ params['w2'] + params['b2'] - y) ** 2)


def init(seed):
  key1, key2 = jax.random.split(jax.random.key(seed))
  return {
    'w1': jax.random.normal(key1, (3, 16)) / 3**0.5,
    'b1': jnp.zeros(16),
    'w2': jax.random.normal(key2, (16, 2)) / 16**0.5,
    'b2': jnp.zeros(2),
  }


def run(seed, rho, batches):
  """One training run: the final parameters and the loss of each step."""
  tx = optax.chain(msam(rho=rho), optax.sgd(0.1))

  def train_step(carry, batch):
    params, opt_state = carry
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    grad_fn = lambda params: jax.grad(loss_fn)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
    return (optax.apply_updates(params, updates), opt_state), loss

  params = init(seed)
  (params, _), losses = jax.lax.scan(train_step, (params, tx.init(params)), batches)
  return params, losses


@jax.jit
def sweep(seeds, rhos, batches):
  """All runs at once; results have two leading axes, `[seed, rho]`."""
  over_rhos = jax.vmap(run, in_axes=(None, 0, None))
  over_both = jax.vmap(over_rhos, in_axes=(0, None, None))
  return over_both(seeds, rhos, batches)


def batches(steps, size=32):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(steps, size, 3)).astype(np.float32)
  return x, np.stack([np.sin(x[..., 0]), x[..., 1] - x[..., 2]], axis=-1)


def train(steps=20):
  params, losses = sweep(SEEDS, RHOS, batches(steps))
  return params, losses


if __name__ == '__main__':
  final = train()[1][..., -1]
  for rho, losses in zip(RHOS, final.T, strict=True):
    print(f'rho {rho:.2f}: {losses.mean():.3f} ± {losses.std():.3f}')
