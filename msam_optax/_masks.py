"""Masks: which leaves, as a tree of bools or a function from params to one."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from msam_optax import _numerics

# Flax's collection of FP8 scaling factors. Instead of their gradients it has their new
# values, by which they are overwritten.
OVERWRITTEN = '_overwrite_with_gradient'

# The names of biases and of the scales and shifts of normalisations, in Flax, Haiku,
# Keras and Equinox. Stacked over layers these have two dimensions or more.
_NOT_WEIGHTS = ('bias', 'bias_n', 'b', 'scale', 'offset', 'beta', 'gamma')


def by_name(*names: str) -> Callable[[Any], Any]:
  """A mask of the leaves that have one of some names on their path.

  It is a function from params to a tree of bools, for all arguments that take a mask::

    msam(mask=by_name('head'))                           # only the head is perturbed
    adaptive(weights=by_name('kernel', 'embedding'))     # these are the weights

  Args:
    *names: keys of dicts or names of attributes, anywhere on the way to a leaf.

  Returns:
    A function from a pytree to one of Python bools with the same structure.

  Raises:
    TypeError: if a name is no string.
    ValueError: when it is called, if a name occurs nowhere in the pytree.

  Examples:
    >>> from msam_optax import by_name
    >>> params = {'body': {'kernel': 1.0, 'bias': 1.0}, 'head': {'kernel': 1.0}}
    >>> by_name('bias', 'head')(params)
    {'body': {'bias': True, 'kernel': False}, 'head': {'kernel': True}}
  """

  for name in names:
    if not isinstance(name, str):
      raise TypeError(f'by_name takes names, each a string, got {name!r}.')

  def mask(params):
    found = {name for path in _paths(params) for name in path_names(path)}
    if missing := sorted(set(names) - found):
      raise ValueError(
        f'by_name{names}: nothing in the parameters is called {missing}. The names on'
        f' their paths are {sorted(found)}. (Under optax.inject_hyperparams a function'
        ' is called with the step count, unless its argument is in `static_args`.)'
      )
    return jax.tree_util.tree_map_with_path(
      lambda path, _: not set(names).isdisjoint(path_names(path)), params
    )

  return mask


def weights_by_default(params: Any) -> Any:
  """Which leaves are weights, and not biases or the scales of normalisations.

  A weight is a floating-point leaf of two dimensions or more whose own name is not one
  that biases and scales have: ``bias``, ``bias_n``, ``b``, ``scale``, ``offset``,
  ``beta``, ``gamma``.

  Args:
    params: pytree of arrays.

  Returns:
    A pytree of Python bools with the structure of ``params``.
  """

  def is_weight(path, leaf):
    # Flax's WeightNorm has names such as 'Dense_0/kernel/scale'.
    name = ('', *path_names(path))[-1].split('/')[-1]
    floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return bool(floating and jnp.ndim(leaf) >= 2 and name not in _NOT_WEIGHTS)

  return jax.tree_util.tree_map_with_path(is_weight, params)


def path_names(path: Any) -> tuple[str, ...]:
  """The names on a path in a tree; the ``value`` of a variable is none of them."""
  if path and path[-1] == jax.tree_util.GetAttrKey('value'):
    path = path[:-1]
  keys = [getattr(key, 'key', getattr(key, 'name', None)) for key in path]
  return tuple(key for key in keys if isinstance(key, str))


def resolve_mask(mask: Any, params: Any, *, name: str = 'mask') -> Any:
  """A mask in Optax's convention, as a full tree of Python bools.

  A mask counts as a function only if it has leaves and all of them are callable,
  since a tree of bools may itself be callable, as every Equinox module is. So a
  resolved mask must not be resolved again for other parameters.

  Args:
    mask: a tree of bools with the structure of ``params`` or a prefix of it, a
      function from params to such a tree, or None for every leaf.
    params: the parameters.
    name: the argument's name, for the message.

  Returns:
    A tree of bools with the structure of ``params``.

  Raises:
    ValueError: if the mask does not fit the params.
    TypeError: if a leaf of it is no bool known at trace time.
  """
  if mask is None:
    return jax.tree.map(lambda _: True, params)
  tree = mask(params) if _is_function(mask) else mask
  for path, leaf in _leaves(tree):
    if not isinstance(leaf, (bool, np.bool_)):
      hint = f' Or give `by_name({leaf!r})`.' if isinstance(leaf, str) else ''
      raise TypeError(
        f'`{name}` must hold one bool per leaf, True or False, got {leaf!r}'
        f' {at_path(path)}.{hint}'
      )
  try:
    return jax.tree.map(
      lambda chosen, subtree: jax.tree.map(lambda _: bool(chosen), subtree),
      tree,
      params,
    )
  except ValueError as error:
    raise ValueError(
      f'`{name}` must have the structure of the parameters, or a prefix of it.'
      f' It has {jax.tree.structure(tree)}, they have'
      f' {jax.tree.structure(params)}. A function, e.g. `{name}=lambda params:'
      ' jax.tree.map(lambda p: p.ndim > 1, params)`, always fits.'
    ) from error


def perturbed(mask: Any, params: Any) -> Any:
  """Which leaves are perturbed: those of a mask that are parameters at all.

  Args:
    mask: see :func:`resolve_mask`.
    params: the parameters, among which may be Flax's FP8 scaling factors, which a
      "gradient" overwrites and no optimizer changes.

  Returns:
    A tree of bools with the structure of ``params``.
  """
  return jax.tree.map(
    lambda chosen, replaced: chosen and not replaced,
    resolve_mask(mask, params),
    overwritten(params),
  )


def restrict(tree: Any, mask: Any) -> Any:
  """The sub-tree that a mask selects, as ``optax.masked`` shows it.

  Args:
    tree: pytree.
    mask: tree of bools with its structure.

  Returns:
    The tree with an ``optax.MaskedNode``, which has no leaves, for all others.
  """
  return jax.tree.map(lambda keep, x: x if keep else optax.MaskedNode(), mask, tree)


class Complex(NamedTuple):
  """A complex array as two real ones, so that sums of products are those of lengths."""

  real: Any
  imag: Any


def trained(params: Any) -> Any:
  """Which leaves have gradients: floating point or complex, and not overwritten."""
  return jax.tree.map(
    lambda w, replaced: _numerics.is_inexact(w) and not replaced,
    params,
    overwritten(params),
  )


def restrict_to_real(tree: Any, mask: Any) -> Any:
  """The sub-tree that a mask selects, with a :class:`Complex` for a complex leaf."""

  def of_leaf(x):
    is_complex = jnp.issubdtype(jnp.result_type(x), jnp.complexfloating)
    return Complex(jnp.real(x), jnp.imag(x)) if is_complex else x

  return jax.tree.map(of_leaf, restrict(tree, mask))


def extend(subtree: Any, mask: Any, tree: Any) -> Any:
  """The inverse of :func:`restrict`: the other leaves are those of ``tree``."""
  return jax.tree.map(lambda keep, x, y: x if keep else y, mask, subtree, tree)


def overwritten(params: Any) -> Any:
  """Which leaves are in Flax's collection of what a "gradient" overwrites."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: OVERWRITTEN in path_names(path), params
  )


def has_leaf(tree: Any, params: Any) -> Any:
  """Which leaves of ``params`` a tree has, where it has None for those that it has not.

  Gradients have None where nothing is trained: in Equinox, for example.

  Returns:
    A tree of bools with the structure of ``params``.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None)
  missing = {path for path, x in leaves if x is None}
  return jax.tree_util.tree_map_with_path(lambda path, _: path not in missing, params)


def leave_out(tree: Any, present: Any) -> Any:
  """A tree with None for its leaves that are not present."""
  return jax.tree.map(lambda here, x: x if here else None, present, tree)


def fill(tree: Any, present: Any, params: Any) -> Any:
  """The inverse of :func:`leave_out`: zeros like ``params`` for what is not there."""
  leaves = iter(jax.tree.leaves(tree))

  def zeros(w):
    if _numerics.is_inexact(w):
      return jnp.zeros_like(w)  # In `shard_map` it varies as the parameter does.
    return jnp.zeros(jnp.shape(w), jnp.float32)

  return jax.tree.map(
    lambda here, w: next(leaves) if here else zeros(w), present, params
  )


def at_path(path: Any) -> str:
  """Where in a tree, for messages."""
  return f'at {jax.tree_util.keystr(path)}' if path else 'at the root'


def _is_function(mask):
  leaves = jax.tree.leaves(mask)
  return callable(mask) and bool(leaves) and all(callable(leaf) for leaf in leaves)


def _leaves(tree):
  return jax.tree_util.tree_leaves_with_path(tree)


def _paths(params):
  """Those of all leaves, also of leaves that a mask has left out."""
  is_masked = lambda x: isinstance(x, optax.MaskedNode)
  leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_masked)
  return [path for path, _ in leaves]
