"""Porting from google-research/sam, the SAM authors' Flax code.

When to use it: you have results of that code, and want the same method on today's Flax.

| google-research/sam (`flax_training.py`) | here |
|---|---|
| `pmap(train_step, axis_name='batch')` | `shard_map` over an axis `batch` |
| `get_sam_gradient(model, rho)` | `value_and_grad(loss, euclidean(), rho=…)` |
| `dual_vector(grad)` | `euclidean()`; Monge SAM: `monge(alpha=1.0)` |
| `--sam_rho` | `rho=` |
| `pmean(grad, 'batch')` after the second pass | `axis_name='batch'` |
| `--sync_perturbations` | `sync_ascent=True` |
| `--inner_group_size` | two named axes: see `device_groups.py` |
| `inner_state`, BatchNorm of the clean pass | `aux`, which is that of the clean pass |
| `clip_by_global_norm(grad)` | `optax.clip_by_global_norm`, first in the optimizer |
| `l2_reg` inside the loss | the same: it takes part in the ascent |
| `optim.Momentum(…, nesterov=True)` | `optax.sgd(…, momentum=0.9, nesterov=True)` |

What to watch out for:

* Each device has its own perturbation by default, there and here. So ρ belongs to a
  number of rows per device: on other hardware keep that number, or use groups.
* `optax.add_decayed_weights` differs from `l2_reg`: it takes no part in the ascent.
* Their loop logs the loss of the pass at the probe. Here it is that of the clean pass.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

from msam_optax import euclidean
from msam_optax import value_and_grad

SAM_RHO, SYNC_PERTURBATIONS, L2_REG = 0.1, False, 0.001
optimizer = optax.chain(
  optax.clip_by_global_norm(5.0), optax.sgd(0.02, momentum=0.9, nesterov=True)
)


class Net(nn.Module):
  """Dense, BatchNorm, Dense."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(16, use_bias=False)(x)
    x = nn.BatchNorm(use_running_average=False, momentum=0.9)(x)
    return nn.Dense(2)(nn.tanh(x))


def forward_and_loss(params, batch_stats, x, y):
  out, new = Net().apply(
    {'params': params, 'batch_stats': batch_stats}, x, mutable=['batch_stats']
  )
  weight_l2 = sum(jnp.sum(w**2) for w in jax.tree.leaves(params))
  return jnp.mean((out - y) ** 2) + 0.5 * L2_REG * weight_l2, new['batch_stats']


def train_step(params, batch_stats, opt_state, x, y):
  """On each device with its own rows, as under `pmap`."""
  # Copies that may differ between devices: each takes the gradient of its own rows.
  own_params, own_stats = jax.lax.pcast((params, batch_stats), 'batch', to='varying')
  value_and_grad_fn = value_and_grad(
    forward_and_loss,
    euclidean(),
    rho=SAM_RHO,
    has_aux=True,
    axis_name='batch',
    sync_ascent=SYNC_PERTURBATIONS,
  )
  (loss, own_stats), grads = value_and_grad_fn(own_params, own_stats, x, y)
  updates, opt_state = optimizer.update(grads, opt_state, params)
  params = optax.apply_updates(params, updates)
  # Theirs are averaged before evaluation. Averaging in every step gives the same, since
  # running means are linear in the statistics of the batches.
  batch_stats, loss = jax.lax.pmean((own_stats, loss), 'batch')
  return params, batch_stats, opt_state, loss


def make_train_step():
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ('batch',))
  in_specs = (P(), P(), P(), P('batch'), P('batch'))
  return jax.jit(jax.shard_map(train_step, mesh=mesh, in_specs=in_specs, out_specs=P()))


def init():
  variables = Net().init(jax.random.key(0), np.zeros((2, 3), np.float32))
  return variables['params'], variables['batch_stats']


def batches(steps, size=64):
  rng = np.random.default_rng(0)
  for _ in range(steps):
    x = rng.normal(1.0, 2.0, size=(size, 3)).astype(np.float32)
    yield x, np.stack([np.sin(x[:, 0]), x[:, 1] - x[:, 2]], axis=1)


def train(steps=20):
  step = make_train_step()
  params, batch_stats = init()
  opt_state, losses = optimizer.init(params), []
  for x, y in batches(steps):
    params, batch_stats, opt_state, loss = step(params, batch_stats, opt_state, x, y)
    losses.append(float(loss))
  return params, batch_stats, losses


if __name__ == '__main__':
  jax.config.update('jax_num_cpu_devices', 8)
  print('loss:', *(f'{loss:.3f}' for loss in train()[-1][::5]))
