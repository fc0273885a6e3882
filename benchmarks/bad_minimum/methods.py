"""The methods that leave the bad minimum, or do not: each a radius along the gradient.

    SGD           0
    SAM           ρ
    Monge SAM     ρ/√(1 + α²n²) = (1/ρ² + n²/σ²)^(-1/2)       n = ‖g‖,  σ = ρ/α
    LE-SAM        min(ρ, σ/n)
    SAM, matched  the mean over a run of Monge SAM
    α from 0      Monge SAM, whose α goes from 0 to its value in the first half

Monge SAM and LE-SAM both promise that the first-order rise of the loss, radius times
n, is at most σ: the one bends towards it, the other is cut off.
"""

import functools

import jax
import optax

from benchmarks.common.grid import MATCHED
from benchmarks.common.grid import MONGE
from benchmarks.common.grid import SAM
from msam_optax import capped
from msam_optax import msam
from msam_optax import sam
from msam_optax import sharpness_aware

SGD, LE_SAM, ANNEALED = 'SGD', 'LE-SAM', 'Monge SAM, α from 0'


def le_sam(rho: float | jax.Array, alpha: float | jax.Array = 1.0):
  """LE-SAM's radius, ``min(ρ, σ/n)`` with ``σ = ρ/α``: Monge SAM's, with a hard edge.

  Args:
    rho: ``ρ``, the largest radius.
    alpha: ``α``; ``ρ/α`` is the largest first-order rise of the loss.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`.

  References:
    arXiv 2605.10183
  """
  return sharpness_aware(capped(sigma=1.0 / alpha), rho)


# Made once: steps are compiled for the very functions that a transformation holds.
@functools.cache
def optimizers(
  learning_rate: float, alpha: float, steps: int
) -> dict[str, optax.GradientTransformation]:
  """The transformation of each method; ``rho`` is in its state, set run by run."""
  rising = optax.linear_schedule(0.0, alpha, steps // 2)
  sgd = optax.sgd(learning_rate)
  inject = optax.inject_hyperparams
  two_pass = {
    SAM: inject(sam)(rho=0.0),
    MONGE: inject(msam)(rho=0.0, alpha=alpha),
    LE_SAM: inject(le_sam)(rho=0.0, alpha=alpha),
    ANNEALED: inject(msam)(rho=0.0, alpha=rising),
  }
  methods = {name: optax.chain(tx, sgd) for name, tx in two_pass.items()}
  return {SGD: sgd, **methods, MATCHED: methods[SAM]}
