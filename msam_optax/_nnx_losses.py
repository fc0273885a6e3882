"""A loss of NNX models: how it may be called, and what it returns."""

from collections.abc import Callable
import inspect
from typing import Any

from flax import nnx
import jax
import numpy as np

from msam_optax import _checks
from msam_optax import _masks


def positional(
  loss_fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
  """As many arguments by position as can be, as NNX does."""
  if not kwargs:
    return args, kwargs
  try:
    bound = inspect.signature(loss_fn).bind(*args, **kwargs)
  except (TypeError, ValueError):  # The call says better what is wrong.
    return args, kwargs
  return bound.args, bound.kwargs


def checked(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
  """A loss with a checked result, whose last argument is the dict of keywords."""
  return lambda *inputs: _check_output(loss_fn(*inputs[:-1], **inputs[-1]), has_aux)


def check_unbound(loss_fn: Callable[..., Any]) -> None:
  """Raises if it is a method of a model, which would be no argument of it."""
  owner = getattr(loss_fn, '__self__', None)
  if isinstance(owner, nnx.Module):
    kind, name = type(owner).__name__, loss_fn.__name__
    raise ValueError(
      f'`loss_fn` is a method of a {kind}, which would not be an argument of it, and'
      f' both passes would change it. Give `{kind}.{name}`, and the {kind} as first'
      ' argument.'
    )


def check_arrays(aux: Any) -> None:
  """Raises unless a loop can return the auxiliary output."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(aux):
    if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float, complex)):
      raise TypeError(
        'With `compile_once=True` the auxiliary output that `loss_fn` returns must hold'
        f' arrays only, but {_masks.at_path(path)} there is a {type(leaf).__name__}.'
      )


def _check_output(output, has_aux):
  if has_aux and not (isinstance(output, tuple) and len(output) == 2):
    raise TypeError(
      'With `has_aux=True` `loss_fn` must return `(loss, aux)`, but it returns a'
      f' {type(output).__name__}.'
    )
  if not has_aux and isinstance(output, tuple):
    raise TypeError(
      '`loss_fn` must return the loss, a scalar, but it returns a tuple. If that is'
      ' `(loss, aux)`, give `has_aux=True`.'
    )
  value: Any = output[0] if has_aux else output
  if not _checks.is_scalar(value):
    raise TypeError(
      f'The loss that `loss_fn` returns must be a scalar, not {_checks.kind_of(value)}.'
    )
  return output
