"""Porting from PyTorch's `SAM` with `first_step` and `second_step`.

When to use it: your loop has the `SAM` optimizer of davda54/sam or a relative of it.

| PyTorch | here (Flax NNX) |
|---|---|
| `SAM(parameters, SGD, rho=…)` | `chain(sam(rho), sgd(…))`; Monge SAM: `msam(rho)` |
| `SAM(…, adaptive=True)` | `asam(rho, eta=0.0, weights=True)` |
| `loss.backward()` | `loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)` |
| the second `backward()` | `grad_fn = flax_nnx.grad_fn(loss_fn, model, x, y)` |
| `first_step`, `second_step` | `optimizer.update(model, grads, grad_fn=grad_fn)` |
| `step(closure)` | the closure is `grad_fn` |
| `enable_running_stats`, `disable_running_stats` | none: `grad_fn` works on a copy |
| `weight_decay=` of SGD | `add_decayed_weights`, between `sam` and `sgd` |
| `clip_grad_norm_` before `second_step` | `clip_by_global_norm`, behind `sam` |
| `requires_grad_(False)` | `wrt=` and `nnx.DiffState`: see `lora.py` |
| `GradScaler` | see `dynamic_scale.py` |
| `model.no_sync()` in the first pass (DDP) | `axis_name='i'`: see `device_groups.py` |

What to watch out for:

* Make `grad_fn` before the clean pass: it copies the model as it is then, so that both
  passes drop out the same units.
* PyTorch's BatchNorm counts momentum the other way: its 0.1 is 0.9 in Flax.
* A DDP loop without `no_sync` averages both gradients over all devices. That is
  `sync_ascent=True`, or plain `jit` with sharded arrays.
"""

from flax import nnx
import jax.numpy as jnp
import numpy as np
import optax

from msam_optax import flax_nnx
from msam_optax import sam

RHO, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.02, 0.9, 5e-4


class Net(nnx.Module):
  """Linear, BatchNorm, Linear."""

  def __init__(self, rngs):
    self.hidden = nnx.Linear(3, 16, rngs=rngs)
    self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
    self.out = nnx.Linear(16, 2, rngs=rngs)

  def __call__(self, x):
    return self.out(jnp.tanh(self.norm(self.hidden(x))))


def loss_fn(model, x, y):
  return jnp.mean((model(x) - y) ** 2)


@nnx.jit
def train_step(model, optimizer, x, y):
  # Copies the model as it is now. The optimizer calls it at the probe.
  grad_fn = flax_nnx.grad_fn(loss_fn, model, x, y)
  # `loss.backward()`.
  loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
  # `first_step`, the second `backward`, and `second_step`.
  optimizer.update(model, grads, grad_fn=grad_fn)
  return loss


def init():
  return Net(nnx.Rngs(0))


def make_optimizer(model):
  tx = optax.chain(
    sam(rho=RHO),
    optax.add_decayed_weights(WEIGHT_DECAY),
    optax.sgd(LEARNING_RATE, momentum=MOMENTUM),
  )
  return nnx.Optimizer(model, tx, wrt=nnx.Param)


def batches(steps, size=32):
  rng = np.random.default_rng(0)
  for _ in range(steps):
    x = rng.normal(1.0, 2.0, size=(size, 3)).astype(np.float32)
    yield x, np.stack([np.sin(x[:, 0]), x[:, 1] - x[:, 2]], axis=1)


def train(steps=20):
  model = init()
  model.train()
  optimizer = make_optimizer(model)
  losses = [float(train_step(model, optimizer, x, y)) for x, y in batches(steps)]
  return model, losses


if __name__ == '__main__':
  print('loss:', *(f'{loss:.3f}' for loss in train()[-1][::5]))
