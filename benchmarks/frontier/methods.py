"""The methods of the frontier: each as a user writes it, and what it costs."""

from collections.abc import Callable
import math
from typing import Any
from typing import NamedTuple

import jax.numpy as jnp
import optax

import msam_optax

RADII = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
RISES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)


class Entry(NamedTuple):
  """A method with one number to tune.

  Attributes:
    gradients: of a step, as a multiple of the gradient of a whole batch.
    make: ``(knob, learning rate, steps) -> transformation``.
    knob: what is tuned; '' if nothing is.
    grid: its values.
    extended: whether the grid goes on where the best is at an end.
    largest: where it ends.
    parts: the gradient that is climbed is of one of so many parts of the batch.
    clean: ``(state, params) -> params`` to evaluate.
  """

  gradients: float
  make: Callable[[Any, float, int], Any]
  knob: str = 'ρ'
  grid: tuple[float, ...] = RADII
  extended: bool = True
  largest: float = math.inf
  parts: int = 1
  clean: Callable[[Any, Any], Any] = lambda state, params: params


def cosine(learning_rate: float, steps: Any) -> Callable[[Any], Any]:
  """A learning rate that goes to zero in so many steps, and stays there."""

  def schedule(count):
    done = jnp.minimum(count / steps, 1.0)
    return learning_rate * 0.5 * (1.0 + jnp.cos(jnp.pi * done))

  return schedule


def adam(learning_rate: float, steps: Any) -> optax.GradientTransformation:
  """The optimizer of all."""
  return optax.adam(cosine(learning_rate, steps))


def before(method: Callable[..., Any], **numbers: Any) -> Callable[..., Any]:
  """The method at the head of a chain, its radius the number that is tuned."""
  return lambda rho, lr, steps: optax.chain(method(rho, **numbers), adam(lr, steps))


def metric(of_monge: Callable[..., msam_optax.Metric], **numbers: Any) -> Any:
  """A metric in the two-pass transformation."""
  return before(lambda rho: msam_optax.sharpness_aware(of_monge(**numbers), rho))


def some_steps(when: Callable[[Any, int], Any]) -> Callable[..., Any]:
  """Monge SAM in the steps that a clock picks, ``(step, steps) -> bool``."""

  def make(rho, lr, steps):
    method = optax.conditionally_transform(
      msam_optax.msam(rho), lambda step, **_: when(step, steps)
    )
    return optax.chain(method, adam(lr, steps))

  return make


def around(method: Callable[..., Any], **numbers: Any) -> Callable[..., Any]:
  """A method with one gradient a step, which wraps the optimizer."""
  return lambda rho, lr, steps: method(adam(lr, steps), rho=rho, **numbers)


def decoupled(rho, lr, steps):
  """WSAM beside the optimizer."""
  return msam_optax.decoupled_wsam(adam(lr, steps), cosine(lr, steps), rho)


def steep(rho, lr, steps):
  """AE-SAM's policy, with a probe in about every other step."""
  combination = msam_optax.when_steep(threshold=0.0, decay=0.9)
  method = msam_optax.sharpness_aware(msam_optax.euclidean(), rho, combination)
  return optax.chain(method, adam(lr, steps))


def stopped(share, lr, steps):
  """Adam alone, whose learning rate is zero after a share of the steps."""
  return adam(lr, share * steps)


def rise(tau, lr, steps):
  """Monge SAM whose radius is as large as the rise allows."""
  return optax.chain(msam_optax.msam(math.inf, max_rise=tau), adam(lr, steps))


clean = msam_optax.eval_params
METHODS: dict[str, Entry] = {
  'Adam': Entry(1, lambda knob, lr, steps: adam(lr, steps), '', (0.0,)),
  'Adam, stopped early': Entry(1, stopped, 'share of steps', SHARES, largest=1.0),
  'SAM': Entry(2, before(msam_optax.sam)),
  'Monge SAM': Entry(2, before(msam_optax.msam)),
  'Monge SAM, rise τ': Entry(2, rise, 'τ', RISES),
  'Monge SAM, τ = 0.3': Entry(2, before(msam_optax.msam, max_rise=0.3)),
  'ASAM': Entry(2, before(msam_optax.asam)),
  'Fisher SAM': Entry(2, before(msam_optax.fisher_sam)),
  'GSAM': Entry(2, before(msam_optax.gsam)),
  'WSAM': Entry(2, before(msam_optax.wsam)),
  'WSAM, decoupled': Entry(2, decoupled),
  'GNP': Entry(
    2,
    before(
      lambda rho: msam_optax.sharpness_aware(
        msam_optax.euclidean(), rho, msam_optax.weighted(0.8)
      )
    ),
  ),
  'CR-SAM': Entry(3, before(msam_optax.cr_sam)),
  'Stable SAM': Entry(2, before(msam_optax.stable_sam)),
  'Friendly SAM': Entry(2, before(msam_optax.friendly_sam)),
  'VaSSO': Entry(2, before(msam_optax.vasso)),
  'Sparse SAM': Entry(2, before(msam_optax.sparse_sam)),
  'Monge of the mean': Entry(2, metric(msam_optax.monge_average)),
  'Monge of 4 gradients': Entry(2, metric(msam_optax.low_rank_monge, rank=4)),
  'geodesic, 2 steps': Entry(4, metric(msam_optax.geodesic)),
  'where steep': Entry(1.5, steep),
  'LookSAM': Entry(1.2, before(msam_optax.look_sam)),
  'LookSAM over Monge': Entry(
    1.2, before(msam_optax.look_sam, metric=msam_optax.monge())
  ),
  'every 5th step': Entry(1.2, some_steps(lambda step, steps: step % 5 == 0)),
  'last eighth': Entry(1.125, some_steps(lambda step, steps: step >= 7 * steps // 8)),
  'ascent on a fifth': Entry(1.2, before(msam_optax.msam), parts=5),
  'Momentum-SAM': Entry(1, around(msam_optax.momentum_sam), clean=clean),
  'lagged SAM': Entry(
    1, around(msam_optax.lagged, metric=msam_optax.euclidean()), clean=clean
  ),
  'lagged Monge': Entry(1, around(msam_optax.lagged), clean=clean),
}
