# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Monge SAM on many devices
#
# When a batch is split over devices, SAM can mean two things. Either all devices share
# **one** perturbation, from the gradient of the whole batch; or **each** device has its
# own, from the gradient of its shard, and only the gradients at the probes are averaged.
# The second is *m-sharpness*, where $m$ is the number of shards. The
# [authors of SAM](https://arxiv.org/abs/2010.01412) used it, and it needs one reduction
# less.
#
# This notebook shows four ways in which JAX uses many devices, and in each the line that
# differs from a program for one device. Then it shows how $m$ changes the radius of Monge
# SAM. The eight devices are virtual, on one CPU. Without the line that creates them, the
# same code runs on a machine with eight TPU cores or GPUs. (These round matrix products
# more: set `jax_default_matmul_precision` to `'float32'` there for the comparisons.)

# %%
import sys

if 'google.colab' in sys.modules:
  import subprocess

  subprocess.run(
    [sys.executable, '-m', 'pip', 'install', '-q', 'msam-optax[demo]'], check=True
  )

# %%
import warnings

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

from msam_optax import monge
from msam_optax import msam
from msam_optax import value_and_grad

jax.config.update('jax_num_cpu_devices', 8)  # before any device is used
M, RHO, ALPHA = 8, 0.5, 1.0
mesh = Mesh(np.array(jax.devices()[:M]), ('i',))

# %% [markdown]
# ## The problem: 64 handwritten digits, a small network

# %%
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
x, y = (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)
data = x[:64], y[:64]

k1, k2 = jax.random.split(jax.random.key(0))
params = {
  'hidden': {'w': jax.random.normal(k1, (64, 32)) / 8, 'b': jnp.zeros(32)},
  'out': {'w': jax.random.normal(k2, (32, 16)) / 6, 'b': jnp.zeros(16)},  # 10 are used
}


def loss_fn(params, data):
  x, y = data
  h = jax.nn.relu(x @ params['hidden']['w'] + params['hidden']['b'])
  logits = h @ params['out']['w'] + params['out']['b']
  return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()


# %% [markdown]
# Both of them by hand, from the formula, on one device: a loop over the shards.


# %%
def by_hand(params, data, m):
  """The mean of the gradients at the probes of m shards."""
  at_probes = []
  for shard in zip(*(np.split(a, m) for a in data), strict=True):
    g = jax.grad(loss_fn)(params, shard)
    n = optax.tree.norm(g)
    factor = RHO / (n * jnp.sqrt(1 + ALPHA**2 * n**2))
    probe = jax.tree.map(lambda w, g: w + factor * g, params, g)
    at_probes.append(jax.grad(loss_fn)(probe, shard))
  return jax.tree.map(lambda *gs: sum(gs) / m, *at_probes)


together, on_their_own = by_hand(params, data, 1), by_hand(params, data, M)


def difference(a, b):
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


def check(name, grads, expected):
  deviation = difference(grads, expected)
  assert deviation < 1e-6
  print(f'{name:45} equals the loop over shards up to {deviation:.0e}')


print(f'the two meanings differ by {difference(together, on_their_own):.0e}')


# %% [markdown]
# ## One device
#
# All sections below use this step. (An optimizer would follow `msam` in `optax.chain`, and
# changes nothing here; the last section has one.)


# %%
def step(tx, params, data):
  grad_fn = lambda params: jax.grad(loss_fn)(params, data)
  return tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)[0]


grads = jax.jit(lambda params, data: step(msam(RHO, ALPHA), params, data))(params, data)
check('one device, the whole batch', grads, together)

# %% [markdown]
# ## `pmap`
#
# The devices are an axis with a name. `msam` gets the name and averages the gradient at the
# probe over this axis. With `sync_ascent=True` it also averages the clean gradient.

# %%
warnings.filterwarnings('ignore', message='.*pmap.*')  # it is on its way out of JAX
by_device = jax.tree.map(lambda a: a.reshape(M, -1, *a.shape[1:]), data)

for sync, expected in {False: on_their_own, True: together}.items():
  tx = msam(RHO, ALPHA, axis_name='i', sync_ascent=sync)  # <-- the line that differs
  grads = jax.pmap(
    lambda params, data: step(tx, params, data), axis_name='i', in_axes=(None, 0)
  )(params, by_device)
  first = jax.tree.map(lambda g: g[0], grads)  # every device has them
  check(f'pmap, sync_ascent={sync}', first, expected)

# %% [markdown]
# ## `shard_map`
#
# Two lines differ here. Inside a checked `shard_map`, JAX *sums* the gradient of replicated
# parameters over all devices. Cast the parameters first, so that each device has the
# gradient of its own shard. (If you forget it, `msam` raises an error.)

# %%
for sync, expected in {False: on_their_own, True: together}.items():
  tx = msam(RHO, ALPHA, axis_name='i', sync_ascent=sync)  # <-- the line that differs

  def mapped(params, data):
    params = jax.lax.pcast(params, 'i', to='varying')  # <-- and this one
    return step(tx, params, data)

  grads = jax.jit(
    jax.shard_map(mapped, mesh=mesh, in_specs=(P(), P('i')), out_specs=P())
  )(params, data)
  check(f'shard_map, sync_ascent={sync}', grads, expected)

# %% [markdown]
# ## `jit` with sharded arrays
#
# In the step **no line differs**. The arrays are sharded over many devices, but the program
# computes the same as on one: the gradient of the whole batch and the norm of the whole
# gradient, whether the parameters are replicated (data-parallel) or sharded themselves
# (fully sharded). So all devices always share one perturbation.

# %%
put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
data_on_devices = put(data, P('i'))  # <-- the line that differs, outside the step
layouts = {
  'replicated': put(params, P()),
  'fully sharded': jax.tree.map(
    lambda w: put(w, P(*[None] * (w.ndim - 1), 'i')), params
  ),
}

for layout, params_on_devices in layouts.items():
  grads = jax.jit(lambda params, data: step(msam(RHO, ALPHA), params, data))(
    params_on_devices, data_on_devices
  )
  check(f'sharded jit, parameters {layout}', grads, together)

# %% [markdown]
# ## Many processes: a TPU pod slice, a cluster of GPU machines
#
# Every process runs the same program, with `jit` or `shard_map` as above. Three lines
# differ (not run here):
#
# ```python
# jax.distributed.initialize()                             # <-- 1: first of all
# mesh = Mesh(np.array(jax.devices()), ('i',))             # <-- 2: all, not those of one process
# data = jax.make_array_from_process_local_data(           # <-- 3: each loads its own rows
#   NamedSharding(mesh, P('i')), rows_of_this_process
# )
# ```
#
# ## m-sharpness without devices
#
# `value_and_grad(…, shards=m)` splits the batch of *one* device into $m$ shards, each with
# its own probe. So you choose $m$, not the machine: you can repeat on one device what was
# trained on eight, and the reverse.
#
# Row $i$ of the batch is in micro-batch $i$ mod $m$, so that a sharded batch stays in place.
# To compare with the loop above, we first put the rows in that order.


# %%
def dealt(data, devices, shards):
  """The rows in an order in which micro-batch k of a device is its k-th block."""

  def deal(a):
    blocks = np.reshape(a, (devices, shards, -1, *a.shape[1:]))
    return np.swapaxes(blocks, 1, 2).reshape(a.shape)

  return jax.tree.map(deal, data)


drop_in = value_and_grad(loss_fn, monge(ALPHA), RHO, shards=M)  # <-- this line differs
value, grads = jax.jit(drop_in)(params, dealt(data, 1, M))
check(f'one device, shards={M}', grads, on_their_own)

drop_in = value_and_grad(loss_fn, monge(ALPHA), RHO, axis_name='i', shards=2)
vary = lambda params: jax.lax.pcast(params, 'i', to='varying')
grads = jax.jit(
  jax.shard_map(
    lambda params, data: drop_in(vary(params), data)[1],
    mesh=Mesh(np.array(jax.devices()[:4]), ('i',)),
    in_specs=(P(), P('i')),
    out_specs=P(),
  )
)(params, dealt(data, 4, 2))
check('4 devices, shards=2', grads, on_their_own)

# %% [markdown]
# ## Which gradient is reduced when
#
# | | clean gradient, uphill | gradient at the probe | $m$ |
# |---|---|---|---|
# | `pmap`, `shard_map`, with `axis_name` | **not** reduced: each device's own | averaged over the axis | devices |
# | the same, with `sync_ascent=True` | averaged over the axis | averaged over the axis | 1 |
# | `jit` with sharded arrays | of the whole batch, reduced by XLA | of the whole batch, reduced by XLA | 1 |
# | several processes | as `jit` or `shard_map` above, over all devices of all processes | | |
# | `value_and_grad(…, shards=k)`, one device | each shard's own | averaged over the shards | $k$ |
# | the same, with `sync_ascent=True` | averaged over the shards | averaged over the shards | 1 |
# | `axis_name` and `shards=k` | each shard's own | averaged over shards, then devices | devices · $k$ |
#
# ## What $m$ does to ρ and α
#
# SAM divides by the norm of the gradient, so its radius is ρ for every $m$. The radius of
# Monge SAM is $\rho/\sqrt{1+\alpha^2 n^2}$, and on average the gradients of shards are longer
# than the gradient of the batch, since the norm of a mean is at most the mean of the norms.
# So **more shards make Monge SAM's perturbations shorter** at the same ρ and α. We train
# for two hundred steps on eight devices. In every step we measure, at the same parameters,
# the norms that other $m$ would have.

# %%
tx = optax.chain(msam(RHO, ALPHA, axis_name='i'), optax.sgd(0.5))


def train_step(params, state, data):
  w = vary(params)
  grad_fn = lambda w: jax.grad(loss_fn)(w, data)
  updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
  return optax.apply_updates(params, updates), state


mapped_step = jax.jit(
  jax.shard_map(
    train_step, mesh=mesh, in_specs=(P(), P(), P('i')), out_specs=(P(), P())
  )
)


@jax.jit
def shard_norms(params, data):
  """For m = 1, 2, 4, 8: the norms of the gradients of m shards."""
  grads = [
    jax.vmap(jax.grad(loss_fn), (None, 0))(
      params, jax.tree.map(lambda a: a.reshape(m, -1, *a.shape[1:]), data)
    )
    for m in SHARDS
  ]
  return [jax.vmap(optax.tree.norm)(g) for g in grads]


SHARDS = (1, 2, 4, 8)
w, state, norms = params, tx.init(params), []
for i in range(200):
  rows = np.random.default_rng(i).choice(1000, 64, replace=False)
  norms.append(jax.device_get(shard_norms(w, (x[rows], y[rows]))))
  w, state = mapped_step(w, state, (x[rows], y[rows]))
right = loss_fn(w, (x[1000:], y[1000:]))
norms = [np.array(n) for n in zip(*norms, strict=True)]  # [steps, m] for each m
stretch = [np.sqrt(1 + ALPHA**2 * n**2) for n in norms]

print(f'loss on other digits {right:.3f}; mean over {len(norms[0])} steps and shards:')
print(' m   ‖g‖   √(1+α²‖g‖²)   radius of Monge SAM   of SAM')
for m, n, s in zip(SHARDS, norms, stretch, strict=True):
  print(f'{m:2} {n.mean():6.2f} {s.mean():9.2f} {(RHO / s).mean():17.3f} {RHO:15.3f}')

# %%
BLUE, GREY = '#1b6ca8', '#6c757d'
fig, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout='constrained')
axes[0].plot(SHARDS, [s.mean() for s in stretch], 'o-', color=BLUE, label='Monge SAM')
axes[0].axhline(1, color=GREY, linestyle='--', label='SAM')
axes[0].set(
  title='mean of √(1+α²‖g‖²), which divides ρ',
  xlabel='number of shards m',
  xticks=SHARDS,
)
axes[0].legend()
smooth = lambda a: np.convolve(a, np.ones(10) / 10, mode='valid')
for m, s, width in zip(SHARDS, stretch, (1, 1.5, 2, 2.5), strict=True):
  axes[1].plot(
    smooth((RHO / s).mean(axis=1)),
    color=BLUE,
    alpha=0.25 + 0.25 * np.log2(m),
    lw=width,
    label=f'm = {m}',
  )
axes[1].axhline(RHO, color=GREY, linestyle='--', label='SAM, any m')
axes[1].set(title='radius used, mean over 10 steps', xlabel='step', ylim=(0, 1.1 * RHO))
axes[1].legend(ncols=2, fontsize='small')
plt.show()

# %% [markdown]
# If the number of devices changes, the same ρ and α give another method. Keep $m$ as it was
# with `shards=` or `sync_ascent=True`, or choose α again from the logged slope:
# `optax.tree.get(opt_state, 'slope')` is the mean over the shards, and at the slope $s$ the
# radius is $\rho\sqrt{1-(\alpha s)^2}$. This concerns Monge SAM only: SAM's perturbation has
# the same length for every $m$, but not the same direction.

# %% [markdown]
# ## What it costs
#
# We compiled the step of a transformer with 118 M parameters, fully sharded, with the TPU
# compiler for 16 and 256 v5e chips. With two copies of the gradient in the program, the
# step needs 4.2 times the temporary memory of an Adam step on 16 chips, and more than a
# chip has on 256. As one loop, `value_and_grad(..., compile_once=True)`, it needs 1.05 and
# 1.00 times as much. With replicated parameters and one perturbation per chip, each chip
# sends as much as in plain training; with a shared perturbation it sends twice as much. The
# tables are in the [results](../benchmarks/results/tpu_compile.md) of
# `python -m benchmarks.tpu_compile`, which needs no TPU.
