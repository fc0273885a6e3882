"""Masks: which leaves, as a tree of bools or a function from params to one."""

from typing import Any

import jax
import numpy as np


def resolve_mask(mask: Any, params: Any, *, name: str = 'mask') -> Any:
  """A mask in Optax's convention, as a full tree of Python bools.

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
  tree = mask(params) if callable(mask) else mask
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if not isinstance(leaf, (bool, np.bool_)):
      raise TypeError(
        f'`{name}` must hold one bool a leaf, True or False, got {leaf!r}'
        f' {at_path(path)}.'
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


def at_path(path: Any) -> str:
  """Where in a tree, for messages."""
  return f'at {jax.tree_util.keystr(path)}' if path else 'at the root'
