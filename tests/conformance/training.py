"""What the tests train, how they train it, and the cases that they do it for."""

from collections.abc import Callable
from collections.abc import Iterable
import itertools
from typing import Any

import jax
import optax
import pytest

from tests.conformance.methods import METHODS
from tests.conformance.optimizers import Optimizer
from tests.conformance.optimizers import OPTIMIZERS
from tests.conformance.targets import Target

# The methods that a plain run takes; the others are slow.
DEFAULT_METHODS = ('msam',)

# They differ in their metrics alone, and not in what an optimizer sees: Monge SAM goes
# before all optimizers, and the others before every third.
OTHER_METHODS = [name for name in METHODS if name not in DEFAULT_METHODS]
SOME_OPTIMIZERS = list(OPTIMIZERS)[::3]


def cases(*axes: Iterable[str], default: Callable[..., bool]) -> list[Any]:
  """The product of the axes as parameters of a test.

  Args:
    *axes: the names along each axis; joined they are the test's id.
    default: called with one name of each axis: whether a plain run takes this case.
      The others are slow.

  Returns:
    A list for ``pytest.mark.parametrize``.
  """
  return [
    pytest.param(
      *case, id='-'.join(case), marks=() if default(*case) else pytest.mark.slow
    )
    for case in itertools.product(*axes)
  ]


def make_step(
  tx: optax.GradientTransformationExtraArgs, optimizer: Optimizer, target: Target
) -> Callable[[Any, Any], tuple[Any, Any, Any]]:
  """``(params, state) -> (params, state, updates)``, as a user would write it.

  Args:
    tx: a method, chained with the optimizer.
    optimizer: its entry in the registry, which knows the extra arguments.
    target: what is minimised.
  """
  grad_fn = jax.grad(target.loss)

  def step(params, state):
    value, grads = jax.value_and_grad(target.loss)(params)
    extra_args = optimizer.extra_args(target.loss, value)
    updates, state = tx.update(grads, state, params, grad_fn=grad_fn, **extra_args)
    return optax.apply_updates(params, updates), state, updates

  return step
