"""How the tests train, and before which optimizers which methods stand."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from tests.contracts.optimizers import Optimizer
from tests.contracts.optimizers import OPTIMIZERS
from tests.contracts.targets import Target

# Methods differ in metric and combination, and not in what an optimizer sees: the
# default one goes before all optimizers, and the others before a few.
SOME_OPTIMIZERS = list(OPTIMIZERS)[::9]


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
