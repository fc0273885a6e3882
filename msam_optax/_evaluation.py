"""The user's gradient function: found, called, and its result checked."""

from collections.abc import Callable
from collections.abc import Mapping
import difflib
import inspect
from typing import Any

import jax
import jax.numpy as jnp

from msam_optax import _checks
from msam_optax import _masks

# Extra arguments of ours and of Optax's own, which are not misspelt.
EXTRA_ARGS = frozenset(
  ('grad_fn', 'value_and_grad_fn', 'value', 'grad', 'value_fn', 'obj_fn')
)


def evaluation(
  grad_fn: Callable[..., Any] | None,
  value_and_grad_fn: Callable[..., Any] | None,
  extra_args: Mapping[str, Any],
) -> Callable[..., tuple[Any, Any]]:
  """The function that the user has given to ``update``, in one form.

  Args:
    grad_fn: ``params -> grads``, or None.
    value_and_grad_fn: ``params -> (value, grads)``, or None.
    extra_args: the other extra arguments, among which may be a misspelt one.

  Returns:
    ``(params, like, dtypes) -> (value or None, grads)``, which raises unless the
    result has the structure, shapes and (if asked) dtypes of ``like``. Without that it
    is the clean pass, which is compared with the params, and may have None.

  Raises:
    TypeError: if what is given is no function.
    ValueError: if not exactly one of the two functions is given.
  """
  if grad_fn is None and value_and_grad_fn is None:
    raise ValueError(_missing(extra_args))
  for name, function in (
    ('grad_fn', grad_fn),
    ('value_and_grad_fn', value_and_grad_fn),
  ):
    if function is not None and not callable(function):
      raise TypeError(
        f'`{name}` must be a function of the parameters, got a'
        f' {type(function).__name__}: `{name}=lambda params: ...`.'
      )
  if grad_fn is not None and value_and_grad_fn is not None:
    raise ValueError(
      'Both `grad_fn` and `value_and_grad_fn` are given: give only the latter,'
      ' which returns the gradient as well.'
    )

  def evaluate(params, like=None, *, dtypes=False):
    if value_and_grad_fn is not None:
      value, grads = _pair(_call('value_and_grad_fn', value_and_grad_fn, params))
      what = 'The gradient that `value_and_grad_fn` returns'
    else:
      value, grads = None, _call('grad_fn', grad_fn, params)
      what = _checks.gradient_hint(grads, params if like is None else like)
      what += 'What `grad_fn` returns'
    if like is None:
      what += ' must be like the params'
      like = _masks.leave_out(params, _masks.has_leaf(grads, params))
    else:
      what += ' must be like the gradients given to `update` (None where they are)'
    _checks.check_like(grads, like, what=what, dtypes=dtypes)
    return value, grads

  return evaluate


def _missing(extra_args):
  similar = [
    name
    for name in sorted(set(extra_args) - EXTRA_ARGS)
    if difflib.get_close_matches(name, ['grad_fn', 'value_and_grad_fn'])
  ]
  misspelt = f' It was given {similar}: a misspelling?' if similar else ''
  return (
    'A sharpness-aware transformation takes the gradient a second time, at'
    ' perturbed parameters, and needs a function for it: `tx.update(grads,'
    ' state, params, grad_fn=grad_fn)`, where `grad_fn = lambda params:'
    f' jax.grad(loss)(params, batch)`.{misspelt} Or it takes both:'
    ' `tx.update(None, state, params, value_and_grad_fn=f)`. In Flax use'
    ' `msam_optax.flax_linen.TrainState`, which forwards it to `tx`, as its own does'
    ' not. Where nothing can be passed, or a wrapper does not forward it'
    ' (optax.MultiSteps inside a chain), take gradients with'
    ' `msam_optax.value_and_grad` and leave this one out.'
  )


def _call(name, function, probe):
  try:
    return function(probe)
  except Exception as error:
    error.add_note(
      f'This came from the `{name}` given to `update`, which is called with the'
      f' parameters alone, a {type(probe).__name__}.{_advice(name, function, probe)}'
    )
    raise


def _advice(name, function, probe):
  """What to write instead, as far as the call tells."""
  auxiliary = (
    ' If the loss returns an auxiliary output, say so and drop it: `lambda params:'
    ' jax.grad(loss, has_aux=True)(params)[0]`.'
  )
  try:
    inspect.signature(function).bind(probe)
  except TypeError:
    return (
      f' It takes other arguments. Bind them: `{name}=lambda params:'
      ' jax.grad(loss)(params, batch)`; and one for optax.contrib.sam, which is called'
      ' with a step as well, `lambda params: grad_fn(params, 0)`.'
    )
  except ValueError:  # Some functions have no signature.
    pass
  if type(probe).__module__.startswith('flax.nnx'):
    return (
      f' A loss of an NNX model wants the model: `{name}=flax_nnx.{name}(loss, model,'
      ' batch)`, made before the clean pass, with `from msam_optax import flax_nnx`.'
    )
  if isinstance(probe, jax.Array) and jnp.ndim(probe) == 1:
    return (
      ' If your parameters are something else than one vector, the transformation'
      ' stands inside optax.flatten: put it before, as in `optax.chain(msam(),'
      f' optax.flatten(optax.adam(1e-3)))`.{auxiliary}'
    )
  return auxiliary


def _pair(result):
  if not (isinstance(result, tuple) and len(result) == 2):
    raise ValueError(
      '`value_and_grad_fn` must return `(value, grads)`, as what'
      f' `jax.value_and_grad` makes does, not a {type(result).__name__}.'
    )
  value, _ = result
  if not _checks.is_scalar(value):
    raise ValueError(
      'The value that `value_and_grad_fn` returns must be a scalar, not'
      f' {_checks.kind_of(value)}. With `has_aux=True` drop the'
      ' auxiliary output: `lambda params: (f(params)[0][0], f(params)[1])`. To keep it,'
      ' take gradients with `msam_optax.value_and_grad(..., has_aux=True)`, for a plain'
      ' optimizer.'
    )
  return result
