"""Every metric of the library keeps the contract."""

import functools
import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax
from msam_optax import Ascent
from msam_optax import Metric
from msam_optax import testing
from tests.methods import cases
from tests.testing.examples import arrays
from tests.testing.examples import G
from tests.testing.examples import G_OTHER
from tests.testing.examples import G_PROBE
from tests.testing.examples import W


def flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def public(kind):
  """The public functions that return a metric, a combination or a method."""
  return {
    name
    for name in msam_optax.__all__
    if inspect.isfunction(function := getattr(msam_optax, name))
    and typing.get_type_hints(function).get('return') is kind
  }


def of_monge(alpha, base):
  return lambda g, w: base(g, w) + alpha**2 * np.outer(g, g)


def identity(g, w):
  return np.eye(len(g))


def of_adaptive(g, w):
  return np.diag((np.abs(w) + 0.1) ** -2)


ADAPTIVE = msam_optax.adaptive(0.1, weights=True)
GRADIENTS = jax.tree.map(
  lambda *xs: jnp.stack(xs).astype(jnp.float32), G_PROBE, G_OTHER
)


METRICS = {
  'euclidean': (msam_optax.euclidean(), identity, {'scale_invariant': True}),
  'adaptive': (ADAPTIVE, of_adaptive, {'scale_invariant': True}),
  'diagonal_fisher': (
    msam_optax.diagonal_fisher(0.7),
    lambda g, w: np.diag(1 + 0.7 * g**2),
    {},
  ),
  'max_norm': (msam_optax.max_norm(), None, {'scale_invariant': True}),
  'spectral': (
    msam_optax.spectral(),
    None,
    {'scale_invariant': True, 'sharded': False, 'rtol': 1e-3},
  ),
  'monge': (msam_optax.monge(1.5), of_monge(1.5, identity), {}),
  'sparse': (msam_optax.sparse(sparsity=0.0), identity, {}),
  'per_leaf': (msam_optax.per_leaf(ADAPTIVE, {'kernel': 0.5, 'rest': 2.0}), None, {}),
  'capped': (
    msam_optax.capped(sigma=0.3),
    lambda g, w: np.eye(len(g)) * max(1, np.linalg.norm(g) / 0.3) ** 2,
    {},
  ),
  'unit_rise': (
    msam_optax.unit_rise(),
    lambda g, w: np.eye(len(g)) * (g @ g),
    {},
  ),
  'unit_rise over adaptive': (
    msam_optax.unit_rise(ADAPTIVE, max_radius=0.2),
    lambda g, w: (
      of_adaptive(g, w) * (g @ np.linalg.solve(of_adaptive(g, w), g) + (0.1 / 0.2) ** 2)
    ),
    {},
  ),
  # In the first step of those with a memory it is of this gradient.
  'smoothed': (msam_optax.smoothed(ADAPTIVE), of_adaptive, {'scale_invariant': True}),
  'residual': (msam_optax.residual(), identity, {'scale_invariant': True}),
  'monge_average': (
    msam_optax.monge_average(0.5, 3.0, ADAPTIVE),
    of_monge(1.5, of_adaptive),
    {},
  ),
  'low_rank_monge': (
    msam_optax.low_rank_monge(2, 1.5, ADAPTIVE),
    of_monge(1.5, of_adaptive),
    {},
  ),
  'low_rank_monge, of given gradients': (
    msam_optax.low_rank_monge(),
    np.eye(6) + 0.5 * sum(np.outer(g, g) for g in map(flat, (G_PROBE, G_OTHER))),
    {'sharded': False, 'gradients': GRADIENTS},
  ),
  'neighborhood_monge': (  # The loss is linear there.
    msam_optax.neighborhood_monge(2, 0.1, 1.5, key=jax.random.key(0)),
    of_monge(1.5, identity),
    {},
  ),
  'preconditioned': (
    msam_optax.preconditioned(optax.scale_by_rms(0.9, eps=1e-4)),
    lambda g, w: np.diag(np.sqrt(0.1 * g**2 + 1e-4)),
    {'magnitudes': (1e-15, 1e15)},  # Of larger numbers the squares overflow.
  ),
  # The loss is linear here, and its surface flat.
  'geodesic': (msam_optax.geodesic(2, 1.5), of_monge(1.5, identity), {}),
  'pullback': (
    msam_optax.pullback(lambda p: jax.tree.map(jnp.sinh, p), 1.5, 0.1),
    of_monge(1.5, lambda g, w: np.diag(np.cosh(w) ** 2 + 0.1)),
    {},
  ),
  'monge over adaptive': (
    msam_optax.monge(1.5, ADAPTIVE),
    of_monge(1.5, of_adaptive),
    {},
  ),
  'monge over max_norm': (msam_optax.monge(1.5, msam_optax.max_norm()), None, {}),
  'monge, a schedule': (
    msam_optax.monge(lambda count: 1.5 / (1.0 + count.astype(jnp.float32))),
    of_monge(1.5, identity),
    {},
  ),
}


def test_every_metric_is_here():
  missing = public(Metric) - set(METRICS)
  assert not missing, f'Add a row with its matrix to METRICS in {__file__}: {missing}'


def test_the_state_of_every_metric_can_be_mapped_over():
  for name, (metric, *_) in METRICS.items():
    tx = msam_optax.sharpness_aware(metric, 0.1)
    state = tx.init(arrays(W))
    mapped = optax.tree.map_params(tx, lambda x: x, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state), name


@pytest.mark.parametrize('name', cases(METRICS, plain=lambda name: name == 'monge'))
def test_every_metric_keeps_the_contract(name):
  metric, matrix, options = METRICS[name]
  testing.assert_metric(metric, arrays(G), arrays(W), matrix=matrix, **options)


@pytest.mark.slow
@pytest.mark.usefixtures('x64')
def test_metrics_keep_the_contract_in_float64():
  metric, matrix, options = METRICS['monge over adaptive']
  w, g = (arrays(tree['kernel'], jnp.float64) for tree in (W, G))
  testing.assert_metric(metric, g, w, matrix=matrix, **options)


@pytest.mark.slow
def test_metrics_keep_the_contract_for_scalars_and_mixed_dtypes():
  w = {'a': jnp.asarray(0.7, jnp.bfloat16), 'b': jnp.array([0.2, -0.5, 0.1])}
  g = jax.tree.map(lambda x: x + 1, w)
  testing.assert_metric(msam_optax.monge(), g, w)


def test_a_matrix_as_an_array_and_extra_arguments():
  B = np.diag([1.0, 4.0, 9.0])

  def ascend(grads, state, params, *, B, space, **extra_args):
    unit, norm = space.normalize(grads)
    u = jnp.linalg.solve(jnp.asarray(B, jnp.result_type(unit)), unit)
    root = jnp.sqrt(jnp.where(norm > 0, space.dot(unit, u), 1.0))
    return Ascent((u / root).astype(grads.dtype), norm * root), state

  dense = Metric(lambda params: (), ascend)
  w, g = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.5, -1.0, 2.0])
  check = functools.partial(testing.assert_metric, dense, g, w, sharded=False, B=B)
  check(matrix=B)
  with pytest.raises(AssertionError, match='The direction is of length one'):
    check(matrix=np.diag([1.0, 4.0, 8.0]))
