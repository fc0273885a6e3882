"""The keyword arguments that all methods have, shown by their signatures."""

from collections.abc import Callable
import functools
import inspect
from typing import ParamSpec

import optax

from msam_optax import transformation

P = ParamSpec('P')
Transformation = optax.GradientTransformationExtraArgs


def method(make: Callable[P, Transformation]) -> Callable[P, Transformation]:
  """Shows ``**options`` as the keywords that they are.

  ``optax.inject_hyperparams`` reads signatures and cannot pass on what is not in them;
  ``help`` and editors show them.
  """
  own = inspect.signature(make)
  shared = inspect.signature(transformation.sharpness_aware).parameters
  parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
  parameters += [shared[name] for name in transformation.Options.__annotations__]
  signature = own.replace(parameters=parameters)

  @functools.wraps(make)
  def wrapped(*args: P.args, **kwargs: P.kwargs) -> Transformation:
    try:
      signature.bind(*args, **kwargs)
    except TypeError as error:
      raise TypeError(f'{make.__name__}() {error}') from None
    return make(*args, **kwargs)

  wrapped.__signature__ = signature  # pyright: ignore
  return wrapped
