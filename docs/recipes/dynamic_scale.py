"""float16 with Flax's `DynamicScale`.

When to use it: training in float16. bfloat16 needs no loss scaling.

What to watch out for:

* The gradient at the probe overflows before the clean one does, and Flax's flag covers
  the clean one only. The flag `finite` in the state covers both: keep the old state
  where it is False, and let the scale follow it with `scale_by_both_passes`.
* `scaled` unscales its gradient in float32, so ρ and α are those of the unscaled loss.
* The parameters are float32, and the model casts. In float16 small perturbations would
  vanish.
"""

from flax import linen as nn
from flax.training.dynamic_scale import DynamicScale
import jax
import jax.numpy as jnp
import numpy as np
import optax

from msam_optax import msam
from msam_optax.flax_linen import scale_by_both_passes
from msam_optax.flax_linen import TrainState

RHO = 0.1


class Net(nn.Module):
  """Two layers that compute in float16."""

  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.Dense(16, dtype=jnp.float16)(x))
    return nn.Dense(2, dtype=jnp.float16)(x)


def loss_fn(params, x, y):
  out = Net().apply({'params': params}, x)
  return jnp.mean((jnp.asarray(out, jnp.float32) - y) ** 2)


@jax.jit
def train_step(state, dynamic_scale, x, y):
  scaled = dynamic_scale.value_and_grad(lambda params: loss_fn(params, x, y))
  _, finite, loss, grads = scaled(state.params)
  new = state.apply_gradients(grads=grads, grad_fn=lambda params: scaled(params)[3])
  finite &= optax.tree.get(new.opt_state, 'finite')
  state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
  return state, scale_by_both_passes(dynamic_scale, finite), loss


def init():
  params = Net().init(jax.random.key(0), np.zeros((1, 3), np.float32))['params']
  tx = optax.chain(msam(rho=RHO), optax.sgd(0.1))
  # The scale starts so high that the first steps overflow and are rejected.
  scale = DynamicScale(scale=2.0**22, growth_interval=2000)
  return TrainState.create(apply_fn=None, params=params, tx=tx), scale


def batches(steps, size=32):
  rng = np.random.default_rng(0)
  for _ in range(steps):
    x = rng.normal(size=(size, 3)).astype(np.float32)
    yield x, np.stack([np.sin(x[:, 0]), x[:, 1] - x[:, 2]], axis=1)


def train(steps=20):
  state, dynamic_scale = init()
  losses = []
  for x, y in batches(steps):
    state, dynamic_scale, loss = train_step(state, dynamic_scale, x, y)
    losses.append(float(loss))
  return state, dynamic_scale, losses


if __name__ == '__main__':
  state, dynamic_scale, losses = train()
  print('loss:', *(f'{loss:.3f}' for loss in losses[::5]))
  print(f'steps made: {int(state.step)}, scale: {float(dynamic_scale.scale):.0f}')
