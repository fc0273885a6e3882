"""One training step of each kind, as a user writes it.

Every step takes ``(params, opt_state)`` and a batch and returns the new pair and the
loss at the old parameters, so that all of them do the same work for their caller.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import msam_optax

RHO = 0.05
RATE = 1e-3


class Step(NamedTuple):
  """A way to take a training step.

  Attributes:
    tx: the optimizer, whose state is carried.
    run: ``((params, opt_state), batch) -> ((params, opt_state), loss)``.
    calls: how many calls of ``run`` make one step of training.
  """

  tx: optax.GradientTransformation
  run: Callable[[Any, Any], tuple[Any, jax.Array]]
  calls: int = 1


def adam(loss) -> Step:
  """Adam alone: one gradient."""
  return step(optax.adam(RATE), jax.value_and_grad(loss))


def two_gradients(loss) -> Step:
  """Monge SAM written by hand, the shortest way; the reference of every ratio."""

  def value_and_grad(params, batch):
    value, g = jax.value_and_grad(loss)(params, batch)
    n = optax.tree.norm(g)
    radius = RHO / (n * jnp.sqrt(1 + n**2))
    probe = jax.tree.map(lambda w, g: w + radius * g, params, g)
    return value, jax.grad(loss)(probe, batch)

  return step(optax.adam(RATE), value_and_grad)


def contrib_sam_opaque(loss) -> Step:
  """``optax.contrib.sam``, both gradients in one call; plain SAM."""
  adversary = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
  tx = optax.contrib.sam(optax.adam(RATE), adversary, opaque_mode=True)
  return step(
    tx, jax.value_and_grad(loss), lambda batch: lambda w, _: jax.grad(loss)(w, batch)
  )


def contrib_sam_transparent(loss) -> Step:
  """``optax.contrib.sam``, one gradient per call, two calls per step; plain SAM."""
  adversary = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
  tx = optax.contrib.sam(optax.adam(RATE), adversary)
  return step(tx, jax.value_and_grad(loss))._replace(calls=2)


def chain_msam(loss) -> Step:
  """``chain(msam, adam)``: the transformation of this library."""
  tx = optax.chain(msam_optax.msam(RHO), optax.adam(RATE))
  return step(
    tx, jax.value_and_grad(loss), lambda batch: lambda w: jax.grad(loss)(w, batch)
  )


def chain_both_passes(loss) -> Step:
  """The same chain, which takes both gradients itself, in one loop.

  It is not among ``STEPS``, as the drop-in that is compiled once is not.
  """
  tx = optax.chain(msam_optax.msam(RHO), optax.adam(RATE))

  def run(carry, batch):
    params, opt_state = carry
    f = lambda w: jax.value_and_grad(loss)(w, batch)
    no_gradient: Any = None  # Optax's types have no None.
    updates, opt_state = tx.update(no_gradient, opt_state, params, value_and_grad_fn=f)
    carry = optax.apply_updates(params, updates), opt_state
    return carry, optax.tree.get(opt_state, 'loss')

  return Step(tx, run)


def drop_in(loss) -> Step:
  """``msam_optax.value_and_grad`` instead of ``jax.value_and_grad``."""
  return step(optax.adam(RATE), msam_optax.value_and_grad(loss, rho=RHO))


def drop_in_compile_once(loss) -> Step:
  """The drop-in with both passes as two iterations of one ``lax.scan``.

  It is not among ``STEPS``: on a CPU convolutions in a scan are many times slower.
  """
  return step(
    optax.adam(RATE), msam_optax.value_and_grad(loss, rho=RHO, compile_once=True)
  )


def one_gradient(loss, tx) -> Step:
  """An optimizer that needs no other gradient than the one at its parameters."""
  return step(tx, jax.value_and_grad(loss))


HAND = 'two gradients, by hand'
OPAQUE = 'contrib.sam, opaque'
CHAIN = 'chain(msam, adam)'
BOTH_PASSES = 'chain(msam, adam), both passes'
DROP_IN = 'drop-in value_and_grad'

STEPS = {
  'adam': adam,
  HAND: two_gradients,
  OPAQUE: contrib_sam_opaque,
  'contrib.sam, transparent': contrib_sam_transparent,
  CHAIN: chain_msam,
  DROP_IN: drop_in,
}


def step(tx, value_and_grad, make_grad_fn=None) -> Step:
  def run(carry, batch):
    params, opt_state = carry
    value, grads = value_and_grad(params, batch)
    extra = {} if make_grad_fn is None else {'grad_fn': make_grad_fn(batch)}
    updates, opt_state = tx.update(grads, opt_state, params, **extra)
    return (optax.apply_updates(params, updates), opt_state), value

  return Step(tx, run)


def make_loop(
  compiled: Any, step: Step, params: Any, batch: Any, repeats: int = 1
) -> Callable[[], None]:
  """A function that takes ``repeats`` steps of training, from where it last ended."""
  # Copies, because a donated buffer may be given only once, and only by one step.
  carry = jax.tree.map(jnp.copy, (params, step.tx.init(params)))

  def loop():
    nonlocal carry
    value = None
    for _ in range(repeats * step.calls):
      carry, value = compiled(carry, batch)
    jax.block_until_ready((carry, value))

  return loop
