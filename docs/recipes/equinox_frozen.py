"""Equinox: train some layers, and freeze the others.

When to use it: a pretrained `eqx.Module`, of which only the last layer is trained.

What to watch out for:

* Partition the model by a tree of bools, and call `eqx.combine` inside the loss. The
  optimizer never sees a frozen layer: it is not perturbed, its gradient is in no norm,
  and it needs no optimizer state.
* The norm covers the trained layers alone. It is smaller than the norm of the whole
  gradient, so Monge SAM shortens the perturbation less.
* Initialize with `tx.init(eqx.filter(model, is_trained(model)))`. Optax's Adam refuses
  gradients that are None where its own state has an array.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from msam_optax import msam

RHO = 0.1
tx = optax.chain(msam(rho=RHO), optax.sgd(0.1))


def is_trained(model):
  """A tree of bools like the model: True on the arrays of the last layer."""
  last = lambda tree: (tree.layers[-1].weight, tree.layers[-1].bias)
  nothing = jax.tree.map(lambda _: False, model)
  return eqx.tree_at(last, nothing, replace=(True, True))


def loss_fn(params, static, x, y):
  model = eqx.combine(params, static)
  return jnp.mean((jax.vmap(model)(x) - y) ** 2)


@eqx.filter_jit
def train_step(model, opt_state, x, y):
  params, static = eqx.partition(model, is_trained(model))
  # Only the first argument is differentiated: frozen layers get no gradient.
  loss, grads = eqx.filter_value_and_grad(loss_fn)(params, static, x, y)
  grad_fn = lambda params: eqx.filter_grad(loss_fn)(params, static, x, y)
  updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
  # Updates are None where the model is frozen, and `eqx.apply_updates` skips these.
  return eqx.apply_updates(model, updates), opt_state, loss


def init():
  return eqx.nn.MLP(3, 2, 16, 2, activation=jnp.tanh, key=jax.random.key(0))


def batches(steps, size=32):
  rng = np.random.default_rng(0)
  for _ in range(steps):
    x = rng.normal(size=(size, 3)).astype(np.float32)
    yield x, np.stack([np.sin(x[:, 0]), x[:, 1] - x[:, 2]], axis=1)


def train(steps=20):
  model = init()
  opt_state = tx.init(eqx.filter(model, is_trained(model)))
  losses = []
  for x, y in batches(steps):
    model, opt_state, loss = train_step(model, opt_state, x, y)
    losses.append(float(loss))
  return model, losses


if __name__ == '__main__':
  print('loss:', *(f'{loss:.3f}' for loss in train()[-1][::5]))
