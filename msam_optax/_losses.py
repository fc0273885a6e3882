"""The user's loss: called, differentiated, and what it returns checked."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from msam_optax import _checks
from msam_optax import _devices
from msam_optax import _masks
from msam_optax import _numerics


class Output(NamedTuple):
  """What a pass returns beside gradients.

  Attributes:
    value: scalar, the loss; its total, float32 or wider, where it has a weight.
    weight: scalar, float32 or wider, what the total is to be divided by; None if the
      loss has none, so that all micro-batches count the same.
    aux: the auxiliary output, or None.
    marks: what is not finite in the steps to probes, a tree like the gradients at them,
      see :class:`_passes.Probes`; None where the gradients are marked already.
  """

  value: Any
  weight: jax.Array | None
  aux: Any
  marks: Any = None


Pass = Callable[..., tuple[Output, Any]]


def differentiated(
  loss_fn: Callable[..., Any],
  argnums: int | Sequence[int],
  *,
  has_aux: bool,
  has_weight: bool,
  loss_scale: float | jax.Array | None,
) -> Pass:
  """One pass: a loss and its gradient.

  What is differentiated is about ``loss_scale · total / weight``; the gradient is that
  of ``total / weight``, or of ``total`` where the weight is zero.

  Args:
    loss_fn: returns a scalar, or ``(total, weight)``; of that and ``aux`` a pair.
    argnums: the position of the parameters, or positions.
    has_aux: whether there is an ``aux``.
    has_weight: whether there is a weight.
    loss_scale: scalar > 0, or None.

  Returns:
    ``(*args, **kwargs) -> (Output, grads)``. With a weight or a scale the gradients are
    float32 or wider, otherwise in the dtypes of the parameters.
  """

  def scaled(*args, **kwargs):
    loss, weight, aux = _parts(loss_fn(*args, **kwargs), has_aux, has_weight)
    factor = _factor(loss, weight, loss_scale)
    value = loss if weight is None else _numerics.widen(loss, like=(loss, weight))
    return loss if factor is None else loss * factor, (
      Output(value, weight, aux),
      factor,
    )

  value_and_grad_fn = jax.value_and_grad(scaled, argnums, has_aux=True)

  def one_pass(*args, **kwargs):
    (_, (output, factor)), grads = value_and_grad_fn(*args, **kwargs)
    if factor is None:
      return output, grads
    check_weight_is_summed(output.weight, grads)
    # The factor as it was rounded to the dtype of the loss.
    scale = _numerics.widen(factor, like=(factor, output.weight)) * _numerics.divisor(
      output.weight
    )
    return output, map_gradients(lambda g: _divide(_numerics.widen(g), scale), grads)

  return one_pass


def map_gradients(f: Callable[..., Any], grads: Any, *others: Any) -> Any:
  """``f`` of each gradient; new values that Flax puts there instead stay."""
  return jax.tree.map(
    lambda replaced, g, *xs: g if replaced else f(g, *xs),
    _masks.overwritten(grads),
    grads,
    *others,
  )


def check_weight_is_summed(weight: Any, grads: Any) -> None:
  """Raises if gradients in ``shard_map`` are sums over an axis, and weights are not.

  Args:
    weight: scalar, or None.
    grads: the gradients of the total.

  Raises:
    ValueError: if the weight may differ along an axis along which a gradient does not.
  """
  if weight is None:
    return
  for path, g in jax.tree_util.tree_leaves_with_path(grads):
    where = _masks.at_path(path)
    for axis in sorted(_devices.varying_axes(weight) - _devices.varying_axes(g)):
      raise ValueError(
        f'The weight may differ along the axis {axis!r}, but the gradient'
        f' {where} is summed over it already, as shard_map does with those of'
        ' replicated parameters. Cast the parameters,'
        f' {_devices.cast_hint(axis)}, and name the axis in `axis_name`; or let'
        f' `loss_fn` sum both, `jax.lax.psum((total, weight), {axis!r})`.'
      )


def _divide(g, scale):
  return g / scale.astype(g.dtype)


def _factor(loss, weight, loss_scale):
  """What a loss is multiplied by before it is differentiated, in its dtype.

  Its weight is rounded to a power of two for that, which costs no bit of a gradient in
  half precision; the rest is divided by in float32.
  """
  if weight is None and loss_scale is None:
    return None
  scale = _numerics.widen(
    1.0 if loss_scale is None else loss_scale, like=(loss, weight)
  )
  if weight is not None:
    # Within what the dtype of the loss holds with room for the loss itself.
    reach = 2.0 ** (jnp.finfo(jnp.result_type(loss)).maxexp * 3 // 4)
    count = jnp.clip(_numerics.divisor(weight), 1 / reach, reach)
    nexp = jnp.finfo(count.dtype).nexp
    scale = scale / jax.lax.reduce_precision(count, nexp, mantissa_bits=0)
  return scale.astype(jnp.result_type(loss))


def _parts(result, has_aux, has_weight):
  """The loss, its weight and the auxiliary output, of what ``loss_fn`` returns."""
  first = '(total, weight)' if has_weight else 'loss'
  aux = weight = None
  if has_aux:
    result, aux = _pair(result, 'has_aux', f'({first}, aux)')
  if has_weight:
    form = f'({first}, aux)' if has_aux else first
    result, weight = _pair(result, 'has_weight', form)
    _check_number('weight', weight, (jnp.floating, jnp.integer), 'an integer or real')
    weight = jax.lax.stop_gradient(_numerics.widen(weight, like=(result, weight)))
  elif isinstance(result, (tuple, list)):
    aux_hint = 'say `has_aux=True` if they are `(loss, aux)`, and '
    raise TypeError(
      'The loss that `loss_fn` returns must be a scalar, not'
      f' {_checks.kind_of(result)}: {"" if has_aux else aux_hint}say'
      ' `has_weight=True` if they are `(total, weight)`.'
    )
  name = 'total' if has_weight else 'loss'
  _check_number(name, result, (jnp.floating,), 'a real')
  return result, weight, aux


def _pair(result, argument, form):
  if not isinstance(result, (tuple, list)) or len(result) != 2:
    raise TypeError(
      f'With `{argument}=True`, `loss_fn` must return `{form}`, not'
      f' {_checks.kind_of(result)}.'
    )
  return result


def _check_number(name, value, kinds, what):
  try:
    kind = jax.typeof(value)
  except TypeError:
    raise TypeError(
      f'The {name} that `loss_fn` returns must be {what} scalar, not'
      f' {_checks.kind_of(value)}.'
    ) from None
  if jnp.shape(value):
    raise ValueError(
      f'The {name} that `loss_fn` returns must be a scalar, but has shape'
      f' {jnp.shape(value)}: take the sum or the mean.'
    )
  if not any(jnp.issubdtype(kind.dtype, k) for k in kinds):
    raise TypeError(
      f'The {name} that `loss_fn` returns must be {what} scalar, but has dtype'
      f' {kind.dtype}.'
    )
