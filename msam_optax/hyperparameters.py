"""Hyperparameters: a number, an array, or a schedule of the step count."""

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import numpy as np

Hyperparameter = float | jax.Array | np.ndarray | Callable[[Any], Any]


def check_hyperparameter(name: str, value: Hyperparameter) -> None:
  """Raises unless ``value`` is a finite scalar >= 0, a schedule, or traced.

  What a schedule returns and what a traced array holds is not known when a
  method is built, so it is not looked at.

  Args:
    name: the argument's name, for the message.
    value: what the user passed.

  Raises:
    TypeError: if it is no number, array or callable.
    ValueError: if it is negative, infinite, NaN, or not a scalar.
  """
  if callable(value) or isinstance(value, jax.core.Tracer):
    return
  try:
    number = np.asarray(value, dtype=np.float64)
  except (TypeError, ValueError) as error:
    raise TypeError(
      f'`{name}` must be a number, an array or an Optax schedule, got {value!r}.'
    ) from error
  if number.shape:
    raise ValueError(f'`{name}` must be a scalar, got shape {number.shape}.')
  if not (np.isfinite(number) and number >= 0):
    raise ValueError(f'`{name}` must be finite and >= 0, got {value!r}.')


def value_at(value: Hyperparameter, count: jax.Array | None) -> Any:
  """The hyperparameter at step ``count``."""
  return value(count) if callable(value) else value
