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
# # The sharpness-aware family
#
# A method consists of a **metric**, which determines the probe $w + \delta$, and a
# **combination**, which makes one update of the gradients. This notebook draws the probes
# of several metrics, builds new methods from the parts, trains with some of them, and
# counts the gradients that they compute.

# %%
import sys

if 'google.colab' in sys.modules:
  import subprocess

  subprocess.run(
    [sys.executable, '-m', 'pip', 'install', '-q', 'msam-optax[plot]'], check=True
  )

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import msam_optax
from msam_optax import adaptive
from msam_optax import diagonal_fisher
from msam_optax import euclidean
from msam_optax import geodesic
from msam_optax import max_norm
from msam_optax import monge
from msam_optax import unit_rise

# %% [markdown]
# ## The probes of several metrics
#
# All seven have the same loss, the same parameters and the same radius. The circle is
# SAM's ball. Under `unit_rise()` the radius *is* the rise of the loss: 0.5 to first order,
# however steep the loss is.


# %%
def valley(w):
  return jnp.square(1 - w[0] * w[1]) + 0.1 * jnp.sum(jnp.square(w))


w, rho = jnp.array([1.9, 0.9]), 0.5
METRICS = {
  'euclidean (SAM)': euclidean(),
  'monge': monge(alpha=1.0),
  'adaptive (ASAM)': adaptive(weights=True),
  'diagonal Fisher': diagonal_fisher(),
  'max norm': max_norm(),
  'geodesic': geodesic(steps=4, alpha=1.0),
  'unit rise': unit_rise(),
}
grad = jax.grad(valley)


def probe(metric):
  ascent, _ = metric.ascend(grad(w), metric.init(w), w, rho=rho, grad_fn=grad)
  return msam_optax.perturb(w, ascent, rho)


fig, ax = plt.subplots(figsize=(7.5, 6), layout='constrained')
axes = np.linspace(0.9, 2.9, 80), np.linspace(0.1, 2.0, 80)
heights = jax.vmap(jax.vmap(valley))(jnp.stack(jnp.meshgrid(*axes), axis=-1))
ax.contour(*axes, heights, levels=np.geomspace(0.3, 12, 14), colors='#ced4da')
ax.add_patch(plt.Circle(w, rho, fill=False, linestyle=':', color='#6c757d'))
ax.plot(*w, 'o', color='black')
for i, (name, metric) in enumerate(METRICS.items()):
  there = probe(metric)
  label = f'{name}: the loss rises by {valley(there) - valley(w):.2f}'
  ax.plot(*zip(w, there, strict=True), color=f'C{i}', linewidth=1)
  ax.plot(*there, 'o', color=f'C{i}', label=label)
ax.set_title('The probes of seven metrics, ρ = 0.5', loc='left')
ax.set_aspect('equal')
ax.legend(loc='upper left', fontsize=9)
plt.show()

# %% [markdown]
# ## Mix your own
#
# You can combine every metric with every combination. No paper has a name for these:

# %%
MIXED = {
  'Monge GSAM': msam_optax.gsam(rho=0.1, metric=monge()),
  'Monge over ASAM, Stable SAM': msam_optax.stable_sam(
    rho=0.5, metric=monge(1.0, base=adaptive())
  ),
  'LookSAM under the max norm': msam_optax.look_sam(rho=0.005, metric=max_norm()),
  'a fixed rise, every 5th step': optax.conditionally_transform(
    msam_optax.msam(rho=1.0, max_rise=0.1), lambda step: step % 5 == 0
  ),
}
NAMED = {
  'Adam': optax.identity(),
  'SAM': msam_optax.sam(rho=0.1),
  'Monge SAM': msam_optax.msam(rho=0.1),
  'GSAM': msam_optax.gsam(rho=0.1),
  'Friendly SAM': msam_optax.friendly_sam(rho=0.1),
  'LookSAM': msam_optax.look_sam(rho=0.1),
}

# %% [markdown]
# ## Train with them, and count
#
# We train a small network on two spirals, with a tenth of the labels flipped. Each
# optimizer is the method in a chain with Adam; nothing else changes. A callback counts
# the gradients that are computed.


# %%
def spirals(seed, size=200, flipped=0.1):
  rng = np.random.default_rng(seed)
  label = rng.integers(0, 2, size)
  t = rng.uniform(0.3, 1.0, size)
  angle = 3 * np.pi * t + np.pi * label
  x = t[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
  x += 0.03 * rng.normal(size=x.shape)
  wrong = rng.uniform(size=size) < flipped
  return jnp.asarray(x, jnp.float32), jnp.asarray(label ^ wrong, jnp.float32)


def init(seed, width=64):
  k1, k2, k3 = jax.random.split(jax.random.key(seed), 3)
  return {
    'in': {'w': jax.random.normal(k1, (2, width)), 'b': jnp.zeros(width)},
    'mid': {'w': jax.random.normal(k2, (width, width)) / 8, 'b': jnp.zeros(width)},
    'out': {'w': jax.random.normal(k3, (width, 1)) / 8, 'b': jnp.zeros(1)},
  }


def score(params, x):
  for name in ('in', 'mid'):
    x = jnp.tanh(x @ params[name]['w'] + params[name]['b'])
  return (x @ params['out']['w'] + params['out']['b'])[:, 0]


def loss(params, batch):
  x, y = batch
  return optax.sigmoid_binary_cross_entropy(score(params, x), y).mean()


TRAIN, TEST = spirals(0), spirals(1, size=2000, flipped=0.0)
STEPS = 600


def train(optimizer, clean=lambda state, params: params):
  """The test accuracy after training, and the gradients of a step."""
  counted = []

  def gradient(params):
    jax.debug.callback(lambda: counted.append(1))
    return jax.grad(loss)(params, TRAIN)

  @jax.jit
  def run(params):
    def step(carry, _):
      params, state = carry
      updates, state = optimizer.update(
        gradient(params), state, params, grad_fn=gradient
      )
      return (optax.apply_updates(params, updates), state), None

    carry, _ = jax.lax.scan(step, (params, optimizer.init(params)), length=STEPS)
    return carry

  params, state = run(init(0))
  x, y = TEST
  right = jnp.mean((score(clean(state, params), x) > 0) == (y > 0.5))
  jax.effects_barrier()
  return float(right), len(counted) / STEPS


results = {}
for name, method in {**NAMED, **MIXED}.items():
  optimizer = optax.chain(optax.with_extra_args_support(method), optax.adam(1e-2))
  results[name] = train(optimizer)

# %% [markdown]
# ## One gradient per step
#
# `momentum_sam` and `lagged` wrap the optimizer. The parameters in the training loop are
# the probe, so we evaluate the clean parameters, `eval_params(state, params)`.

# %%
ONE = {
  'Momentum-SAM': msam_optax.momentum_sam(optax.adam(1e-2), rho=0.3),
  'lagged Monge': msam_optax.lagged(optax.adam(1e-2), monge(), rho=0.1),
}
for name, optimizer in ONE.items():
  results[name] = train(optimizer, clean=msam_optax.eval_params)

# %%
fig, ax = plt.subplots(figsize=(8, 5), layout='constrained')
names = sorted(results, key=lambda name: results[name][0])
for i, name in enumerate(names):
  accuracy, gradients = results[name]
  ax.barh(i, 100 * accuracy, color='#1b6ca8' if name in MIXED else '#adb5bd')
  ax.text(100 * accuracy, i, f'  {gradients:.1f} gradients a step', va='center')
ax.set_yticks(range(len(names)), names)
ax.set_xlim(100 * min(a for a, _ in results.values()) - 3, 104)
ax.set_xlabel('test accuracy, %: one seed, radii that nobody has tuned')
ax.set_title('Two spirals, a tenth of the labels wrong', loc='left')
plt.show()

# %% [markdown]
# With one seed and untuned radii this shows that all of them *run*, not which one is
# best. For that, `python -m benchmarks.frontier` tunes every method in the same way on two
# tasks, with six seeds, at equal steps and at equal gradients; `docs/which.md` has the
# results.
