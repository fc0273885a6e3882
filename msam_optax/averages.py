"""Metrics with a memory: the running mean of the gradients so far.

The gradient of a batch is that of the loss and noise. The mean of many tells the two
apart, and each metric here makes another use of it: the way up is along the mean
(:func:`smoothed`), or along what is left without it (:func:`residual`), or is held back
along it (:func:`monge_average`).
"""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from msam_optax import _hyperparameters
from msam_optax import _numerics
from msam_optax import _outer_products
from msam_optax import metrics
from msam_optax import spaces


class AverageState(NamedTuple):
  """State of :func:`smoothed`, :func:`residual` and :func:`monge_average`.

  Attributes:
    count: int32 scalar, the gradients so far that the mean is of. One that is not
      finite is none of them.
    average: pytree like the params, ``m``, the running mean of the gradients, float32
      or wider. With replicas it is that of their mean gradients, the same on each.
    base: the base metric's state.
  """

  count: Any
  average: Any
  base: Any


def smoothed(
  base: metrics.Metric = metrics.euclidean(), decay: float | jax.Array = 0.1
) -> metrics.Metric:
  """The direction of the running mean of the gradients: that of VaSSO.

  With ``m ← decay · m + (1 − decay) · g``, where ``m`` is ``g`` in the first step, the
  direction is the base's for ``m`` instead of ``g``: over the Euclidean metric
  ``m/‖m‖``. The authors call ``1 − decay`` their ``θ``, which is 0.9 by default.

  The slope is ``⟨g, direction⟩``, how steep the loss *of this batch* is along ``m``. So
  ``ρ · slope`` is the predicted rise as ever, and ``monge(alpha, smoothed())`` holds it
  below ``ρ/α``. It is negative in a step whose gradient points the other way.

  With replicas (``axis_name``) ``m`` and ``g`` are of their mean gradient, and all go
  the same way. Where the gradient is zero, so is the direction, and where it is not
  finite, ``m`` stays what it is.

  Args:
    base: the metric that is given ``m``.
    decay: how much of ``m`` is kept, scalar, 0 <= decay <= 1. 0 is the base.

  Returns:
    A :class:`Metric` with an :class:`AverageState`, which holds one more copy of the
    params in float32.

  Raises:
    TypeError: if ``base`` is no metric, or ``decay`` no real number and no array.
    ValueError: if ``decay`` is not between 0 and 1.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import smoothed
    >>> metric, w = smoothed(decay=0.5), jnp.zeros(2)
    >>> _, state = metric.ascend(jnp.array([6.0, 0.0]), metric.init(w), w)
    >>> ascent, state = metric.ascend(jnp.array([0.0, 8.0]), state, w)
    >>> print(state.average, ascent.direction, f'{ascent.slope:.4g}')
    [3. 4.] [0.6 0.8] 6.4

  References:
    Li & Giannakis, `Enhancing Sharpness-Aware Optimization Through Variance Suppression
    <https://arxiv.org/abs/2309.15639>`_, 2023
  """
  metrics.check_metric('base', base)
  _hyperparameters.check_number('decay', decay, largest=1.0)

  def ascend(grads, state, params, *, space=spaces.LOCAL, **extra_args):
    decay_now = _hyperparameters.value_at('decay', decay, largest=1.0)
    g = space.mean(grads)
    count, m = _updated(state, g, _after_the_first(decay_now, state), space)
    ascent, base_state = base.ascend(m, state.base, params, space=space, **extra_args)
    ascent = _as_of(g, ascent, space, show=decay_now)
    return ascent, AverageState(count, m, base_state)

  return metrics.Metric(lambda params: _init(params, base), ascend)


def residual(
  base: metrics.Metric = metrics.euclidean(),
  sigma: float | jax.Array = 1.0,
  decay: float | jax.Array = 0.9,
) -> metrics.Metric:
  """The direction of the gradient without its running mean: that of Friendly SAM.

  The direction is the base's for ``g − σm`` instead of ``g``: for the noise of the
  batch, if ``m`` is near the gradient of the whole loss. After that
  ``m ← decay · m + (1 − decay) · g``. The first step has no ``m``: it is the base's,
  and leaves ``m = g``.

  The slope is ``⟨g, direction⟩``, how steep the loss of this batch is that way, which
  is less than ``‖g‖`` and may be negative. ``monge(alpha, residual())`` holds the rise
  below ``ρ/α`` all the same.

  With replicas (``axis_name``) ``m`` is of their mean gradient, and ``g`` each one's
  own, unless ``sync_ascent`` says otherwise. Where the gradient is zero, so is the
  direction, and where it is not finite, ``m`` stays what it is.

  Args:
    base: the metric that is given ``g − σm``.
    sigma: ``σ``, scalar >= 0. 0 is the base.
    decay: ``λ``, how much of ``m`` is kept, scalar, 0 <= decay <= 1. The authors have
      0.6 to 0.95.

  Returns:
    A :class:`Metric` with an :class:`AverageState`, which holds one more copy of the
    params in float32.

  Raises:
    TypeError: if ``base`` is no metric, or a number no real number and no array.
    ValueError: if ``sigma`` is negative or not finite, or ``decay`` not between 0 and
      1.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import residual
    >>> metric, w = residual(), jnp.zeros(2)
    >>> _, state = metric.ascend(jnp.array([1.0, 0.0]), metric.init(w), w)
    >>> ascent, state = metric.ascend(jnp.array([4.0, 4.0]), state, w)
    >>> print(ascent.direction, f'{ascent.slope:.4g}', state.average)
    [0.6 0.8] 5.6 [1.3 0.4]

  References:
    Li et al., `Friendly Sharpness-Aware Minimization
    <https://arxiv.org/abs/2403.12350>`_, 2024
  """
  metrics.check_metric('base', base)
  _hyperparameters.check_number('sigma', sigma)
  _hyperparameters.check_number('decay', decay, largest=1.0)

  def ascend(grads, state, params, *, space=spaces.LOCAL, **extra_args):
    sigma_now = _hyperparameters.value_at('sigma', sigma)
    decay_now = _hyperparameters.value_at('decay', decay, largest=1.0)
    rest = jax.tree.map(
      lambda g, m: jnp.asarray(g, m.dtype) - jnp.asarray(sigma_now, m.dtype) * m,
      grads,
      state.average,  # Zero before the first step.
    )
    ascent, base_state = base.ascend(
      rest, state.base, params, space=space, **extra_args
    )
    ascent = _as_of(grads, ascent, space, show=(sigma_now, decay_now))
    count, m = _updated(
      state, space.mean(grads), _after_the_first(decay_now, state), space
    )
    return ascent, AverageState(count, m, base_state)

  return metrics.Metric(lambda params: _init(params, base), ascend)


def monge_average(
  decay: float | jax.Array = 0.9,
  alpha: _hyperparameters.Hyperparameter = 1.0,
  base: metrics.Metric = metrics.euclidean(),
) -> metrics.Metric:
  """Monge's metric of the running mean of gradients, ``G = B + α² m mᵀ``.

  The metric of :func:`monge` is that of one batch, and changes with it. Here it is of
  ``m ← decay · m + (1 − decay) · g``, this gradient included, and zero before the first
  step, as in the paper that has it for Langevin dynamics. A step is held back along
  what has been steep for a while, and not along the noise of the batch: there it goes
  as far as the base does. So, unlike Monge's, its direction is another than the base's.

  ``m = g``, so ``decay=0``, is Monge's metric, and ``m = 0`` the base. The rise of the
  loss of the batch is *not* below ``ρ/α``: that of ``m`` is, ``⟨m, δ⟩ < ρ/α``.

  With replicas (``axis_name``) ``m`` is of their mean gradient, and ``g`` each one's
  own, unless ``sync_ascent`` says otherwise. Where the gradient is not finite, ``m``
  stays what it is.

  Args:
    decay: how much of ``m`` is kept, scalar, 0 <= decay <= 1.
    alpha: ``α``, scalar >= 0: a number, an array or an Optax schedule, counted in
      finite gradients. 0 is the base.
    base: the matrix ``B``: a metric without state that is the same for every gradient,
      such as ``euclidean()`` or ``adaptive()``. For one that is not (``monge()``,
      ``diagonal_fisher()``, a norm) the direction is NaN, unless it is nearly so.

  Returns:
    A :class:`Metric` with an :class:`AverageState`, which holds one more copy of the
    params in float32.

  Raises:
    TypeError: if ``base`` is no metric, or ``decay`` no real number and no array.
    ValueError: if ``decay`` is not between 0 and 1, or ``alpha`` is negative or not
      finite; from ``init``, if ``base`` has a state.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import monge_average
    >>> metric, w = monge_average(decay=0.5, alpha=1.0), jnp.zeros(2)
    >>> _, state = metric.ascend(jnp.array([4.0, 0.0]), metric.init(w), w)
    >>> ascent, state = metric.ascend(jnp.array([1.0, 1.0]), state, w)
    >>> print(state.average, ascent.direction)
    [1.5 0.5] [0.1543 0.7715]

  References:
    Yu et al., `Scalable Stochastic Gradient Riemannian Langevin Dynamics in
    Non-Diagonal Metrics <https://arxiv.org/abs/2303.05101>`_, 2023
  """
  metrics.check_metric('base', base)
  _hyperparameters.check_number('decay', decay, largest=1.0)
  _hyperparameters.check_hyperparameter('alpha', alpha)

  def init(params):
    _outer_products.check_fixed(base, params, 'monge_average')
    return _init(params, base)

  def ascend(grads, state, params, *, space=spaces.LOCAL, **extra_args):
    decay_now = _hyperparameters.value_at('decay', decay, largest=1.0)
    count, m = _updated(state, space.mean(grads), decay_now, space)
    ascent = _outer_products.ascend(
      grads,
      jax.tree.map(lambda x: x[None], m),
      params,
      alpha=_hyperparameters.value_at('alpha', alpha, state.count),
      base=base,
      number=1,
      space=space,
      extra_args=extra_args,
    )
    ascent = _shown(ascent, decay_now)
    return ascent, AverageState(count, m, state.base)

  return metrics.Metric(init, ascend)


def _init(params, base):
  zeros = lambda w: jnp.zeros_like(w, _numerics.wide_dtype(w))
  return AverageState(
    jnp.zeros([], jnp.int32), jax.tree.map(zeros, params), base.init(params)
  )


def _after_the_first(decay, state):
  """The mean of one gradient is that gradient."""
  return jnp.where(state.count > 0, jnp.asarray(decay), 0.0)


def _updated(state, grads, decay, space):
  """The count and the mean with one more gradient, or as they were."""

  def step(m, g):
    kept = jnp.asarray(decay, m.dtype)
    return kept * m + (1.0 - kept) * jnp.asarray(g, m.dtype)

  m = jax.tree.map(step, state.average, grads)
  finite = spaces.all_finite(m, space.param_specs)
  m = jax.tree.map(lambda new, old: jnp.where(finite, new, old), m, state.average)
  return jnp.where(finite, optax.safe_increment(state.count), state.count), m


def _as_of(grads, ascent, space, show):
  """The base's ascent for another gradient, with the slope that the true one has."""
  unit, norm = space.normalize(grads)
  direction = jax.tree.map(
    lambda d, g: jnp.where(norm > 0, d, 0.0).astype(jnp.result_type(g)),
    ascent.direction,
    grads,
  )
  slope = norm * space.dot(unit, direction)
  return _shown(metrics.Ascent(direction, slope), show)


def _shown(ascent, numbers):
  """The ascent, or NaN where a number is: a sum that is NaN would have no direction."""
  sound = jnp.all(
    jnp.stack([jnp.isfinite(jnp.asarray(x)) for x in jax.tree.leaves(numbers)])
  )
  return jax.tree.map(lambda x: x + _numerics.zero_if(sound, x.dtype), ascent)
