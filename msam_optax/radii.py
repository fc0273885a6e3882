"""Schedules of the radius."""

import jax.numpy as jnp
import optax

from msam_optax import _hyperparameters


def rho_following(
  learning_rate: optax.Schedule,
  *,
  lr_max: float,
  rho_max: float,
  lr_min: float = 0.0,
  rho_min: float = 0.0,
) -> optax.Schedule:
  """A radius that follows the learning rate, as GSAM's authors have it.

  While the learning rate goes from ``lr_min`` to ``lr_max``, the radius goes linearly
  from ``ρ_min`` to ``ρ_max``; beyond these it stays at its end:

      ρ = ρ_min + (ρ_max − ρ_min) (lr − lr_min)/(lr_max − lr_min).

  Args:
    learning_rate: the optimizer's schedule, ``step -> lr``.
    lr_max: its largest value.
    rho_max: the radius there, >= 0.
    lr_min: its smallest value, less than ``lr_max``.
    rho_min: the radius there, >= 0; the authors have 0.04 and 0.6 for ViT-B/32.

  Returns:
    A schedule for the ``rho`` of any method.

  Raises:
    TypeError: if ``learning_rate`` is no schedule, or a bound no number.
    ValueError: if a bound is negative or not finite, or ``lr_max <= lr_min``.

  Examples:
    >>> import optax
    >>> from msam_optax import gsam, rho_following
    >>> lr = optax.linear_schedule(0.1, 0.0, transition_steps=10)
    >>> rho = rho_following(lr, lr_max=0.1, rho_max=0.6, rho_min=0.2)
    >>> tx = optax.chain(gsam(rho), optax.sgd(lr))
    >>> print(f'{rho(0):.2f} {rho(5):.2f} {rho(10):.2f}')
    0.60 0.40 0.20

  References:
    Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
    <https://arxiv.org/abs/2203.08065>`_, 2022
  """
  if not _hyperparameters.is_schedule(learning_rate):
    raise TypeError(
      f'`learning_rate` must be a schedule of the step, got {learning_rate!r}. If it is'
      ' a constant, so is the radius: give `rho` as a number.'
    )
  for name, value in {
    'lr_max': lr_max,
    'lr_min': lr_min,
    'rho_max': rho_max,
    'rho_min': rho_min,
  }.items():
    _hyperparameters.check_number(name, value)
  if lr_max <= lr_min:
    raise ValueError(f'`lr_max` must be above `lr_min`, got {lr_max} and {lr_min}.')

  def schedule(count):
    part = (learning_rate(count) - lr_min) / (lr_max - lr_min)
    return rho_min + (rho_max - rho_min) * jnp.clip(part, 0.0, 1.0)

  return schedule
