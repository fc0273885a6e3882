"""The training steps that are compiled for TPUs: methods, layouts, and remedies."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

from benchmarks.common import steps as cost_steps
from benchmarks.tpu_compile.model import Abstract
from benchmarks.tpu_compile.model import abstract
from benchmarks.tpu_compile.model import make_loss
from benchmarks.tpu_compile.model import Sizes
import msam_optax

AXIS = 'chips'
GROUPS = 'groups'
DATA_PARALLEL = 'data-parallel'
FULLY_SHARDED = 'fully sharded'
GROUPED = 'fully sharded in groups'
ONCE = 'drop-in, compiled once'
OWN = 'drop-in, own ascent (m-sharpness)'
OWN_ONCE = 'drop-in, own ascent, compiled once'
SHARDS = 2  # Micro-batches.
SHARED_SHARDS = f'drop-in, {SHARDS} micro-batches, shared ascent'
SHARED_SHARDS_ONCE = f'{SHARED_SHARDS}, compiled once'
OWN_SHARDS = f'drop-in, {SHARDS} micro-batches, own ascents'
CHIP_SHARDS = f'drop-in, {SHARDS} micro-batches a chip, own ascents'


class Step(NamedTuple):
  """A training step for a mesh, ready to be lowered.

  Attributes:
    run: the jitted function; parameters and optimizer state are donated.
    args: its arguments, as shapes with shardings.
  """

  run: Any
  args: tuple[Any, ...]


def adam(objective, mesh):
  """One gradient: the reference of every ratio."""
  del mesh
  return cost_steps.adam(objective)


def own_ascent(objective, mesh, **options):
  """Each chip, or group, goes uphill on its own; gradients at probes are averaged."""
  axis = mesh.axis_names[0]
  value_and_grad_fn = msam_optax.value_and_grad(
    objective, rho=cost_steps.RHO, axis_name=axis, **options
  )

  def inner(params, batch):
    value, grads = value_and_grad_fn(_varying(params, axis), batch)
    return jax.lax.pmean(value, axis), grads

  mapped = jax.shard_map(
    inner, mesh=mesh, in_specs=(P(), P(axis)), out_specs=P(), axis_names={axis}
  )
  return cost_steps.step(optax.adam(cost_steps.RATE), mapped)


def in_microbatches(objective, mesh, **options):
  """The chips share each micro-batch, under `jit`."""
  del mesh
  value_and_grad_fn = msam_optax.value_and_grad(
    objective, rho=cost_steps.RHO, shards=SHARDS, **options
  )
  return cost_steps.step(optax.adam(cost_steps.RATE), value_and_grad_fn)


METHODS: dict[str, Callable[..., cost_steps.Step]] = {
  'adam': adam,
  cost_steps.OPAQUE: lambda f, mesh: cost_steps.contrib_sam_opaque(f),
  cost_steps.CHAIN: lambda f, mesh: cost_steps.chain_msam(f),
  cost_steps.BOTH_PASSES: lambda f, mesh: cost_steps.chain_both_passes(f),
  cost_steps.DROP_IN: lambda f, mesh: cost_steps.drop_in(f),
  ONCE: lambda f, mesh: cost_steps.drop_in_compile_once(f),
  OWN: own_ascent,
  OWN_ONCE: lambda f, mesh: own_ascent(f, mesh, compile_once=True),
  SHARED_SHARDS: lambda f, mesh: in_microbatches(f, mesh, sync_ascent=True),
  SHARED_SHARDS_ONCE: lambda f, mesh: in_microbatches(
    f, mesh, sync_ascent=True, compile_once=True
  ),
  OWN_SHARDS: in_microbatches,
  CHIP_SHARDS: lambda f, mesh: own_ascent(f, mesh, shards=SHARDS),
}
# One gradient per step.
ONE_GRADIENT: dict[str, Callable[..., cost_steps.Step]] = {
  'momentum_sam(adam)': lambda f, mesh: cost_steps.one_gradient(
    f, msam_optax.momentum_sam(optax.adam(cost_steps.RATE))
  ),
  'lagged(adam)': lambda f, mesh: cost_steps.one_gradient(
    f, msam_optax.lagged(optax.adam(cost_steps.RATE))
  ),
}
# A probe of one's own needs all parameters on the chip, or in its group.
OWN_ASCENTS = (OWN, OWN_ONCE)
# Layouts in which micro-batches are compiled.
MICROBATCHES = {
  SHARED_SHARDS: (DATA_PARALLEL,),
  SHARED_SHARDS_ONCE: (DATA_PARALLEL, FULLY_SHARDED),
  OWN_SHARDS: (DATA_PARALLEL,),
  CHIP_SHARDS: (DATA_PARALLEL,),
}


def _constrained(model, mesh):
  """Parameters, and those of the probe, constrained to their own shardings."""
  loss = make_loss(model)
  placed = jax.tree.map(lambda w: _sharding(mesh, w), model.params)
  return lambda params, tokens: loss(
    jax.lax.with_sharding_constraint(params, placed), tokens
  )


def _barrier(model, mesh):
  """Parameters that the compiler may not look behind."""
  del mesh
  loss = make_loss(model)
  return lambda params, tokens: loss(jax.lax.optimization_barrier(params), tokens)


def _activations(model, mesh):
  """A model that shards its activations: the batch over the chips."""
  placed = NamedSharding(mesh, P(AXIS))
  constrain = lambda x: jax.lax.with_sharding_constraint(x, placed)
  return make_loss(model, constrain=constrain)


def _recomputed(model, mesh):
  """Blocks that are recomputed in the backward pass."""
  del mesh
  return make_loss(model, remat=True)


# What else may be done, to the parameters or to the model.
REMEDIES: dict[str, Callable[[Abstract, Mesh], Callable[..., jax.Array]]] = {
  'parameters constrained': _constrained,
  'optimization barrier': _barrier,
  'activations constrained by the model': _activations,
  'blocks recomputed (jax.checkpoint)': _recomputed,
}
# These change the plain step as well.
CHANGE_THE_MODEL = (
  'activations constrained by the model',
  'blocks recomputed (jax.checkpoint)',
)


def make_step(
  method: str,
  layout: str,
  mesh: Mesh,
  sizes: Sizes,
  *,
  remedy: str = '',
  donate: bool = True,
) -> Step:
  """A method's step with all arrays laid out on a mesh.

  Args:
    method: a key of ``METHODS`` or ``ONE_GRADIENT``.
    layout: ``DATA_PARALLEL``, ``FULLY_SHARDED``, or ``GROUPED``: the parameters over
      the chips of a group, the same in each. The batch is sharded over all chips.
    mesh: of the axis ``AXIS``, for groups of ``GROUPS`` and ``AXIS``; of described, not
      present, devices.
    sizes: of model and batch.
    remedy: a key of ``REMEDIES``, or nothing.
    donate: whether parameters and state may be overwritten.

  Returns:
    The step; ``step.run.lower(*step.args).compile()`` compiles it.
  """
  model = abstract(sizes)
  loss = REMEDIES[remedy](model, mesh) if remedy else make_loss(model)
  step = (METHODS | ONE_GRADIENT)[method](loss, mesh)
  carry = (model.params, jax.eval_shape(step.tx.init, model.params))
  spread = layout != DATA_PARALLEL
  carry = jax.tree.map(lambda x: _place(x, _sharding(mesh, x, spread)), carry)
  tokens = (mesh.size * sizes.batch, sizes.length + 1)
  placed = NamedSharding(mesh, P(mesh.axis_names))
  batch = _place(jax.ShapeDtypeStruct(tokens, jnp.int32), placed)
  out = jax.tree.map(lambda x: x.sharding, carry), NamedSharding(mesh, P())
  run = jax.jit(step.run, donate_argnums=(0,) if donate else (), out_shardings=out)
  return Step(run, (carry, batch))


def _sharding(mesh, x, spread=True):
  """Over the longest axis, if it is to be spread and can be."""
  spec = [None] * x.ndim
  if spread and x.ndim and max(x.shape) % mesh.shape[AXIS] == 0:
    spec[int(np.argmax(x.shape))] = AXIS
  return NamedSharding(mesh, P(*spec))


def _place(x, sharding):
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _varying(tree, axis):
  if hasattr(jax.lax, 'pcast'):
    return jax.lax.pcast(tree, axis, to='varying')
  return jax.lax.pvary(tree, axis)  # pyright: ignore
