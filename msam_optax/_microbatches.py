"""Micro-batches: a batch cut into equal ones, and the means over them."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from msam_optax import _devices
from msam_optax import _losses
from msam_optax import _masks
from msam_optax import _numerics


def over_microbatches(
  one_pass: _losses.Pass,
  *,
  shards: int | None,
  gradients: int = 1,
  argnums: int | Sequence[int],
  data_argnums: int | Sequence[int] | None,
  data_argnames: str | Sequence[str],
  vectorize: bool,
) -> _losses.Pass:
  """The same pass, with its values and gradients averaged over micro-batches.

  Args:
    one_pass: ``(*args, **kwargs) -> (Output, grads)``, the latter a tuple.
    shards: how many micro-batches; None leaves the function as it is.
    gradients: how many gradients are in the tuple.
    argnums: which positional arguments are parameters, and are not split.
    data_argnums: which are split; by default the one that there is.
    data_argnames: which keyword arguments are.
    vectorize: whether to compute all micro-batches at once (``vmap``), not one after
      the other (``scan``).

  Returns:
    A function with the same arguments; its gradients are float32 or wider, total,
    weight and marks are sums, and an ``aux`` gets a leading axis ``[shards, ...]``.
  """
  if shards is None:
    return one_pass

  def averaged(*args, **kwargs):
    params_at = positions('argnums', argnums, args, kwargs)
    at, named = _data(args, kwargs, params_at, data_argnums, data_argnames)
    data = {i: args[i] for i in at}, {name: kwargs[name] for name in named}
    cut, join = split(data, shards)

    def one(rows):
      data, named = join(rows)
      whole = [data.get(i, x) for i, x in enumerate(args)]
      output, grads = one_pass(*whole, **{**kwargs, **named})
      if output.weight is None:
        return output, grads
      return output, _numerics.multiply(_numerics.divisor(output.weight), grads)

    if vectorize:
      outputs, grads = jax.vmap(one, in_axes=1)(cut)
      sums = jax.tree.map(lambda g: jnp.sum(_numerics.widen(g), axis=0), grads)
    else:
      params = [args[i] for i in params_at]
      like = tuple(params) if isinstance(argnums, Sequence) else params[0]
      outputs, sums = _accumulate(one, cut, shards, (like,) * gradients)
    if outputs.weight is None:
      value, weight = jnp.mean(outputs.value), None
    else:
      value, weight = jnp.sum(outputs.value), jnp.sum(outputs.weight)
    grads = _numerics.divide(
      sums, shards if weight is None else _numerics.divisor(weight)
    )
    marks = jax.tree.map(functools.partial(jnp.sum, axis=0), outputs.marks)
    return _losses.Output(value, weight, outputs.aux, marks), grads

  return averaged


def on_part(
  one_pass: _losses.Pass,
  *,
  parts: int,
  argnums: int | Sequence[int],
  data_argnums: int | Sequence[int] | None,
  data_argnames: str | Sequence[str],
) -> _losses.Pass:
  """The same pass on a part of the batch: the rows 0, ``parts``, ``2 parts`` ….

  Args:
    one_pass: ``(*args, **kwargs) -> (Output, grads)``.
    parts: the part is one of so many equal ones.
    argnums: see :func:`over_microbatches`, also for the last two.
    data_argnums: which positional arguments hold the batch.
    data_argnames: which keyword arguments do.

  Returns:
    A function with the same arguments.
  """

  def part(*args, **kwargs):
    params_at = positions('argnums', argnums, args, kwargs)
    at, named = _data(args, kwargs, params_at, data_argnums, data_argnames)
    data = {i: args[i] for i in at}, {name: kwargs[name] for name in named}
    cut, join = split(data, parts, name='ascent_fraction')
    data, named = join([x[:, 0] for x in cut])
    whole = [data.get(i, x) for i, x in enumerate(args)]
    return one_pass(*whole, **{**kwargs, **named})

  return part


def positions(
  name: str, argnums: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[int]:
  """Positions, counted from the front, of arguments in a call.

  Args:
    name: the argument that gives them, for the message.
    argnums: a position, or a sequence of them; negative ones count from the back.
    args: the positional arguments of the call.
    kwargs: its keyword arguments.

  Returns:
    The positions in the given order.

  Raises:
    ValueError: if there is no such argument, or one is named twice.
  """
  several = isinstance(argnums, Sequence) and not isinstance(argnums, str)
  given: tuple[Any, ...] = tuple(argnums) if several else (argnums,)
  if not given and name == 'argnums':
    raise ValueError('`argnums` is empty: give the position of the parameters.')
  for i in given:
    if not isinstance(i, (int, np.integer)) or isinstance(i, bool):
      raise TypeError(
        f'`{name}` must be the position of an argument, a whole number, or several, got'
        f' {argnums!r}.'
      )
    if not -len(args) <= i < len(args):
      by_name = ''
      if kwargs:
        advice = (
          'give the parameters by position'
          if name == 'argnums'
          else 'name in `data_argnames` what is given by keyword'
        )
        by_name = f', and {sorted(kwargs)} by keyword: {advice}'
      raise ValueError(
        f'`{name}` is {argnums}, but this call has {len(args)} positional'
        f' argument{"s" if len(args) != 1 else ""}{by_name}.'
      )
  found = [i % len(args) for i in given]
  if len(set(found)) < len(found):
    raise ValueError(f'`{name}` is {argnums}: it names an argument twice.')
  return found


def split(
  tree: Any, shards: int, name: str = 'shards'
) -> tuple[list[jax.Array], Callable[[Any], Any]]:
  """Cuts the leading axis of every array of a tree into ``shards`` micro-batches.

  Scalars (typed random keys among them) and what is no array are left whole.

  Args:
    tree: pytree; all its arrays with axes have the same, divisible, first length.
    shards: how many micro-batches, >= 1.
    name: the argument that says so, for the message.

  Returns:
    The arrays as ``[length / shards, shards, ...]``, in which row ``i`` of the batch is
    in micro-batch ``i % shards``; and a function that puts one micro-batch of each back
    into the tree.

  Raises:
    ValueError: if there is nothing to split, or a length does not fit.
  """
  leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
  rows = [i for i, (_, x) in enumerate(leaves) if _has_axes(x)]
  if not rows:
    raise ValueError(
      f'`{name}` cuts the batch, but no argument that may hold it has an array with'
      ' axes.'
    )
  length = leaves[rows[0]][1].shape[0]
  for path, x in (leaves[i] for i in rows):
    if x.shape[0] != length or length % shards:
      where = _masks.at_path(path[1:])  # What comes before is positional, or keyword.
      raise ValueError(
        f'The data {where} has shape {x.shape}: its first axis cannot be split with'
        f' the others, of length {length}, into {shards} equal micro-batches. `{name}`'
        ' cuts every array in the arguments that hold the batch. What is no data, as'
        ' class weights, model state or a raw random key (typed ones, `jax.random.key`,'
        ' are scalars), belongs in another argument: name those of the batch in'
        ' `data_argnums` and `data_argnames`.'
      )
  arrays = [_cut(leaves[i][1], shards) for i in rows]

  def join(microbatch):
    new = [x for _, x in leaves]
    for i, x in zip(rows, microbatch, strict=True):
      new[i] = x
    return jax.tree.unflatten(structure, new)

  return arrays, join


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
    varying = _devices.varying_axes(w)
    summed = not varying.isdisjoint(names)
    zero = jnp.zeros(w.shape, w.dtype) if summed else jnp.zeros_like(w)
    sharding = _devices.explicit_sharding(w)
    if sharding is not None:
      # What a loop closes over, and is no tracer, would lose it.
      zero = jax.sharding.reshard(zero, sharding)
    return _devices.as_varying(zero, varying - set(names)) if summed else zero

  return jax.tree.map(zeros, params)


def _cut(x, shards):
  """``[n, ...]`` as ``[n / shards, shards, ...]``.

  So each micro-batch is spread over devices as the whole batch was, and no row moves.
  """
  rows = x.shape[0] // shards
  shape = (rows, shards, *x.shape[1:])
  sharding = _devices.explicit_sharding(x)
  if sharding is None:
    return jnp.reshape(x, shape)
  names = sharding.spec[0]
  names = names if isinstance(names, tuple) else (names,)
  devices = math.prod(sharding.mesh.shape[name] for name in names if name is not None)
  if rows % devices:
    raise ValueError(
      f'The {x.shape[0]} rows of a batch on {devices} devices cannot be cut into'
      f' {shards} micro-batches that are on all of them: a micro-batch has {rows} rows,'
      f' and must have a multiple of {devices}.'
    )
  first, *others = sharding.spec
  sharding = sharding.update(spec=PartitionSpec(first, None, *others))
  return jax.lax.reshape(x, shape, out_sharding=sharding)


def _data(args, kwargs, params_at, argnums, argnames):
  """Positions and names of the arguments that hold the batch."""
  names = (argnames,) if isinstance(argnames, str) else argnames
  if not isinstance(names, (tuple, list)):
    raise TypeError(
      f'`data_argnames` must be a name, or a sequence of names, got {argnames!r}.'
    )
  if argnums is None and not names:
    return _only_data(args, kwargs, params_at)
  at = [] if argnums is None else positions('data_argnums', argnums, args, kwargs)
  if shared := sorted(set(at) & set(params_at)):
    raise ValueError(
      f'The argument number {shared[0]} holds parameters by `argnums`, and the batch by'
      ' `data_argnums`: it can hold one of them.'
    )
  if missing := [name for name in names if name not in kwargs]:
    raise ValueError(
      f'`data_argnames` names {missing[0]!r}, but the keyword arguments of this call'
      f' are {sorted(kwargs)}: give in `data_argnums` the position of what is'
      ' positional.'
    )
  return at, names


def _only_data(args, kwargs, params_at):
  """The one argument besides the parameters that holds arrays with axes."""
  holds = lambda x: [leaf for leaf in jax.tree.leaves(x) if _has_axes(leaf)]
  at = [i for i, x in enumerate(args) if i not in params_at and holds(x)]
  names = [name for name, x in kwargs.items() if holds(x)]
  if len(at) + len(names) > 1:
    found = [f'number {i} ({_shapes(holds(args[i]))})' for i in at]
    found += [f'{name!r} ({_shapes(holds(kwargs[name]))})' for name in names]
    example = f'data_argnums={tuple(at)}' if at else ''
    example += ', ' if at and names else ''
    example += f'data_argnames={tuple(names)}' if names else ''
    raise ValueError(
      f'Several arguments hold arrays with axes: {", ".join(found)}. Name those that'
      f' hold the batch, which is cut along its first axis: `{example}` if all'
      ' of them do. The others, as class weights, model state or a raw random key, go'
      ' whole to each micro-batch.'
    )
  return at, names


def _has_axes(x):
  return getattr(x, 'ndim', 0) > 0


def _shapes(leaves):
  shapes = [f'{x.dtype}{list(x.shape)}' for x in leaves]
  return ', '.join(shapes[:3]) + (', …' if len(shapes) > 3 else '')


def _accumulate(one, cut, shards, params):
  """Outputs, stacked, and the sum of the gradients of ``one``, one after the other.

  The sums have an axis of length one. Without it XLA makes one operation of an addition
  and the gradient of an embedding, and can no longer take the sum over devices, which
  is in the latter, out of the loop.
  """

  def add(sums, i):
    at = lambda x: jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)
    output, grads = one([at(x) for x in cut])
    return jax.tree.map(lambda s, g: s + g.astype(s.dtype)[None], sums, grads), output

  zero = jax.tree.map(lambda x: _numerics.widen(x)[None], zeros_like(params))
  sums, outputs = jax.lax.scan(add, zero, jnp.arange(shards))
  return outputs, jax.tree.map(lambda s: s[0], sums)
