"""Monge SAM and its family: sharpness-aware training as Optax transformations."""

from importlib import metadata

from msam_optax.gradients import value_and_grad
from msam_optax.masks import by_name
from msam_optax.methods import asam
from msam_optax.methods import fisher_sam
from msam_optax.methods import msam
from msam_optax.methods import sam
from msam_optax.metrics import adaptive
from msam_optax.metrics import Ascent
from msam_optax.metrics import diagonal_fisher
from msam_optax.metrics import euclidean
from msam_optax.metrics import Metric
from msam_optax.metrics import monge
from msam_optax.metrics import MongeState
from msam_optax.perturbation import perturb
from msam_optax.transformation import normalize_by
from msam_optax.transformation import sharpness_aware
from msam_optax.transformation import SharpnessAwareState

try:
  __version__ = metadata.version('msam-optax')
except metadata.PackageNotFoundError:  # Not installed: run from a clone.
  __version__ = '0+unknown'

__all__ = (
  'Ascent',
  'Metric',
  'MongeState',
  'SharpnessAwareState',
  'adaptive',
  'asam',
  'by_name',
  'diagonal_fisher',
  'euclidean',
  'fisher_sam',
  'monge',
  'msam',
  'normalize_by',
  'perturb',
  'sam',
  'sharpness_aware',
  'value_and_grad',
)
