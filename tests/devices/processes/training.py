"""One process of several that train together, as a program of its own.

    python -m tests.devices.processes.training RANK COUNT PORT DIRECTORY ACTION

once for each rank. ``train`` takes all steps and ``resume`` the second half of them,
from what ``half`` has saved; they write the end to ``ACTION.npz``. ``half`` then waits
to be killed. With ``meet`` they only join each other, and with ``fail`` the last does
not.
"""

from collections.abc import Callable
import itertools
import os
import pathlib
import signal
import sys
import threading
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import orbax.checkpoint as ocp

from tests.devices.processes.problem import batch
from tests.devices.processes.problem import init
from tests.devices.processes.problem import LEARNING_RATE
from tests.devices.processes.problem import loss
from tests.devices.processes.problem import MOMENTUM
from tests.devices.processes.problem import rho_at
from tests.devices.processes.problem import SHARDS
from tests.devices.processes.problem import STEPS
from tests.methods import DEFAULT
from tests.methods import drop_in
from tests.methods import OTHER_KINDS
from tests.methods import transformation

HALF = STEPS // 2

INTERFACES = ('chain', 'drop_in')

# How the params lie on the devices, and what a mapped step is told about its axis.
SETUPS: dict[str, tuple[bool, dict[str, Any] | None]] = {
  'data_parallel': (False, None),
  'fully_sharded': (True, None),
  'mapped': (False, {'axis_name': 'i'}),
  'mapped_synced': (False, {'axis_name': 'i', 'sync_ascent': True}),
}
# What takes time here is compiling, not running.
COMPILE_FAST = {'xla_backend_optimization_level': 0}

# The default method in all ways, and the others where they can differ from it: whether
# norms are those of the whole, and what is averaged.
RUNS = [
  *itertools.product(DEFAULT, INTERFACES, SETUPS),
  *itertools.product(OTHER_KINDS, ('chain',), ('fully_sharded', 'mapped')),
  *itertools.product(OTHER_KINDS, ('drop_in',), ('mapped_synced',)),
]


def make_step(method: str, interface: str, mapped: dict[str, Any] | None) -> Any:
  """The optimizer, and ``(params, state, step, data) -> (params, state)``.

  Args:
    method: a key of ``METHODS``.
    interface: one of ``INTERFACES``.
    mapped: the arguments for a step under ``shard_map``, None under ``jit`` alone.
  """
  tx = optax.sgd(LEARNING_RATE, MOMENTUM)
  options = mapped or {}
  if interface == 'chain':
    tx = optax.chain(transformation(method, rho_at(method), **options), tx)

  def train_step(params, state, step, data):
    # Its gradient would be the sum over the axis already, were it not cast.
    w = params if mapped is None else _vary(params)
    if interface == 'chain':
      grad_fn = lambda w: jax.grad(loss)(w, data)
      updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
    else:
      value_and_grad_fn = drop_in(method, loss, rho_at(method)(step), **options)
      updates, state = tx.update(value_and_grad_fn(w, data)[1], state, w)
    return optax.apply_updates(params, updates), state

  return tx, train_step


def make_run(
  mesh: Any, method: str, interface: str, setup: str
) -> tuple[Any, Callable]:
  """Params and state before the first step, on all devices, and the compiled step."""
  sharded, mapped = SETUPS[setup]
  tx, train_step = make_step(method, interface, mapped)
  if mapped is not None:
    train_step = jax.shard_map(
      train_step, mesh=mesh, in_specs=(P(), P(), P(), P('i')), out_specs=P()
    )

  def place(x):
    x = np.asarray(x)
    spec = P(*(None,) * (x.ndim - 1), 'i') if sharded and x.ndim else P()
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  carry = jax.tree.map(place, (init(), tx.init(init())))
  shardings = jax.tree.map(lambda x: x.sharding, carry)
  return carry, jax.jit(
    train_step, out_shardings=shardings, compiler_options=COMPILE_FAST
  )


def place_batch(mesh: Any, step: int) -> Any:
  """The batch on all devices; each process makes its own rows and no others."""
  rank, count = jax.process_index(), jax.process_count()
  sharding = NamedSharding(mesh, P('i'))
  return tuple(
    jax.make_array_from_process_local_data(sharding, np.split(a, count)[rank])
    for a in batch(step)
  )


def write(path: pathlib.Path, carries: Any, mesh: Any) -> None:
  """All leaves by their paths, from the first process."""
  gather = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))
  leaves = jax.tree_util.tree_leaves_with_path(gather(carries))
  if jax.process_index() == 0:
    names = (jax.tree_util.keystr(p, simple=True, separator='/') for p, _ in leaves)
    np.savez(path, **dict(zip(names, (np.asarray(x) for _, x in leaves), strict=True)))


def abstract(tree: Any) -> Any:
  """Shapes, dtypes and shardings, into which a checkpoint is read."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )


def run(rank: int, directory: pathlib.Path, action: str) -> None:
  """What a process does once it has joined the others."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ('i',))
  checkpoint = directory / 'checkpoint'
  runs = {'-'.join(names): make_run(mesh, *names) for names in RUNS}
  carries = {name: carry for name, (carry, _) in runs.items()}
  if action == 'resume':
    with ocp.StandardCheckpointer() as checkpointer:
      carries = checkpointer.restore(checkpoint, abstract(carries))
  first = HALF if action == 'resume' else 0
  for step in range(first, HALF if action == 'half' else STEPS):
    data = place_batch(mesh, step)
    for name, (_, train_step) in runs.items():
      carry = train_step(*carries[name], np.int32(step), data)
      # Two steps at once could wait for each other: each process has its own order.
      carries[name] = jax.block_until_ready(carry)
  if action == 'half':
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(checkpoint, carries)
    (directory / f'saved-{rank}').touch()
    signal.pause()
  write(directory / f'{action}.npz', carries, mesh)


def end_with_parent() -> None:
  """Waits for the end of the input, which comes when the parent has gone."""
  sys.stdin.read()
  os._exit(1)


def main(rank: int, count: int, port: int, directory: str, action: str) -> None:
  if action == 'fail' and rank == count - 1:
    raise RuntimeError('This process was told to fail.')
  threading.Thread(target=end_with_parent, daemon=True).start()
  jax.config.update('jax_num_cpu_devices', SHARDS // count)
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(
    f'127.0.0.1:{port}', count, rank, coordinator_bind_address=f'127.0.0.1:{port}'
  )
  if action != 'meet':
    run(rank, pathlib.Path(directory), action)
  jax.distributed.shutdown()


def _vary(params):
  if hasattr(jax.lax, 'pcast'):
    return jax.lax.pcast(params, 'i', to='varying')
  return jax.lax.pvary(params, 'i')


if __name__ == '__main__':
  main(*map(int, sys.argv[1:4]), *sys.argv[4:])
