"""Hyperparameters: a number, an array, or a schedule of the step count."""

from collections.abc import Callable
import math
from typing import Any
from typing import TypeGuard

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from msam_optax import _checks
from msam_optax import _numerics

Hyperparameter = float | jax.Array | np.ndarray | Callable[[Any], Any]


def check_hyperparameter(
  name: str, value: Hyperparameter, *, largest: float = math.inf, finite: bool = True
) -> None:
  """Raises unless ``value`` is a finite scalar >= 0 or a schedule.

  What a schedule returns is not known when a method is built: see :func:`value_at`.

  Args:
    name: the argument's name, for the message.
    value: what the user passed.
    largest: the largest number that is allowed.
    finite: whether infinity is not allowed.

  Raises:
    TypeError: if it is no real number, array or callable.
    ValueError: if it is negative, too large, infinite, NaN, or not a scalar.
  """
  if not is_schedule(value):
    expected = 'a real number, an array or an Optax schedule'
    check_number(name, value, expected=expected, largest=largest, finite=finite)


def check_number(
  name: str,
  value: Any,
  *,
  expected: str = 'a real number or an array',
  largest: float = math.inf,
  finite: bool = True,
) -> None:
  """Raises unless ``value`` is a finite scalar >= 0, as far as that is known."""
  value = _unwrapped(value)
  if isinstance(value, jax.core.Tracer):
    check_scalar(name, value)
    return
  number = np.asarray(value)
  is_real = jnp.issubdtype(number.dtype, jnp.floating)
  if not (is_real or jnp.issubdtype(number.dtype, jnp.integer)):
    raise TypeError(f'`{name}` must be {expected}, got {value!r}.')
  check_scalar(name, number)
  if not 0 <= number <= largest or (finite and np.isinf(number)):
    bounds = f'between 0 and {largest:g}' if math.isfinite(largest) else '>= 0'
    if finite and math.isinf(largest):
      bounds = f'finite and {bounds}'
    raise ValueError(f'`{name}` must be {bounds}, got {value!r}.')


def check_whole(name: str, value: Any, *, instead: str = '') -> None:
  """Raises unless ``value`` is a whole number >= 1, as far as that is known.

  Args:
    name: the argument's name, for the message.
    value: what the user passed.
    instead: what else it may be, for the message.

  Raises:
    TypeError: if it is no integer and no array of one.
    ValueError: if it is less than 1, or not a scalar.
  """
  dtype = _checks.dtype_of(value)
  if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
    raise TypeError(f'`{name}` must be a whole number >= 1{instead}, got {value!r}.')
  check_scalar(name, value)
  if not isinstance(value, jax.core.Tracer) and value < 1:
    raise ValueError(f'`{name}` must be a whole number >= 1{instead}, got {value!r}.')


def whole_at(value: Any) -> tuple[Any, Any]:
  """A whole number now, and what to add to a result: NaN where it is less than 1."""
  if not isinstance(value, jax.core.Tracer):
    return value, 0.0
  sound = value >= 1
  return jnp.maximum(value, 1), _numerics.zero_if(sound, jnp.float32)


def check_real(name: str, value: Any) -> None:
  """Raises unless ``value`` is a finite real number, of either sign, or a schedule."""
  if is_schedule(value):
    return
  check_scalar(name, value)
  if isinstance(value, jax.core.Tracer):
    return
  dtype = _checks.dtype_of(value)
  kinds = (jnp.floating, jnp.integer)
  if dtype is None or not any(jnp.issubdtype(dtype, kind) for kind in kinds):
    raise TypeError(
      f'`{name}` must be a real number, an array or an Optax schedule, got {value!r}.'
    )
  if not np.isfinite(value):
    raise ValueError(f'`{name}` must be finite, got {value!r}.')


def check_scalar(name: str, value: Any) -> None:
  """Raises if ``value`` has dimensions."""
  if np.shape(value):
    raise ValueError(f'`{name}` must be a scalar, got shape {np.shape(value)}.')


def is_schedule(value: Any) -> TypeGuard[Callable[[Any], Any]]:
  """Whether a hyperparameter is a function of the step, and no number.

  An array may be callable, as an NNX variable is: it has a dtype.
  """
  return callable(value) and not hasattr(value, 'dtype')


def value_at(
  name: str,
  value: Hyperparameter,
  count: Any = None,
  *,
  largest: float = math.inf,
  finite: bool = True,
) -> Any:
  """The hyperparameter at step ``count``; NaN where it is not what it may be.

  What is known when a method is built was checked there. What is not, the value of a
  schedule or of a traced array, becomes NaN, so that the result shows it.
  """
  value = _unwrapped(value)
  if is_schedule(value):
    value = jnp.asarray(value(count))
    check_scalar(name, value)
    if jnp.issubdtype(value.dtype, jnp.complexfloating):
      raise TypeError(f'The schedule for `{name}` must be real, got {value.dtype}.')
  elif not isinstance(value, jax.core.Tracer):
    return value
  if not jnp.issubdtype(value.dtype, jnp.floating):
    value = value.astype(float)
  allowed = (value >= 0) & (value <= largest)
  if finite:
    allowed &= jnp.isfinite(value)
  return value + _numerics.zero_if(allowed, value.dtype)


def _unwrapped(value: Any) -> Any:
  """The array that an NNX variable holds, or what was given."""
  array = getattr(value, '__jax_array__', None)
  return value if array is None or isinstance(value, jax.Array) else array()
