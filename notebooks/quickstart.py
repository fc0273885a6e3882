# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Monge SAM in two minutes
#
# Monge SAM takes the gradient not at the parameters $w$, but uphill from them, at
# $w + \delta$:
#
# $$\delta = \frac{\rho\, g}{\lVert g\rVert \sqrt{1 + \alpha^2 \lVert g\rVert^2}}$$
#
# where $g$ is the gradient at $w$, $\rho$ the radius and $\alpha = 1$ in the
# [paper](https://arxiv.org/abs/2502.08448). We train a small Flax NNX network with and
# without it, on handwritten digits of which a fifth have wrong labels.

# %%
import sys

if 'google.colab' in sys.modules:
  import subprocess

  subprocess.run(
    [sys.executable, '-m', 'pip', 'install', '-q', 'msam-optax[demo]'], check=True
  )

# %%
from flax import nnx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

from msam_optax import flax_nnx
from msam_optax import monge
from msam_optax import msam
from msam_optax import value_and_grad

# %% [markdown]
# ## Data: 500 digits to train on, 100 of them mislabelled

# %%
rng = np.random.default_rng(0)
images, labels = load_digits(return_X_y=True)
order = rng.permutation(len(labels))
x, y = (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)
x_train, y_train, x_test, y_test = x[:500], y[:500].copy(), x[500:], y[500:]
y_train[:100] = (y_train[:100] + rng.integers(1, 10, 100)) % 10

# %% [markdown]
# ## The chain
#
# Two things change in a training loop. The optimizer becomes
# `optax.chain(msam(rho), optax.adam(lr))`, and `update` gets a function that computes
# the gradient at other parameters. For an NNX model, `flax_nnx.value_and_grad_fn` (or
# `grad_fn`) makes this function. It does not change the model, and both passes use the
# same dropout masks.


# %%
class Net(nnx.Module):
  def __init__(self, rngs):
    self.hidden = nnx.Linear(64, 64, rngs=rngs)
    self.dropout = nnx.Dropout(0.1, rngs=rngs)
    self.out = nnx.Linear(64, 10, rngs=rngs)

  def __call__(self, x):
    return self.out(self.dropout(nnx.relu(self.hidden(x))))


def loss_fn(model, x, y):
  logits = model(x)
  return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@nnx.jit
def train_step(model, optimizer, x, y):
  at_probe = flax_nnx.value_and_grad_fn(loss_fn, model, x, y)  # before the clean pass
  loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
  optimizer.update(model, grads, value_and_grad_fn=at_probe, value=loss)
  return loss, *(
    optax.tree.get(optimizer.opt_state, name)[...]
    for name in ('slope', 'radius', 'rise')
  )


@nnx.jit
def accuracy(model, x, y):
  return jnp.mean(jnp.argmax(model(x), axis=-1) == y)


def train(tx, epochs=100, batch=50):
  """Trains a network; returns it and what was logged in every step."""
  model = Net(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  logged, rng = [], np.random.default_rng(1)
  for _ in range(epochs):
    for rows in np.split(rng.permutation(500), 500 // batch):
      logged.append(train_step(model, optimizer, x_train[rows], y_train[rows]))
  model.eval()
  return model, np.array(jax.device_get(logged))


# %%
models, logs = {}, {}
for name, rho in {'Adam': 0.0, 'Monge SAM + Adam': 0.8}.items():
  models[name], logs[name] = train(optax.chain(msam(rho), optax.adam(3e-3)))
  fit, right = (
    accuracy(models[name], *d) for d in ((x_train, y_train), (x_test, y_test))
  )
  print(f'{name:18} training images, as labelled: {fit:.1%}, test images: {right:.1%}')

# %% [markdown]
# One seed and one radius show how to use it, not how good it is. `make demo` compares
# Adam, SAM and Monge SAM over ten radii and three seeds, and chooses the radius of each
# method on validation images.
#
# ## What to log
#
# The optimizer's state contains `slope`, `radius` and `rise`. For Monge SAM the slope is
# $s = \lVert g\rVert/\sqrt{1+\alpha^2\lVert g\rVert^2} < 1/\alpha$. If it is close to $1/\alpha$,
# the perturbation is much shorter than SAM's; if it is near 0, you are running SAM. To
# first order the perturbation raises the loss by $\rho s$, which never exceeds
# $\rho/\alpha$.

# %%
_, slope, radius, rise = logs['Monge SAM + Adam'].T
fig, axes = plt.subplots(1, 3, figsize=(11, 3), layout='constrained')
axes[0].plot(slope, color='#1b6ca8', linewidth=0.8)
axes[0].axhline(1, color='#6c757d', linestyle='--')
axes[0].set(title='slope, and its bound 1/α', xlabel='step', ylim=(0, 1.05))
axes[1].plot(radius, color='#1b6ca8', linewidth=0.8)
axes[1].axhline(0.8, color='#6c757d', linestyle='--')
axes[1].set(title='radius used, and ρ', xlabel='step', ylim=(0, 0.85))
axes[2].plot(0.8 * slope, rise, '.', color='#1b6ca8', markersize=2)
axes[2].axline((0, 0), slope=1, color='#6c757d', linestyle='--')
axes[2].set(
  title='rise of the loss at the probe', xlabel='predicted', ylabel='measured'
)
plt.show()

# %% [markdown]
# ## The drop-in
#
# If you cannot pass anything to `update` (in someone else's trainer, or in a wrapper that
# drops extra arguments), compute the gradient with `value_and_grad` and leave the
# optimizer as it is. Here is a linear model, without Flax:


# %%
def linear_loss(params, x, y):
  logits = x @ params['w'] + params['b']
  return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()


params = {'w': jnp.zeros((64, 10)), 'b': jnp.zeros(10)}
tx = optax.adam(1e-2)
opt_state = tx.init(params)


@jax.jit
def linear_step(params, opt_state):
  loss, grads = value_and_grad(linear_loss, monge(alpha=1.0), rho=0.1)(
    params, x_train, y_train
  )
  updates, opt_state = tx.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss


for _ in range(200):
  params, opt_state, loss = linear_step(params, opt_state)
right = jnp.argmax(x_test @ params['w'] + params['b'], axis=-1) == y_test
print(f'training loss {loss:.3f}, test images {right.mean():.1%}')

# %% [markdown]
# For NNX models `flax_nnx.value_and_grad` replaces `nnx.value_and_grad`. To go on, read in
# the docs how to choose $\rho$ and $\alpha$, how to combine Monge SAM with clipping,
# accumulation and masks, and what is invariant about it.
