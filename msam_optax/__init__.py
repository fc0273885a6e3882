"""Monge SAM and its family: sharpness-aware training as Optax transformations."""

from importlib import metadata

from msam_optax._masks import by_name
from msam_optax.charts import pullback
from msam_optax.combinations import Combination
from msam_optax.combinations import curvature
from msam_optax.combinations import probe_gradient
from msam_optax.combinations import surrogate_gap
from msam_optax.combinations import weighted
from msam_optax.geodesics import geodesic
from msam_optax.gradients import value_and_grad
from msam_optax.methods import asam
from msam_optax.methods import cr_sam
from msam_optax.methods import fisher_sam
from msam_optax.methods import gsam
from msam_optax.methods import msam
from msam_optax.methods import sam
from msam_optax.methods import wsam
from msam_optax.metrics import adaptive
from msam_optax.metrics import Ascent
from msam_optax.metrics import diagonal_fisher
from msam_optax.metrics import euclidean
from msam_optax.metrics import Metric
from msam_optax.monge import capped
from msam_optax.monge import monge
from msam_optax.monge import MongeState
from msam_optax.norms import max_norm
from msam_optax.norms import spectral
from msam_optax.perturbation import perturb
from msam_optax.spaces import LOCAL
from msam_optax.spaces import Space
from msam_optax.transformation import normalize_by
from msam_optax.transformation import Options
from msam_optax.transformation import sharpness_aware
from msam_optax.transformation import SharpnessAwareState

try:
  __version__ = metadata.version('msam-optax')
except metadata.PackageNotFoundError:  # Not installed: run from a clone.
  __version__ = '0+unknown'

__all__ = (
  'LOCAL',
  'Ascent',
  'Combination',
  'Metric',
  'MongeState',
  'Options',
  'SharpnessAwareState',
  'Space',
  'adaptive',
  'asam',
  'by_name',
  'capped',
  'cr_sam',
  'curvature',
  'diagonal_fisher',
  'euclidean',
  'fisher_sam',
  'geodesic',
  'gsam',
  'max_norm',
  'monge',
  'msam',
  'normalize_by',
  'perturb',
  'probe_gradient',
  'pullback',
  'sam',
  'sharpness_aware',
  'spectral',
  'surrogate_gap',
  'value_and_grad',
  'weighted',
  'wsam',
)
