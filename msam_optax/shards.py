"""Means of gradients over parts of a batch: micro-batches here, and other devices."""

from collections.abc import Callable
from collections.abc import Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from msam_optax.checks import check_varying
from msam_optax.checks import varying_axes
from msam_optax.masks import at_path
from msam_optax.numerics import widen

ValueAndGrad = Callable[..., tuple[Any, Any]]


def mean_over_devices(grads: Any, axis_name: Any) -> Any:
  """The mean of gradients over a mapped axis, if there is one."""
  if axis_name is None:
    return grads
  check_varying(grads, axis_name)
  return jax.lax.pmean(grads, axis_name)


def over_shards(
  value_and_grad_fn: ValueAndGrad,
  *,
  shards: int | None,
  argnums: int | Sequence[int],
  has_aux: bool,
  vectorize: bool,
) -> ValueAndGrad:
  """The same function, with its values and gradients averaged over micro-batches.

  Args:
    value_and_grad_fn: ``(*args, **kwargs) -> (value, grads)``, or
      ``((value, aux), grads)``.
    shards: how many micro-batches; None leaves the function as it is.
    argnums: which positional arguments are parameters, and are not split.
    has_aux: whether there is an ``aux``; it gets a leading axis ``[shards, ...]``.
    vectorize: whether to take all micro-batches at once (``vmap``), not one after the
      other (``scan``).

  Returns:
    A function with the same arguments; its gradients are float32 or wider.
  """
  if shards is None:
    return value_and_grad_fn
  positions = argnums if isinstance(argnums, Sequence) else (argnums,)

  def averaged(*args, **kwargs):
    params_at = {i % len(args) for i in positions}
    data = {i: x for i, x in enumerate(args) if i not in params_at}
    parts, join = split((data, kwargs), shards)

    def one(part):
      data, kwargs = join(part)
      whole = [x if i in params_at else data[i] for i, x in enumerate(args)]
      return value_and_grad_fn(*whole, **kwargs)

    if vectorize:
      outputs, grads = jax.vmap(one)(parts)
      grads = jax.tree.map(lambda g: jnp.mean(widen(g), axis=0), grads)
    else:
      params = [args[i] for i in positions]
      like = tuple(params) if isinstance(argnums, Sequence) else params[0]
      outputs, grads = _accumulate(one, parts, shards, like)
    if has_aux:
      return (jnp.mean(outputs[0]), outputs[1]), grads
    return jnp.mean(outputs), grads

  return averaged


def split(tree: Any, shards: int) -> tuple[list[jax.Array], Callable[[Any], Any]]:
  """Cuts the leading axis of every array of a tree into ``shards`` equal parts.

  Scalars (typed random keys among them) and what is no array are left whole.

  Args:
    tree: pytree; all its arrays with axes have the same, divisible, first length.
    shards: how many parts, >= 1.

  Returns:
    The arrays as ``[shards, length / shards, ...]``, and a function that puts one part
    of each back into the tree.

  Raises:
    ValueError: if there is nothing to split, or a length does not fit.
  """
  leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
  rows = [i for i, (_, x) in enumerate(leaves) if getattr(x, 'ndim', 0) > 0]
  advice = (
    ' `shards` splits every array after the parameters along its first axis. What is no'
    ' data, as class weights or a raw random key, belongs into the loss function'
    ' (`functools.partial`, a closure) or into a typed key, `jax.random.key`.'
  )
  if not rows:
    raise ValueError('No argument after the parameters is an array.' + advice)
  length = leaves[rows[0]][1].shape[0]
  for path, x in (leaves[i] for i in rows):
    if x.shape[0] != length or length % shards:
      where = at_path(path[1:])  # What comes before is positional, or keyword.
      raise ValueError(
        f'The data {where} has shape {x.shape}: its first axis cannot be split with'
        f' the others, of length {length}, into {shards} equal shards.' + advice
      )
  parts = [leaves[i][1] for i in rows]
  parts = [_cut(x, shards) for x in parts]

  def join(part):
    new = [x for _, x in leaves]
    for i, x in zip(rows, part, strict=True):
      new[i] = x
    return jax.tree.unflatten(structure, new)

  return parts, join


def zeros_like(params: Any, summed_over: Any = ()) -> Any:
  """A gradient of zero, with the type that the one of a loss has.

  In ``shard_map`` it varies as the parameters do; where shardings are part of the
  types it has theirs.

  Args:
    params: pytree of arrays.
    summed_over: mapped axis, or axes, over which the gradient is averaged.

  Returns:
    A pytree like ``params``.
  """
  names = summed_over if isinstance(summed_over, tuple) else (summed_over,)

  def zeros(w):
    varying = varying_axes(w)
    summed = not varying.isdisjoint(names)
    zero = jnp.zeros(w.shape, w.dtype) if summed else jnp.zeros_like(w)
    lies = explicit_sharding(w)
    if lies is not None:
      # What a loop closes over, and is no tracer, would lose it.
      zero = jax.sharding.reshard(zero, lies)
    return vary(zero, varying - set(names)) if summed else zero

  return jax.tree.map(zeros, params)


def vary(x: jax.Array, axes: frozenset[str]) -> jax.Array:
  """``x`` as an array that varies along manual axes."""
  if not axes:
    return x
  if hasattr(jax.lax, 'pcast'):
    return jax.lax.pcast(x, tuple(sorted(axes)), to='varying')
  # The name that it has in older versions of JAX.
  return jax.lax.pvary(x, tuple(sorted(axes)))  # pyright: ignore


def explicit_sharding(x: Any) -> NamedSharding | None:
  """How an array lies over devices, where JAX has that as a part of its type."""
  lies = jax.typeof(x).sharding
  return lies if any(getattr(lies, 'spec', ())) else None


def _cut(x, shards):
  """``[n, ...]`` as ``[shards, n / shards, ...]``; each part lies as the whole did."""
  rows = x.shape[0] // shards
  shape = (shards, rows, *x.shape[1:])
  lies = explicit_sharding(x)
  if lies is None:
    return jnp.reshape(x, shape)
  names = lies.spec[0] if isinstance(lies.spec[0], tuple) else (lies.spec[0],)
  devices = math.prod(lies.mesh.shape[name] for name in names if name is not None)
  if rows % devices:
    raise ValueError(
      f'The {x.shape[0]} rows of a batch that lies over {devices} devices cannot be cut'
      f' into {shards} shards that do, too: the rows of a shard, here {rows}, must be a'
      f' multiple of {devices}.'
    )
  lies = lies.update(spec=PartitionSpec(None, *lies.spec))
  return jax.lax.reshape(x, shape, out_sharding=lies)


def _accumulate(one, parts, shards, params):
  """Outputs, stacked, and the mean gradient of ``one`` over parts, one by one."""

  def add(sums, part):
    output, grads = one(part)
    return jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, grads), output

  zero = jax.tree.map(widen, zeros_like(params))
  sums, outputs = jax.lax.scan(add, zero, parts)
  return outputs, jax.tree.map(lambda s: s / shards, sums)
