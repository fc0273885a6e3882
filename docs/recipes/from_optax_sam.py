"""Porting from `optax.contrib.sam`, in opaque and in transparent mode.

When to use it: your loop has `optax.contrib.sam`. Below are both of its modes and the
same training with this library; all three give the same parameters.

| `optax.contrib.sam` | here |
|---|---|
| `adv_optimizer = chain(normalize(), sgd(rho))` | `sam(rho)`; Monge SAM: `msam(rho)` |
| `sam(optimizer, adv_optimizer, opaque_mode=True)` | `chain(sam(rho), optimizer)` |
| `grad_fn(params, i)`, two arguments | `grad_fn(params)`, one |
| `batch_axis_name='i'` | `axis_name='i'` |
| transparent: two calls of `update` per step | one call, with `grad_fn` |
| `sync_period=k` for k - 1 ascent steps | none: the ascent is one step |

What to watch out for:

* In transparent mode the second gradient is that of the loop's next call, usually on
  the next batch. Here both gradients are of the same batch, so a loop over the same
  batches makes twice as many steps.
* At a zero gradient `optax.contrib.normalize` divides by zero. Here there is then no
  perturbation, and the plain gradient is used.
* To keep the wrapper and change only the ascent, give it
  `chain(normalize_by(monge()), sgd(rho))` as the adversary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from msam_optax import sam

RHO = 0.1
optimizer = optax.sgd(0.02, momentum=0.9)
adversary = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))

opaque = optax.contrib.sam(optimizer, adversary, opaque_mode=True)
transparent = optax.contrib.sam(optimizer, adversary)
ours = optax.chain(sam(rho=RHO), optimizer)


def loss_fn(params, batch):
  x, y = batch
  hidden = jnp.tanh(x @ params['w1'] + params['b1'])
  return jnp.mean((hidden @ params['w2'] + params['b2'] - y) ** 2)


@jax.jit
def opaque_step(params, opt_state, batch):
  """Before."""
  loss, grads = jax.value_and_grad(loss_fn)(params, batch)
  grad_fn = lambda params, _: jax.grad(loss_fn)(params, batch)
  updates, opt_state = opaque.update(grads, opt_state, params, grad_fn=grad_fn)
  return optax.apply_updates(params, updates), opt_state, loss


@jax.jit
def transparent_step(params, opt_state, batch):
  """Before: called twice per step, and every other time it only moves uphill."""
  loss, grads = jax.value_and_grad(loss_fn)(params, batch)
  updates, opt_state = transparent.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss


@jax.jit
def our_step(params, opt_state, batch):
  """After."""
  loss, grads = jax.value_and_grad(loss_fn)(params, batch)
  grad_fn = lambda params: jax.grad(loss_fn)(params, batch)
  updates, opt_state = ours.update(grads, opt_state, params, grad_fn=grad_fn)
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


def train(tx, step, steps=20, calls=1):
  """The last parameters and the losses; `calls` of `step` on each batch."""
  params = jax.tree.map(jnp.asarray, init())
  opt_state, losses = tx.init(params), []
  for batch in batches(steps):
    params, opt_state, loss = step(params, opt_state, batch)
    losses.append(float(loss))
    for _ in range(calls - 1):
      params, opt_state, _ = step(params, opt_state, batch)
  return params, losses


if __name__ == '__main__':
  for name, args in {
    'opaque': (opaque, opaque_step),
    'transparent': (transparent, transparent_step, 20, 2),
    'ours': (ours, our_step),
  }.items():
    print(f'{name:12}', *(f'{loss:.3f}' for loss in train(*args)[1][::5]))
