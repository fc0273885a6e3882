"""Hyperparameters: a number, an array, or a schedule of the step count."""

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

Hyperparameter = float | jax.Array | np.ndarray | Callable[[Any], Any]


def check_hyperparameter(name: str, value: Hyperparameter) -> None:
  """Raises unless ``value`` is a finite scalar >= 0 or a schedule.

  What a schedule returns is not known when a method is built, so it is not looked at.

  Args:
    name: the argument's name, for the message.
    value: what the user passed.

  Raises:
    TypeError: if it is no real number, array or callable.
    ValueError: if it is negative, infinite, NaN, or not a scalar.
  """
  if not callable(value):
    check_number(name, value, expected='a real number, an array or an Optax schedule')


def check_number(
  name: str, value: Any, *, expected: str = 'a real number or an array'
) -> None:
  """Raises unless ``value`` is a finite scalar >= 0; a traced one is not looked at."""
  if isinstance(value, jax.core.Tracer):
    return
  number = np.asarray(value)
  is_real = jnp.issubdtype(number.dtype, jnp.floating)
  if not (is_real or jnp.issubdtype(number.dtype, jnp.integer)):
    raise TypeError(f'`{name}` must be {expected}, got {value!r}.')
  if number.shape:
    raise ValueError(f'`{name}` must be a scalar, got shape {number.shape}.')
  if not (np.isfinite(number) and number >= 0):
    raise ValueError(f'`{name}` must be finite and >= 0, got {value!r}.')


def value_at(value: Hyperparameter, count: jax.Array | None) -> Any:
  """The hyperparameter at step ``count``."""
  return value(count) if callable(value) else value
