"""The methods of the frontier: each as a user writes it, and what it costs."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import optax

import msam_optax


class Entry(NamedTuple):
  """A method with one number to tune.

  Attributes:
    gradients: of a step, on average; of whole batches.
    make: ``(knob, base optimizer, steps) -> transformation``.
    knob: the name of the number, ``ρ`` or ``τ``; None if there is none.
    parts: of how many parts of a batch one is climbed.
    clean: ``(state, params) -> params`` to evaluate.
  """

  gradients: float
  make: Callable[[Any, Any, int], Any]
  knob: str | None = 'ρ'
  parts: int = 1
  clean: Callable[[Any, Any], Any] = lambda state, params: params


def before(method: Callable[..., Any], **numbers: Any) -> Callable[..., Any]:
  """The method at the head of a chain, with its radius as the knob."""
  return lambda rho, base, steps: optax.chain(method(rho, **numbers), base)

METHODS = {
  'Adam': Entry(1, lambda rho, base, steps: base, knob=None),
  'SAM': Entry(2, before(msam_optax.sam)),
  'Monge SAM': Entry(2, before(msam_optax.msam)),
}
