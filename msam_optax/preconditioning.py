"""The metric of a preconditioner: what scales gradients also measures steps."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from msam_optax import _devices
from msam_optax import _numerics
from msam_optax import metrics
from msam_optax import spaces


def preconditioned(transformation: optax.GradientTransformation) -> metrics.Metric:
  """The metric ``P`` of an Optax transformation that maps ``g`` to ``u = P⁻¹g``.

  The direction is ``u/√⟨g, u⟩`` and the slope ``√⟨g, u⟩``. So a step is long where the
  optimizer's is, as here, with Adam's second moments and ``P = diag(√v + ε)``::

      preconditioned(optax.scale_by_adam(b1=0.0))

  It takes what *scales* a gradient, by a positive definite ``P``: no whole optimizer,
  whose updates have a minus sign, and nothing with momentum, which goes elsewhere.
  *The direction is NaN* where ``⟨g, u⟩`` is not positive and ``g`` is not zero.

  The radius is measured by ``P``: where the second moments are small, as late in a
  training, the same ``ρ`` is a longer step.

  With replicas (``axis_name``) the transformation gets the mean gradient, and all go
  the same way. A gradient that is not finite leaves its state as it was, and so does
  one that would make the state so, as a square may.

  Args:
    transformation: any :class:`optax.GradientTransformation`. It sees the leaves that
      are perturbed, an ``optax.MaskedNode`` for each of the others, as within
      ``optax.masked``; and extra arguments of ``update``, if it takes such.

  Returns:
    A :class:`Metric` with the transformation's state.

  Raises:
    TypeError: if ``transformation`` is no Optax transformation.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from msam_optax import preconditioned
    >>> metric, w = preconditioned(optax.scale_by_rms(decay=0.0)), jnp.zeros(2)
    >>> g = jnp.array([1.0, 8.0])
    >>> ascent, _ = metric.ascend(g, metric.init(w), w)
    >>> print(ascent.direction, f'{ascent.slope:.4g}')
    [0.3333 0.3333] 3
  """
  if not isinstance(transformation, optax.GradientTransformation):
    raise TypeError(
      '`transformation` must be an Optax transformation that scales gradients, such as'
      f' `optax.scale_by_rms()`, got {transformation!r}.'
    )
  transformation = optax.with_extra_args_support(transformation)

  def ascend(grads, state, params, *, space=spaces.LOCAL, **extra_args):
    grads = space.mean(grads)
    u, new_state = transformation.update(grads, state, params, **extra_args)
    unit, norm = space.normalize(grads)
    u_unit, u_norm = space.normalize(u)
    cosine = space.dot(unit, u_unit)
    # Of √⟨g, u⟩ = √(‖g‖ ‖u‖ cos) as three roots: the product may overflow.
    positive = (norm == 0) | (cosine > 0)
    root = jnp.sqrt(jnp.where(cosine > 0, cosine, 1.0))
    size = jnp.sqrt(u_norm) / jnp.sqrt(jnp.where(norm > 0, norm, 1.0)) / root
    factor = jnp.where(norm > 0, size, 0.0) + _numerics.zero_if(positive, size.dtype)
    direction = jax.tree.map(
      lambda x, g: (x * factor.astype(x.dtype)).astype(jnp.result_type(g)),
      u_unit,
      grads,
    )
    slope = jnp.sqrt(norm) * jnp.sqrt(u_norm) * jnp.where(norm > 0, root, 0.0)
    slope += _numerics.zero_if(positive, slope.dtype)
    sound = spaces.all_finite(grads, space.param_specs) & _all_finite(
      new_state, grads, space.param_specs
    )
    state = jax.tree.map(lambda new, old: jnp.where(sound, new, old), new_state, state)
    return metrics.Ascent(direction, slope), state

  return metrics.Metric(transformation.init, ascend)


def _all_finite(state: Any, grads: Any, param_specs: Any) -> jax.Array:
  """Whether a state is finite on all devices that have parts of the gradients."""
  axes = {a for names in _devices.leaf_axes(param_specs, grads) for a in names}
  bad = jnp.where(spaces.all_finite(state), 0.0, 1.0)
  return _devices.maxima([bad], [tuple(sorted(axes))])[0] == 0
