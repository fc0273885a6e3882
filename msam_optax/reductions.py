"""Sums and maxima over whole leaves, also where `shard_map` shows only a part of them.

A leaf that is sharded over an axis of the mesh is a part of the parameter on each
device. What is summed over it has to be summed over the axis, too, and what is summed
over a leaf that every device has whole must not be. ``param_specs``, the very
``PartitionSpec``s that ``shard_map`` is given as ``in_specs``, say which is which.
"""

from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

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


def mean(tree: Any, axis_name: Any) -> Any:
  """The mean over a mapped axis of the leaves that have one.

  Args:
    tree: pytree of arrays. Leaves that are not floating point or complex (gradients of
      integers have no numbers at all) stay those of each replica.
    axis_name: the mapped axis or axes, or None.

  Returns:
    A pytree like ``tree``.
  """
  if axis_name is None:
    return tree
  leaves, structure = jax.tree.flatten(tree)
  rows = [i for i, x in enumerate(leaves) if is_inexact(x)]
  # All in one call, and so in as few messages as the compiler can make of it.
  means = jax.lax.pmean([leaves[i] for i in rows], axis_name)
  for i, x in zip(rows, means, strict=True):
    leaves[i] = x
  return structure.unflatten(leaves)


def all_finite(tree: Any, param_specs: Any = None) -> jax.Array:
  """Whether a tree is finite, all parts of all leaves.

  Args:
    tree: pytree of arrays; leaves that are not floating point or complex count as
      finite.
    param_specs: how the leaves are sharded inside ``shard_map``, see
      :func:`leaf_axes`.

  Returns:
    bool scalar.
  """
  finite = [
    jnp.all(jnp.isfinite(x)) if is_inexact(x) else jnp.array(True)
    for x in jax.tree.leaves(tree)
  ]
  axes = leaf_axes(param_specs, tree)
  bad = maxima([jnp.where(ok, 0.0, 1.0) for ok in finite], axes)
  return functools.reduce(jnp.maximum, bad, jnp.zeros([])) == 0


def is_inexact(x: Any) -> bool:
  """Whether a leaf is floating point or complex."""
  return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


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
  result = zero
  # Sorted, because all processes must send their messages in the same order.
  for names in sorted(set(axes)):
    group = [part for part, a in zip(parts, axes, strict=True) if a == names]
    subtotal = sum(group, jnp.zeros_like(zero))
    result += jax.lax.psum(subtotal, names) if names else subtotal
  return result


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


def _is_spec(x: Any) -> bool:
  return x is None or isinstance(x, PartitionSpec)


def _names(spec: PartitionSpec | None) -> Axes:
  entries = [e if isinstance(e, tuple) else (e,) for e in spec or ()]
  return tuple(name for entry in entries for name in entry if name is not None)
