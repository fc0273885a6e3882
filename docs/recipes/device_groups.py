"""m-sharpness: one perturbation per group of devices.

When to use it: data-parallel training in `shard_map`, where each group of devices has
its own perturbation. One group of all devices is SAM of the whole batch; groups of one
device are the default of the SAM authors' code.

The mesh has two named axes, `group` and `device`. The gradient for the ascent is
averaged over `device`, and the gradient at the probe over both.

What to watch out for:

* Gradients of smaller groups are usually longer, so Monge SAM shortens their
  perturbation more.
* In a checked `shard_map` cast replicated parameters with `jax.lax.pcast` before
  gradients are taken. Otherwise JAX sums the gradients by itself, and this library
  raises an error.
* The two extremes need one mesh axis only. `axis_name='i'` gives each device its own
  perturbation; `axis_name='i', sync_ascent=True` gives all devices the same.
* `drop_in_step` is shorter; `chain_step` keeps the slope and the radius in the state.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

from msam_optax import monge
from msam_optax import msam
from msam_optax import value_and_grad

RHO = 0.1
optimizer = optax.sgd(0.02, momentum=0.9)
tx = optax.chain(msam(rho=RHO, axis_name='group'), optimizer)


def loss_fn(params, batch):
  x, y = batch
  hidden = jnp.tanh(x @ params['w1'] + params['b1'])
  return jnp.mean((hidden @ params['w2'] + params['b2'] - y) ** 2)


def drop_in_step(params, opt_state, batch):
  # Copies that may differ between devices: each takes the gradient of its own rows.
  own_params = jax.lax.pcast(params, ('group', 'device'), to='varying')
  value_and_grad_fn = value_and_grad(
    loss_fn, monge(alpha=1.0), rho=RHO, axis_name='device', sync_ascent=True
  )
  loss, grads = value_and_grad_fn(own_params, batch)
  # So far both gradients are means over the group; now the second is one over all.
  grads = jax.lax.pmean(grads, 'group')
  updates, opt_state = optimizer.update(grads, opt_state, params)
  loss = jax.lax.pmean(loss, ('group', 'device'))
  return optax.apply_updates(params, updates), opt_state, loss


def chain_step(params, opt_state, batch):
  group_params = jax.lax.pcast(params, 'group', to='varying')

  def group_value_and_grad(params):
    """The gradient of the group's rows."""
    own_params = jax.lax.pcast(params, 'device', to='varying')
    value, grads = jax.value_and_grad(loss_fn)(own_params, batch)
    return value, jax.lax.pmean(grads, 'device')

  loss, grads = group_value_and_grad(group_params)
  grad_fn = lambda params: group_value_and_grad(params)[1]
  updates, opt_state = tx.update(grads, opt_state, group_params, grad_fn=grad_fn)
  loss = jax.lax.pmean(loss, ('group', 'device'))
  return optax.apply_updates(params, updates), opt_state, loss


def make_train_step(step, mesh):
  rows = P(('group', 'device'))
  return jax.jit(
    jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), rows), out_specs=P())
  )


def make_mesh(groups):
  """The devices in groups of neighbours."""
  devices = np.array(jax.devices()).reshape(groups, -1)
  return jax.sharding.Mesh(devices, ('group', 'device'))


def init():
  rng = np.random.default_rng(0)
  draw = lambda *shape: (0.5 * rng.normal(size=shape)).astype(np.float32)
  return {'w1': draw(3, 16), 'b1': draw(16), 'w2': draw(16, 2), 'b2': draw(2)}


def batches(steps, size=32):
  rng = np.random.default_rng(1)
  for _ in range(steps):
    x = rng.normal(size=(size, 3)).astype(np.float32)
    yield x, np.stack([np.sin(x[:, 0]), x[:, 1] - x[:, 2]], axis=1)


def train(groups, step=drop_in_step, steps=20):
  train_step = make_train_step(step, make_mesh(groups))
  params = init()
  opt_state, losses = (tx if step is chain_step else optimizer).init(params), []
  for batch in batches(steps):
    params, opt_state, loss = train_step(params, opt_state, batch)
    losses.append(float(loss))
  return params, losses


if __name__ == '__main__':
  jax.config.update('jax_num_cpu_devices', 8)
  for groups in (1, 4, 8):
    print(f'{groups} groups:', *(f'{loss:.3f}' for loss in train(groups)[1][::5]))
