"""The devices that arrays are on: mapped axes, shardings, and what is wrong with them.

A leaf that is sharded over an axis of the mesh is a part of the parameter on each
device. What is summed over it has to be summed over the axis as well, and what is
summed over a leaf that every device has whole must not be. ``param_specs``, the very
``PartitionSpec``s that ``shard_map`` is given as ``in_specs``, say which is which.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import operator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from msam_optax import _masks
from msam_optax import _numerics

Axes = tuple[str, ...]


def leaf_axes(param_specs: Any, tree: Any) -> list[Axes]:
  """The mesh axes over which each leaf is sharded.

  Args:
    param_specs: a tree of ``PartitionSpec`` with the structure of ``tree`` or a
      prefix of it, where None is ``PartitionSpec()``; None if no leaf is sharded.
    tree: the parameters, or a tree like them.

  Returns:
    A tuple of axis names for every leaf of ``tree``, in order.

  Raises:
    TypeError: if a leaf of ``param_specs`` is no ``PartitionSpec``.
    ValueError: if it does not fit the tree.
  """
  if param_specs is None:
    return [()] * len(jax.tree.leaves(tree))
  axes: list[Axes] = []

  def extend(spec, subtree):
    if spec is not None and not isinstance(spec, PartitionSpec):
      raise TypeError(
        f'`param_specs` must hold PartitionSpecs, got {spec!r}: give those that'
        ' shard_map has as `in_specs` of the parameters.'
      )
    axes.extend([_names(spec)] * len(jax.tree.leaves(subtree)))

  try:
    jax.tree.map(extend, param_specs, tree, is_leaf=_is_spec)
  except ValueError as error:
    raise ValueError(
      '`param_specs` must have the structure of the parameters, or a prefix of it. It'
      f' has {jax.tree.structure(param_specs, is_leaf=_is_spec)}, they have'
      f' {jax.tree.structure(tree)}.'
    ) from error
  return axes


def total(
  parts: Sequence[jax.Array], axes: Sequence[Axes], zero: jax.Array
) -> jax.Array:
  """The sum of one number a leaf, each summed over the axes of its leaf.

  Args:
    parts: scalars, the sum over that part of each leaf which this device has.
    axes: of :func:`leaf_axes`.
    zero: what to begin with, a scalar.

  Returns:
    The sum over all leaves and devices, a scalar.
  """
  return across(subtotals(parts, axes, zero), axes)


def subtotals(
  parts: Sequence[jax.Array], axes: Sequence[Axes], zero: jax.Array
) -> list[jax.Array]:
  """This device's share of :func:`total`, one number for all leaves of equal axes."""
  return [
    sum((part for part, a in zip(parts, axes, strict=True) if a == names), zero)
    for names in _groups(axes)
  ]


def across(shares: Sequence[jax.Array], axes: Sequence[Axes]) -> jax.Array:
  """The sum over all devices of what :func:`subtotals` returns."""
  sums = [
    jax.lax.psum(share, names) if names else share
    for share, names in zip(shares, _groups(axes), strict=True)
  ]
  return functools.reduce(operator.add, sums)


def count(axes: Axes) -> int:
  """The number of devices that a leaf is sharded over."""
  return jax.lax.psum(1, axes) if axes else 1


def _groups(axes):
  # Sorted, because all processes must send their messages in the same order.
  return sorted(set(axes)) or [()]


def unless(
  usual: jax.Array,
  values: Sequence[jax.Array],
  otherwise: Callable[[Any], Sequence[jax.Array]],
  reads: Any,
) -> list[jax.Array]:
  """``otherwise(reads)``, but on a CPU ``values`` where a condition says they are that.

  A CPU takes each sum in a separate pass, and skips those of ``otherwise`` then.
  An accelerator takes several in one pass. There a conditional would cost a GPU a wait
  for the host, and a TPU copies of all that it reads, in other layouts.

  Under ``vmap`` both are computed, and where shardings are a part of types
  ``otherwise`` is, since JAX cannot map conditionals over such arrays.

  Args:
    usual: bool scalar, whether ``values`` are what ``otherwise`` returns.
    values: arrays.
    otherwise: returns others like them, and sends no messages: the condition may hold
      on some devices only.
    reads: pytree of the arrays that it reads, all of them.

  Returns:
    Arrays like ``values``, which vary along all axes that one of both varies along.
  """
  if not isinstance(usual, jax.core.Tracer):
    # Outside of compiled functions JAX would compile a conditional in every call.
    return list(values if usual else otherwise(reads))
  # JAX's `vmap` of a conditional has all that its branches read vary as the condition
  # does, and a branch that casts it would then cast it a second time, and raise.
  settle = lambda x: as_varying(x, varying_axes(usual) - varying_axes(x))
  values, reads = jax.tree.map(settle, (list(values), reads))
  others = jax.eval_shape(otherwise, reads)
  axes = [
    varying_axes(usual) | varying_axes(x) | varying_axes(y)
    for x, y in zip(values, others, strict=True)
  ]
  vary = lambda xs: [
    as_varying(x, a - varying_axes(x)) for x, a in zip(xs, axes, strict=True)
  ]
  if any(explicit_sharding(x) is not None for x in jax.tree.leaves(reads)):
    return vary(otherwise(reads))
  return jax.lax.platform_dependent(
    cpu=lambda: jax.lax.cond(
      usual, lambda: vary(values), lambda: vary(otherwise(reads))
    ),
    default=lambda: vary(otherwise(reads)),
  )


def either(
  condition: jax.Array, if_true: Callable[[], Any], if_false: Callable[[], Any]
) -> Any:
  """``lax.cond``, also where the branches vary along different manual axes.

  Args:
    condition: bool scalar.
    if_true: returns a tree of arrays.
    if_false: returns one like it.

  Returns:
    The tree of one of both, whose arrays vary along all axes that those of one of both
    vary along.
  """
  if not jax.sharding.get_abstract_mesh().manual_axes:
    return jax.lax.cond(condition, if_true, if_false)
  axes = jax.tree.map(
    lambda x, y: varying_axes(x) | varying_axes(y),
    jax.eval_shape(if_true),
    jax.eval_shape(if_false),
  )
  vary = lambda branch: jax.tree.map(
    lambda x, a: as_varying(x, a - varying_axes(x)), branch(), axes
  )
  return jax.lax.cond(condition, lambda: vary(if_true), lambda: vary(if_false))


def barrier(tree: Any) -> Any:
  """``optimization_barrier``, one for all leaves that vary along the same manual axes.

  JAX has one barrier make all that goes through it vary along the axes of all.
  """
  leaves, structure = jax.tree.flatten(tree)
  groups: dict[frozenset[str], list[int]] = {}
  for i, x in enumerate(leaves):
    groups.setdefault(varying_axes(x), []).append(i)
  for rows in groups.values():
    kept = jax.lax.optimization_barrier([leaves[i] for i in rows])
    for i, x in zip(rows, kept, strict=True):
      leaves[i] = x
  return structure.unflatten(leaves)


def maxima(parts: Sequence[jax.Array], axes: Sequence[Axes]) -> list[jax.Array]:
  """One number a leaf, each the largest over the axes of its leaf."""
  largest = list(parts)
  for names in sorted(set(axes) - {()}):
    rows = [i for i, a in enumerate(axes) if a == names]
    # In one message, not one a leaf.
    group = jnp.stack([jax.lax.stop_gradient(parts[i]) for i in rows])
    for i, x in zip(rows, jax.lax.pmax(group, names), strict=True):
      largest[i] = x
  return largest


def explicit_sharding(x: Any) -> NamedSharding | None:
  """How an array is spread over devices, where JAX has that as a part of its type."""
  sharding = jax.typeof(x).sharding
  return sharding if any(getattr(sharding, 'spec', ())) else None


def as_varying(x: jax.Array, axes: frozenset[str]) -> jax.Array:
  """``x`` as an array that varies along manual axes."""
  if not axes:
    return x
  if hasattr(jax.lax, 'pcast'):
    return jax.lax.pcast(x, tuple(sorted(axes)), to='varying')
  return jax.lax.pvary(x, tuple(sorted(axes)))  # pyright: ignore


def of_replicas(tree: Any, axis_name: Any) -> Any:
  """Replicas as arrays that, by their types, are the same along the axis.

  Args:
    tree: arrays that are the same on all devices of the axis.
    axis_name: the mapped axis or axes, or None.
  """
  names = axis_name if isinstance(axis_name, tuple) else (axis_name,)

  def mean(x):
    axes = varying_axes(x) & set(names) if _numerics.is_inexact(x) else ()
    return jax.lax.pmean(x, tuple(sorted(axes))) if axes else x

  return jax.tree.map(mean, tree)


def varying_axes(x: Any) -> frozenset[str]:
  """The manual axes along which an array varies, where JAX tracks them."""
  kind = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
  kind = getattr(kind, 'manual_axis_type', kind)
  return getattr(kind, 'varying', None) or getattr(kind, 'vma', None) or frozenset()


def cast_hint(axis: Any) -> str:
  """What a user writes to have replicated parameters vary along an axis."""
  if hasattr(jax.lax, 'pcast'):
    return f'`params = jax.lax.pcast(params, {axis!r}, to="varying")`'
  return f'`params = jax.lax.pvary(params, {axis!r})`'


def axis_index(axis: Any, argument: str) -> jax.Array:
  """This device's place along a mapped axis that an argument names.

  Raises:
    ValueError: if nothing is mapped over such an axis here.
  """
  try:
    return jax.lax.axis_index(axis)
  except NameError as error:
    raise ValueError(
      f'`{argument}` names the axis {axis!r}, but nothing is mapped over an axis of'
      ' this name here: it is for the inside of pmap, vmap and shard_map. Under jit'
      ' with sharded arrays leave it out.'
    ) from error


def check_axis_name(axis_name: Any) -> None:
  """Raises unless ``axis_name`` is a name, a tuple of names, or None."""
  try:
    hash(axis_name)
  except TypeError as error:
    raise TypeError(
      f'`axis_name` must be the name of a mapped axis, or a tuple of names, got'
      f' {axis_name!r}.'
    ) from error


def check_varying(grads: Any, axis_name: Any) -> None:
  """Raises if gradients in ``shard_map`` are already summed over the axis.

  With ``check_vma=True`` the gradient of replicated parameters is the same on all
  devices, their sum; the mean of that would be as many times too large.

  Args:
    grads: the gradients.
    axis_name: the mapped axis or axes, or None.

  Raises:
    ValueError: if the replicas differ along an axis, and the gradients do not.
  """
  if axis_name is None:
    return
  leaves = [g for g in jax.tree.leaves(grads) if _numerics.is_inexact(g)]
  for axis in axis_name if isinstance(axis_name, tuple) else (axis_name,):
    if axis in varying_axes(axis_index(axis, 'axis_name')) and not all(
      axis in varying_axes(g) for g in leaves
    ):
      raise ValueError(
        f'These gradients are summed over {axis!r} already, as shard_map does with'
        ' those of replicated parameters. Cast the parameters before the gradient is'
        f' taken, {cast_hint(axis)}, or use shard_map(..., check_vma=False).'
        ' (A gradient that you make yourself: `jnp.zeros_like(param)`.)'
      )


def check_axes(params: Any, param_specs: Any, axis_name: Any) -> None:
  """Raises if parameters are sharded over an axis that gradients are averaged over.

  The devices of that axis hold different parameters, whose mean means nothing.

  Args:
    params: the parameters.
    param_specs: how they are sharded inside ``shard_map``.
    axis_name: the mapped axis or axes of the average, or None.

  Raises:
    ValueError: if an axis is named in both.
  """
  names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
  for axes in leaf_axes(param_specs, params):
    for axis in set(axes) & set(names):
      raise ValueError(
        f'Parameters that are sharded over {axis!r} by `param_specs` cannot be averaged'
        ' over it by `axis_name`: its devices hold different ones. If the loss gathers'
        ' them, their gradients are sums over that axis already: leave it out of'
        ' `axis_name`, and divide the loss by the size of the axis.'
      )


def check_sharded(grads: Any, param_specs: Any, perturbed: Any) -> None:
  """Raises if ``param_specs`` and the gradients differ in what is sharded.

  A leaf that every device has whole would be counted once a device, and of one whose
  axis is not named only a part. Only a checked ``shard_map`` can tell.

  Args:
    grads: the gradients.
    param_specs: how the parameters are said to be sharded, see :func:`leaf_axes`.
    perturbed: which leaves are in the norm, a tree of bools like ``grads``.

  Raises:
    ValueError: if a leaf is not sharded as it is said to be, or there is no such axis.
  """
  leaves = jax.tree_util.tree_leaves_with_path(grads)
  named = leaf_axes(param_specs, grads)
  tracked = [
    axis
    for axis in sorted({axis for axes in named for axis in axes})
    if axis in varying_axes(axis_index(axis, 'param_specs'))
  ]
  advice = ' Give the specs that shard_map has as `in_specs` for the parameters.'
  selected = jax.tree.leaves(perturbed)
  for (path, g), axes, use in zip(leaves, named, selected, strict=True):
    where = _masks.at_path(path)
    for axis in tracked if use else ():
      if axis in axes and axis not in varying_axes(g):
        raise ValueError(
          f'`param_specs` says that the leaf {where} is sharded over {axis!r},'
          f' but its gradient is the same all along that axis.{advice}'
        )
      if axis not in axes and axis in varying_axes(g):
        raise ValueError(
          f'`param_specs` says that other leaves are sharded over {axis!r}, and the'
          f' leaf {where} is not, but by its type its gradient may differ along'
          f' that axis.{advice} If it is averaged in a way that JAX cannot see, as by a'
          ' gather, add a `jax.lax.pmean`.'
        )


def check_probe(probe: Any, params: Any, grads: Any) -> None:
  """Raises if the gradient at the probe would be another kind than the clean one.

  In a checked ``shard_map`` the gradient of what is the same on all devices is their
  sum. A probe that differs between them would get the gradient of one device.

  Args:
    probe: the parameters, moved uphill.
    params: the parameters.
    grads: the clean gradients.

  Raises:
    ValueError: if a leaf of the probe varies along an axis along which neither the
      parameter nor its gradient does.
  """
  leaves = jax.tree_util.tree_leaves_with_path(probe)
  for (path, p), w, g in zip(
    leaves, jax.tree.leaves(params), jax.tree.leaves(grads), strict=True
  ):
    where = _masks.at_path(path)
    for axis in sorted(varying_axes(p) - varying_axes(w) - varying_axes(g)):
      raise ValueError(
        f'The probe may differ along the axis {axis!r} {where}, where neither'
        ' the parameter nor its gradient does: the gradient at the probe would be that'
        ' of one device, and the clean one is the sum or mean of all. If other leaves'
        ' are sharded over the axis, say so with `param_specs`, so that their norm is'
        ' summed over it. If gradients or a hyperparameter (`rho`, `alpha`) differ'
        ' along it, cast the parameters that you give,'
        f' {cast_hint(axis)}, and name the axis in `axis_name`. If the leaf is not to'
        ' be perturbed, leave it out with `mask`.'
      )


def _is_spec(x: Any) -> bool:
  return x is None or isinstance(x, PartitionSpec)


def _names(spec: PartitionSpec | None) -> Axes:
  entries = [e if isinstance(e, tuple) else (e,) for e in spec or ()]
  return tuple(name for entry in entries for name in entry if name is not None)
