"""LoRA: perturb and train the factors, and leave the base weights alone.

When to use it: fine-tuning with low-rank adapters, here in Flax NNX.

What to watch out for:

* Differentiate the factors only: `nnx.DiffState(0, nnx.LoRAParam)` in both passes, and
  `wrt=nnx.LoRAParam` in the optimizer. The base weights are then in no norm, are not
  perturbed, and get no gradient.
* The second factor starts at zero, so the first one has no gradient in the first step.
  Its perturbation then moves the second factor alone.
* If your loop needs the gradient of all parameters (a plain pytree, an optimizer with
  masks), use `msam(mask=by_name('lora_a', 'lora_b'))`: the result is the same.
"""

from flax import nnx
import jax.numpy as jnp
import numpy as np
import optax

from msam_optax import flax_nnx
from msam_optax import msam

RHO = 0.1
FACTORS = nnx.DiffState(0, nnx.LoRAParam)


class Net(nnx.Module):
  """Two layers with adapters of rank 2."""

  def __init__(self, rngs):
    self.hidden = nnx.LoRALinear(3, 16, lora_rank=2, rngs=rngs)
    self.out = nnx.LoRALinear(16, 2, lora_rank=2, rngs=rngs)

  def __call__(self, x):
    return self.out(jnp.tanh(self.hidden(x)))


def loss_fn(model, x, y):
  return jnp.mean((model(x) - y) ** 2)


@nnx.jit
def train_step(model, optimizer, x, y):
  grad_fn = flax_nnx.grad_fn(loss_fn, model, x, y, argnums=FACTORS)
  loss, grads = nnx.value_and_grad(loss_fn, argnums=FACTORS)(model, x, y)
  optimizer.update(model, grads, grad_fn=grad_fn)
  return loss


def init():
  return Net(nnx.Rngs(0))


def batches(steps, size=32):
  rng = np.random.default_rng(0)
  for _ in range(steps):
    x = rng.normal(size=(size, 3)).astype(np.float32)
    yield x, np.stack([np.sin(x[:, 0]), x[:, 1] - x[:, 2]], axis=1)


def train(steps=20):
  model = init()
  tx = optax.chain(msam(rho=RHO), optax.sgd(0.02, momentum=0.9))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
  losses = [float(train_step(model, optimizer, x, y)) for x, y in batches(steps)]
  return model, losses


if __name__ == '__main__':
  print('loss:', *(f'{loss:.3f}' for loss in train()[-1][::5]))
