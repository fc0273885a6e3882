"""Monge SAM and its family: sharpness-aware training as Optax transformations."""

from importlib import metadata

from msam_optax._masks import by_name
from msam_optax.averages import AverageState
from msam_optax.averages import monge_average
from msam_optax.averages import residual
from msam_optax.averages import smoothed
from msam_optax.charts import pullback
from msam_optax.combinations import Combination
from msam_optax.combinations import curvature
from msam_optax.combinations import probe_gradient
from msam_optax.combinations import rescaled
from msam_optax.combinations import surrogate_gap
from msam_optax.combinations import weighted
from msam_optax.geodesics import geodesic
from msam_optax.gradients import value_and_grad
from msam_optax.low_rank import fisher_alpha
from msam_optax.low_rank import low_rank_monge
from msam_optax.low_rank import LowRankState
from msam_optax.low_rank import neighborhood_monge
from msam_optax.low_rank import NeighborhoodState
from msam_optax.methods import asam
from msam_optax.methods import fisher_sam
from msam_optax.methods import friendly_sam
from msam_optax.methods import msam
from msam_optax.methods import sam
from msam_optax.methods import sparse_sam
from msam_optax.methods import vasso
from msam_optax.metrics import adaptive
from msam_optax.metrics import Ascent
from msam_optax.metrics import diagonal_fisher
from msam_optax.metrics import euclidean
from msam_optax.metrics import Metric
from msam_optax.mixtures import cr_sam
from msam_optax.mixtures import decoupled_wsam
from msam_optax.mixtures import gsam
from msam_optax.mixtures import look_sam
from msam_optax.mixtures import stable_sam
from msam_optax.mixtures import wsam
from msam_optax.monge import capped
from msam_optax.monge import monge
from msam_optax.monge import MongeState
from msam_optax.monge import unit_rise
from msam_optax.norms import max_norm
from msam_optax.norms import per_leaf
from msam_optax.norms import spectral
from msam_optax.occasional import reused
from msam_optax.occasional import ReusedState
from msam_optax.occasional import SteepState
from msam_optax.occasional import when_steep
from msam_optax.perturbation import perturb
from msam_optax.preconditioning import preconditioned
from msam_optax.radii import rho_following
from msam_optax.single_pass import eval_params
from msam_optax.single_pass import lagged
from msam_optax.single_pass import LaggedState
from msam_optax.single_pass import momentum_sam
from msam_optax.single_pass import MomentumSAMState
from msam_optax.spaces import LOCAL
from msam_optax.spaces import Space
from msam_optax.sparsity import sparse
from msam_optax.sparsity import SparseState
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
  'AverageState',
  'Combination',
  'LaggedState',
  'LowRankState',
  'Metric',
  'MomentumSAMState',
  'MongeState',
  'NeighborhoodState',
  'Options',
  'ReusedState',
  'SharpnessAwareState',
  'Space',
  'SparseState',
  'SteepState',
  'adaptive',
  'asam',
  'by_name',
  'capped',
  'cr_sam',
  'curvature',
  'decoupled_wsam',
  'diagonal_fisher',
  'euclidean',
  'eval_params',
  'fisher_alpha',
  'fisher_sam',
  'friendly_sam',
  'geodesic',
  'gsam',
  'lagged',
  'look_sam',
  'low_rank_monge',
  'max_norm',
  'momentum_sam',
  'monge',
  'monge_average',
  'msam',
  'neighborhood_monge',
  'normalize_by',
  'per_leaf',
  'perturb',
  'preconditioned',
  'probe_gradient',
  'pullback',
  'rescaled',
  'residual',
  'reused',
  'rho_following',
  'sam',
  'sharpness_aware',
  'smoothed',
  'sparse',
  'sparse_sam',
  'spectral',
  'stable_sam',
  'surrogate_gap',
  'unit_rise',
  'value_and_grad',
  'vasso',
  'weighted',
  'when_steep',
  'wsam',
)
