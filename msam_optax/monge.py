"""Monge SAM's metric: the graph of the loss as a surface. The paper on one page.

The loss ``ℓ`` over the parameters ``w`` is a surface, the points ``(w, αℓ(w))``. To
first order a step ``δ`` along it has the length ``√(‖δ‖² + α²⟨g, δ⟩²)``: longer than
``δ`` where it climbs, and as long where it follows a level set. Of all steps of length
``ρ`` the one along which the loss rises most is

    δ = ρ g / (‖g‖ √(1 + α²‖g‖²)).

The same holds over any norm, not only the Euclidean one. Let ``direction`` be the
vector of unit length along which the loss rises most, and ``slope`` that rise. Of all
steps with the same ``⟨g, δ⟩ = c`` the shortest is along ``direction``, and there
``‖δ‖ = c / slope``. So

    max ⟨g, δ⟩  subject to  ‖δ‖² + α²⟨g, δ⟩² ≤ ρ²

is reached at ``c²/slope² + α²c² = ρ²``, that is at

    δ = ρ · direction / √(1 + α² slope²),

which is all that this file computes.
"""

from collections.abc import Callable
import functools
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from msam_optax import _hyperparameters
from msam_optax import _numerics
from msam_optax import metrics


class MongeState(NamedTuple):
  """State of :func:`monge` and what is built on it where their number is a schedule.

  Attributes:
    count: int32 scalar, the steps so far.
    base: the base metric's state.
  """

  count: Any
  base: Any


def monge(
  alpha: _hyperparameters.Hyperparameter = 1.0,
  base: metrics.Metric = metrics.euclidean(),
) -> metrics.Metric:
  """The Monge metric ``G = B + α² g gᵀ`` over any metric ``B``, or over any norm.

  It is the metric that the graph of the loss, ``{(w, αℓ(w))}``, has as a surface: a
  step uphill is longer than under ``B``, and a step along a level set as long. Its
  direction and slope are those of the base divided by ``√(1 + α²s²)``, where ``s`` is
  the base's slope (by Sherman–Morrison if the base is a matrix; the docstring of
  ``monge.py`` proves it for any norm). So over the Euclidean metric

      δ = ρ g / (‖g‖ √(1 + α²‖g‖²)),

  SAM's perturbation where the gradient is small, and a shorter one where it is large.
  The slope is less than ``1/α``: ``ρ/α`` is *the largest first-order rise of the
  loss that Monge SAM allows*. ``α = 0`` is the base, and the paper has ``α = 1``.

  Unlike SAM's, this perturbation depends on the scale of the loss: a loss ``c``
  times as large acts as ``c`` times the ``α``. Average, unscale and reduce
  gradients before they come here.

  Args:
    alpha: ``α``, scalar >= 0: a number, an array or an Optax schedule. A schedule
      is counted in calls and makes the metric one with state.
    base: the metric ``B``, or a norm such as :func:`max_norm` or :func:`spectral`.

  Returns:
    A :class:`Metric` with the base's state; in a :class:`MongeState` if ``alpha`` is
    a schedule.

  Raises:
    ValueError: if ``alpha`` is negative or not finite.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import monge
    >>> metric = monge(alpha=1.0)
    >>> ascent, _ = metric.ascend(jnp.array([0.0, 0.75]), metric.init(None), None)
    >>> print(ascent.direction, f'{ascent.slope:.4g}')
    [0.  0.8] 0.6

  References:
    Jacobsen & Arvanitidis, `Monge SAM: Robust Reparameterization-Invariant
    Sharpness-Aware Minimization Based on Loss Geometry
    <https://arxiv.org/abs/2502.08448>`_, 2025

    Hartmann et al., `Lagrangian Manifold Monte Carlo on Monge Patches
    <https://arxiv.org/abs/2202.00755>`_, 2022
  """

  def shorten(alpha, slope, rho):
    del rho
    factor = _numerics.inverse_hypot(alpha * slope)
    # Where the product is too large for a number, the slope has its limit, 1/α.
    beyond = _numerics.is_infinite(alpha * slope)
    limit = jnp.sign(slope) / jnp.where(beyond, alpha, 1.0)
    return factor, jnp.where(beyond, limit, slope * factor)

  return _shortened(base, 'alpha', alpha, shorten)


def capped(
  base: metrics.Metric = metrics.euclidean(),
  sigma: _hyperparameters.Hyperparameter = 1.0,
) -> metrics.Metric:
  """A metric with its slope cut off at ``σ``: the hard edge of what Monge does softly.

  Direction and slope are those of the base, ``s``, times ``min(1, σ/s)``. So the
  first-order rise of the loss is at most ``ρσ``, and ``δ`` is the base's wherever that
  rises less. Over the Euclidean metric it is LE-SAM's, of length ``min(ρ, ρσ/‖g‖)``;
  with ``σ = 1/α`` it has the same bound as ``monge(alpha, base)``.

  Args:
    base: the metric whose slope is cut off.
    sigma: ``σ``, scalar >= 0: a number, an array or an Optax schedule. A schedule is
      counted in calls and makes the metric one with state.

  Returns:
    A :class:`Metric` with the base's state; in a :class:`MongeState` if ``sigma`` is a
    schedule.

  Raises:
    ValueError: if ``sigma`` is negative or not finite.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import capped, euclidean
    >>> metric = capped(euclidean(), sigma=2.0)
    >>> ascent, _ = metric.ascend(jnp.array([0.0, 8.0]), metric.init(None), None)
    >>> print(ascent.direction, f'{ascent.slope:.4g}')
    [0.   0.25] 2
  """

  def shorten(sigma, slope, rho):
    del rho
    size = jnp.abs(slope)  # Along a mean of gradients the loss may fall.
    reduced = jnp.minimum(size, sigma)  # NaN if σ is, and so is the factor.
    ratio = reduced / jnp.where(size > 0, size, 1.0)
    return jnp.where(size > 0, ratio, 1.0 + reduced), jnp.sign(slope) * reduced

  return _shortened(base, 'sigma', sigma, shorten)


def unit_rise(
  base: metrics.Metric = metrics.euclidean(),
  max_radius: _hyperparameters.Hyperparameter = math.inf,
) -> metrics.Metric:
  """A metric in which the radius *is* the rise of the loss, to first order.

  Call the radius ``τ``. For the base's direction ``u`` and slope ``s`` the step is as
  long as it takes to raise the loss by ``τ``, if that is less than ``ρ``, the
  ``max_radius``; the transition is smooth, and it is Monge SAM's with ``α = ρ/τ``:

      δ = τ u/√(s² + (τ/ρ)²) = ρ u/√(1 + (ρ/τ)² s²).

  With no largest radius the direction is ``u/s`` and the slope 1: over the Euclidean
  metric ``δ = τ g/‖g‖²``, the step to where the tangent plane of the loss is ``τ``
  higher. There is then no other number to tune than an allowed rise, in units of the
  loss, but the step grows without bound where the gradient vanishes: give a largest
  radius, which only matters there. Always give one over a base with a memory, such as
  :func:`smoothed`, along which the loss of a batch may be flat. Slopes smaller than the
  smallest normal number (1e-38) count as that; a zero gradient has no step.

  Args:
    base: the metric that measures the step, or a norm.
    max_radius: ``ρ``, scalar >= 0: a number, an array or an Optax schedule; infinity
      is allowed. A schedule is counted in calls and makes the metric one with state.

  Returns:
    A :class:`Metric` with the base's state; in a :class:`MongeState` if ``max_radius``
    is a schedule. Its direction is float32 or wider. A largest radius that is finite
    needs ``rho``, which every method passes.

  Raises:
    TypeError: if ``base`` is no metric.
    ValueError: if ``max_radius`` is negative or NaN; when called, if it is finite and
      there is no ``rho``.

  Examples:
    A rise of 0.1, of a loss whose gradient has the norm 5:

    >>> import jax.numpy as jnp
    >>> from msam_optax import unit_rise
    >>> metric, g = unit_rise(), jnp.array([3.0, 4.0])
    >>> ascent, _ = metric.ascend(g, metric.init(g), g)
    >>> delta = 0.1 * ascent.direction
    >>> print(delta, f'{g @ delta:.4g}')
    [0.012 0.016] 0.1
  """

  # What an array in a compiled function is, cannot be known.
  unbounded = isinstance(max_radius, (int, float)) and math.isinf(max_radius)

  def shorten(max_radius, slope, rho):
    if rho is None:
      if not unbounded:
        raise ValueError(
          'unit_rise() with a largest radius needs the radius of the step, `rho`, which'
          ' methods such as `sharpness_aware` pass to the metric. Called by itself:'
          ' `metric.ascend(grads, state, params, rho=rho)`.'
        )
      rho = 0.0
    rise = _numerics.widen(rho, like=slope)
    # As a quotient, which an infinite radius makes zero and a radius of zero infinite.
    reach = rise / jnp.where(max_radius == 0, 1.0, max_radius)
    size = jnp.abs(slope)
    larger = jnp.maximum(jnp.maximum(size, reach), jnp.finfo(slope.dtype).tiny)
    root = _numerics.inverse_hypot(jnp.minimum(size, reach) / larger)
    stays = (max_radius == 0) | _numerics.is_infinite(reach)
    factor = jnp.where(stays, 0.0, root / larger)
    return factor, slope * (1.0 / larger) * jnp.where(stays, 0.0, root)

  return _shortened(base, 'max_radius', max_radius, shorten, finite=False, widen=True)


def _shortened(
  base: metrics.Metric,
  name: str,
  number: _hyperparameters.Hyperparameter,
  shorten: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, jax.Array]],
  *,
  finite: bool = True,
  widen: bool = False,
) -> metrics.Metric:
  """The base's ascent, shortened by a function of its slope.

  Args:
    base: the metric.
    name: the name of the number, for messages.
    number: scalar >= 0 that the function needs, or a schedule.
    shorten: ``(number, slope, rho) -> (factor of the direction, new slope)``; ``rho``
      is None where the caller has none.
    finite: whether the number must be finite.
    widen: whether the direction is in float32 or wider, and not in that of the base.

  Returns:
    A :class:`Metric`.
  """
  _hyperparameters.check_hyperparameter(name, number, finite=finite)
  metrics.check_metric('base', base)

  def shortened(ascent, count=None, rho=None):
    now = _hyperparameters.value_at(name, number, count, finite=finite)
    now = _numerics.widen(now, like=ascent.slope)
    factor, slope = shorten(now, ascent.slope, rho)
    length = None if ascent.length is None else factor * ascent.length
    direction = _multiply(factor, ascent.direction, widen)
    return metrics.Ascent(direction, slope, length)

  def ascend(grads, state, params, **kwargs):
    ascent, state = base.ascend(grads, state, params, **kwargs)
    return shortened(ascent, rho=kwargs.get('rho')), state

  if not _hyperparameters.is_schedule(number):
    return metrics.Metric(base.init, ascend)

  def init_count(params):
    return MongeState(jnp.zeros([], jnp.int32), base.init(params))

  def ascend_and_count(grads, state, params, **kwargs):
    ascent, base_state = base.ascend(grads, state.base, params, **kwargs)
    ascent = shortened(ascent, state.count, kwargs.get('rho'))
    return ascent, MongeState(optax.safe_increment(state.count), base_state)

  return metrics.Metric(init_count, ascend_and_count)


def _multiply(factor, direction, widen):
  """The product in float32 or wider, rounded to the direction's dtypes unless wide."""

  return jax.tree.map(lambda d: _times(d, factor, widen), direction)


@functools.partial(jax.jit, static_argnums=2)
def _times(d, factor, widen):
  product = _numerics.widen(d) * _numerics.widen(factor, like=d)
  return product if widen else product.astype(d.dtype)
