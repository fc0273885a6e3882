"""The registry of methods: every one that ``msam_optax`` makes public."""

from typing import Any

import optax

import msam_optax

# The arguments of each method, but for its radius. All coordinates are weights, so that
# ASAM is not SAM where the parameters are vectors.
METHODS: dict[str, dict[str, Any]] = {
  'msam': {},
  'sam': {},
  'asam': {'weights': True},
  'fisher_sam': {},
  'sharpness_aware': {
    'metric': msam_optax.monge(0.5, base=msam_optax.adaptive(weights=True))
  },
}


def make_method(name: str, rho: Any = 0.05) -> optax.GradientTransformationExtraArgs:
  """The method with a radius, a number or a schedule."""
  return getattr(msam_optax, name)(rho=rho, **METHODS[name])
