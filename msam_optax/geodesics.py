"""The geodesic of the loss surface, in place of its tangent.

Monge SAM takes a straight step ``δ`` in the parameters. On the surface of the points
``z = (w, αℓ(w))`` that is the tangent of a curve without detours, the geodesic, which
is ``ρ`` long. The height ``αℓ`` is one of the coordinates of ``z``, and rises by no
more than the curve is long: at its end **the loss has risen by at most ``ρ/α``**, and
that is true of any loss, not only to first order.

A geodesic changes its velocity ``V = (v, u)`` only along the normal of the surface
``N = (−αg, 1)/√(1 + α²‖g‖²)``. So half a step along ``v``, a reflection of ``V`` at the
tangent plane there, and half a step along the new ``v``::

    V ← V − 2⟨V, N⟩N

A reflection changes no length, so the speed is the same for ever, however large the
radius and however crude the steps. It is symmetric in time and hence exact to second
order. It needs no second derivative, and one gradient. And halfway through it ``V``
lies in the tangent plane, ``(u + u′)/2 = α⟨g, (v + v′)/2⟩``: the height as it is summed
up is α times the rise of the loss that these gradients see.
"""

from typing import Any

import jax
import jax.numpy as jnp

from msam_optax import _hyperparameters
from msam_optax import _numerics
from msam_optax import metrics
from msam_optax import perturbation
from msam_optax import spaces
from msam_optax.monge import monge
from msam_optax.monge import MongeState


def geodesic(
  steps: int = 2, alpha: _hyperparameters.Hyperparameter = 1.0
) -> metrics.Metric:
  """Monge SAM along the geodesic ``γ`` of the loss surface instead of its tangent.

  The probe is ``γ(1)``, the end of the curve with

      γ″ = −α² (γ′ᵀHγ′) g / (1 + α²‖g‖²),   γ(0) = w,   γ′(0) = δ,

  ``g`` and ``H`` at ``γ`` and ``δ`` of Monge SAM, so the direction is ``(γ(1) − w)/ρ``.
  On the surface ``{(w, αℓ(w))}`` it is ``ρ`` long. Along it the loss rises by at most
  ``ρ/α``, *for any loss*; for the straight probe of :func:`monge` that bound holds to
  first order only. In ``steps`` steps the curve is followed up to an error that falls
  with ``steps²``; the rise is at most ``ρ/α + Lρ²/(4 · steps)`` then, for a loss whose
  curvature is at most ``L``.

  Each step costs one gradient, in addition to those at the params and at the probe: a
  training step has ``2 + steps``. Second derivatives are not needed. (With
  ``compile_once`` of the drop-in the steps are taken in both turns of the loop.)

  The slope is that of the tangent, Monge's, so that it is ``⟨g, direction⟩`` only in
  the limit of a small radius, or where the loss is linear. ``α = 0`` is SAM.

  Args:
    steps: the number of steps, int >= 1.
    alpha: ``α``, scalar >= 0: a number, an array or an Optax schedule. A schedule
      is counted in calls and makes the metric one with state.

  Returns:
    A :class:`Metric` without state; with a :class:`MongeState` if ``alpha`` is a
    schedule. Its ``ascend`` needs the params, ``rho`` and ``grad_fn``. If a gradient on
    the way is not finite, neither is the direction.

  Raises:
    TypeError: if ``steps`` is no integer.
    ValueError: if ``steps`` is less than 1, or ``alpha`` negative or not finite; when
      called, without params, ``rho`` or ``grad_fn``.

  Examples:
    With ``ρ = 1`` and ``α = 1`` the loss may rise by 1. It rises by 1.864 to the
    straight probe.

    >>> import jax, jax.numpy as jnp
    >>> from msam_optax import geodesic, LOCAL, monge, perturb
    >>> loss = lambda w: (1 - w[0] * w[1]) ** 2
    >>> w, grad_fn = jnp.array([2.0, 0.3]), jax.grad(loss)
    >>> for metric in (monge(), geodesic(steps=2), geodesic(steps=16)):
    ...   ascent, _ = metric.ascend(
    ...     grad_fn(w), metric.init(w), w, space=LOCAL, rho=1.0, grad_fn=grad_fn)
    ...   print(f'{loss(perturb(w, ascent, rho=1.0)) - loss(w):.3f}')
    1.864
    0.905
    0.940

  References:
    Jacobsen & Arvanitidis, `Monge SAM: Robust Reparameterization-Invariant
    Sharpness-Aware Minimization Based on Loss Geometry
    <https://arxiv.org/abs/2502.08448>`_, 2025 (the tangent)

    Hartmann et al., `Lagrangian Manifold Monte Carlo on Monge Patches
    <https://arxiv.org/abs/2202.00755>`_, 2022 (the equation of the geodesic)
  """
  _hyperparameters.check_whole('steps', steps)
  tangent = monge(alpha)

  def ascend(
    grads,
    state,
    params,
    *,
    space=spaces.LOCAL,
    rho: Any = None,
    grad_fn: Any = None,
    **extra_args,
  ):
    del extra_args
    _check_given(params=params, rho=rho, grad_fn=grad_fn)
    count = state.count if isinstance(state, MongeState) else None
    start, state = tangent.ascend(grads, state, params, space=space)
    alpha_now = _numerics.widen(
      _hyperparameters.value_at('alpha', alpha, count), like=start.slope
    )

    way = jax.tree.map(lambda d: jnp.zeros_like(_numerics.widen(d)), start.direction)
    velocity = jax.tree.map(_numerics.widen, start.direction), alpha_now * start.slope
    for _ in range(steps):
      way = _move(way, velocity, 0.5 / steps)
      at = perturbation.perturb(params, start._replace(direction=way), rho)
      velocity = _reflect(velocity, grad_fn(at), alpha_now, space)
      way = _move(way, velocity, 0.5 / steps)

    # A clean gradient that is zero or not finite has no geodesic.
    direction = jax.tree.map(
      lambda x, d: jnp.where(start.slope == 0, 0.0, x).astype(d.dtype),
      way,
      start.direction,
    )
    return metrics.Ascent(direction, start.slope), state

  return metrics.Metric(tangent.init, ascend)


def _move(way, velocity, time):
  return jax.tree.map(lambda x, v: x + time * v, way, velocity[0])


def _reflect(velocity, grads, alpha, space):
  """The velocity, reflected at the plane that is tangent to the surface.

  Args:
    velocity: ``(v, u)``, along the params, a pytree, and along the height.
    grads: the gradient there, a pytree like the params.
    alpha: ``α``, scalar.
    space: what sums over leaves and devices.

  Returns:
    ``(v, u)``; NaN if the gradient is not finite.
  """
  v, u = velocity
  finite = spaces.all_finite(grads, space.param_specs)
  unit, norm = space.normalize(grads)
  # The normal (−sin · g/‖g‖, cos), also where α‖g‖ is too large for a number.
  cos = _numerics.inverse_hypot(alpha * norm)
  beyond = _numerics.is_infinite(alpha * norm)
  sin = jnp.where(beyond, 1.0, jnp.where(beyond, 0.0, alpha * norm) * cos)
  along = cos * u - sin * space.dot(unit, v) + _numerics.zero_if(finite, u.dtype)
  v = jax.tree.map(
    lambda x, e: x + (2.0 * along * sin).astype(x.dtype) * e.astype(x.dtype), v, unit
  )
  return v, u - 2.0 * along * cos


def _check_given(**given):
  if missing := [name for name, x in given.items() if x is None]:
    raise ValueError(
      'geodesic() follows the loss from the params to the probe, and was given no'
      f' `{missing[0]}`. `sharpness_aware(geodesic(), rho)` and'
      ' `value_and_grad(loss_fn, geodesic(), rho)` give all that it needs;'
      ' `normalize_by` does not, and takes `monge()`, the tangent.'
    )
