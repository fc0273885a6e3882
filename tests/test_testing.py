"""The assertions hold for what the library has, and fail for what is broken.

A broken metric, combination or method differs from a good one in one thing, and the
error has to name that thing.
"""

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
from msam_optax import Combination
from msam_optax import Metric
from msam_optax import testing
from tests.methods import cases
from tests.methods import is_default
from tests.methods import METHODS as ROWS
from tests.methods import public_methods

# Leaves of two, one and no dimensions, so that masks and axes have something to do.
W = {'kernel': np.array([[0.3, -0.4], [1.2, 0.5]]), 'rest': (np.array([-0.2, 0.9]),)}
G = {'kernel': np.array([[0.6, 1.1], [-0.3, 0.2]]), 'rest': (np.array([0.4, -0.7]),)}
G_PROBE = {'kernel': np.array([[0.5, -1.0], [0.3, 0.8]]), 'rest': (np.ones(2),)}
G_OTHER = {'kernel': np.array([[0.1, 0.2], [-0.3, 1.0]]), 'rest': (-np.ones(2),)}
WITH_SCALAR = {'a': np.array(0.7), 'b': np.array([0.2, -0.5, 0.1])}


def arrays(tree, dtype=jnp.float32):
  return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


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


# Metrics: each with its matrix by NumPy, or None where a norm has none.


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


# Broken metrics.


def a_metric(ascent_of, init=lambda params: optax.EmptyState(), move=lambda s, g: s):
  """A metric from ``(g, unit, norm, space) -> (direction, slope)``."""

  def ascend(grads, state, params, *, space, **extra_args):
    unit, norm = space.normalize(grads)
    unit = jax.tree.map(lambda u, g: u.astype(g.dtype), unit, grads)
    direction, slope = ascent_of(grads, unit, norm, space)
    return Ascent(direction, slope), move(state, grads)

  return Metric(init, ascend)


def times(factor, tree):
  return jax.tree.map(lambda x: (factor * x.astype(jnp.float32)).astype(x.dtype), tree)


def euclidean_with(**kwargs):
  return a_metric(lambda g, unit, norm, space: (unit, norm), **kwargs)


def naive(g, unit, norm, space):
  square = space.dot(g, g)
  norm = jnp.sqrt(jnp.where(square > 0, square, 1.0))
  return times(1 / norm, g), jnp.where(square > 0, norm, 0.0)


def not_at_zero(g, unit, norm, space):
  return jax.tree.map(lambda u: u * (norm / norm).astype(u.dtype), unit), norm


def own_sum(g, unit, norm, space):
  unit, norm = msam_optax.LOCAL.normalize(g)
  return jax.tree.map(lambda u, x: u.astype(x.dtype), unit, g), norm


def only_outside_jit(g, unit, norm, space):
  return (unit, norm) if norm > 0 else (times(0.0, unit), norm)


def of_a_dict(g, unit, norm, space):
  unit = {'kernel': unit['kernel'] + 0.0, 'rest': unit['rest']}
  return unit, norm


def is_masked(x):
  return isinstance(x, optax.MaskedNode)


def counts_nodes(g, unit, norm, space):
  # A leaf that is masked out is a node as well.
  nodes = len(jax.tree.leaves(g, is_leaf=is_masked))
  return times(nodes, unit), nodes * norm


def batches_alike(g, unit, norm, space):
  """The same for one gradient, and not for each of a batch."""
  batched = isinstance(norm, jax.core.Tracer)
  return (times(2.0, unit), 2 * norm) if batched else (unit, norm)


def drifting():
  calls = []

  def ascent_of(g, unit, norm, space):
    calls.append(None)
    return times(len(calls), unit), len(calls) * norm

  return a_metric(ascent_of)


def length_alone(g, unit, norm, space):
  """Of length one under diag(4, 1, …), and not its steepest ascent."""
  G = {'kernel': jnp.array([[4.0, 1.0], [1.0, 1.0]]), 'rest': (jnp.ones(2),)}
  root = jnp.sqrt(space.dot(jax.tree.map(jnp.multiply, G, unit), unit))
  root = jnp.where(root > 0, root, 1.0)
  return times(1 / root, unit), norm / root


def moving_mean(state, grads):
  return jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g.astype(jnp.float32), state, grads)


def like_params(params):
  return jax.tree.map(lambda w: jnp.zeros(w.shape), params)


def of_the_state():
  """Climbs along the running mean, which a NaN spoils for ever."""

  def ascend(grads, state, params, *, space, **extra_args):
    mean = moving_mean(state, grads)
    unit, _ = space.normalize(mean)
    unit = jax.tree.map(lambda u, m, g: (u + 0 * m).astype(g.dtype), unit, mean, grads)
    return Ascent(unit, space.dot(grads, unit)), mean

  return Metric(like_params, ascend)


LENGTH_ALONE = np.diag([4.0, 1, 1, 1, 1, 1])
BROKEN_METRICS = {
  'slope without its root': (
    a_metric(lambda g, unit, norm, space: (unit, norm**2)),
    {},
    r'The slope of a metric is ⟨g, direction⟩ \(gradients as given\)',
  ),
  'not of unit length': (
    a_metric(lambda g, unit, norm, space: (times(2.0, unit), 2 * norm)),
    {'matrix': identity},
    r'(?s)of length one under the metric.*direction · G direction is 4, and must be 1',
  ),
  'not the steepest': (
    a_metric(length_alone),
    {'matrix': LENGTH_ALONE},
    r"(?s)The direction is G⁻¹g/√\(gᵀG⁻¹g\).*At \['kernel'\] it is another",
  ),
  'as long as the gradient': (
    a_metric(lambda g, unit, norm, space: (g, norm**2)),
    {'magnitudes': (1e-3,), 'scale_invariant': True},
    'The direction does not depend on the scale of g',
  ),
  'downhill': (
    a_metric(lambda g, unit, norm, space: (times(-1.0, unit), -norm)),
    {},
    'The slope is positive where the gradient is not zero',
  ),
  'NaN at zero': (a_metric(not_at_zero), {}, 'Direction and slope are zero where'),
  'squares too large': (
    a_metric(naive),
    {'magnitudes': (1e20,)},
    r'Direction and slope are finite \(gradients up to 1e\+20\)',
  ),
  'squares too small': (
    a_metric(naive),
    {'magnitudes': (1e-25,)},
    r'slope is positive where the gradient is not zero \(gradients up to 1e-25\)',
  ),
  'bfloat16 everywhere': (
    a_metric(
      lambda g, unit, norm, space: (
        jax.tree.map(lambda u: u.astype(jnp.bfloat16), unit),
        norm,
      )
    ),
    {},
    r"(?s)no narrower dtypes.*At \['kernel'\] it is bfloat16, and the gradient float32",
  ),
  'narrow slope': (
    a_metric(lambda g, unit, norm, space: (unit, norm.astype(jnp.bfloat16))),
    {},
    'The slope is a scalar, float32 or wider',
  ),
  'slope of each leaf': (
    a_metric(lambda g, unit, norm, space: (unit, norm[None])),
    {},
    'The slope is a scalar, float32 or wider',
  ),
  'leaves as a list': (
    a_metric(lambda g, unit, norm, space: (jax.tree.leaves(unit), norm)),
    {},
    'The direction is like the gradients',
  ),
  'sums of its own': (a_metric(own_sum), {}, 'Sums over leaves are those of `space`'),
  'leaves by name': (
    a_metric(of_a_dict),
    {},
    r"(?s)accept what they are given \(\['kernel'\] masked out\).*It raised TypeError",
  ),
  'counts nodes': (a_metric(counts_nodes), {}, 'the sub-tree is what counts'),
  'keeps what is masked out': (
    euclidean_with(
      init=lambda params: jax.tree.map(
        lambda w: jnp.zeros(2), params, is_leaf=is_masked
      )
    ),
    {},
    r"The state keeps nothing of leaves that are masked out \(\['kernel'\]",
  ),
  'a state of another dtype': (
    euclidean_with(
      init=lambda params: jnp.zeros([], jnp.int32),
      move=lambda s, g: s.astype(jnp.float32) + 1,
    ),
    {},
    r'(?s)The state keeps.*At the root it is float32\[\], not int32\[\]',
  ),
  'a state that becomes weak': (
    euclidean_with(
      init=lambda params: jnp.zeros([], jnp.float32),
      move=lambda s, g: jnp.asarray(1.0),
    ),
    {},
    r'(?s)The state keeps.*it is float32\[\] \(weak\), not float32\[\]',
  ),
  'a state that grows': (
    euclidean_with(init=lambda params: (), move=lambda s, g: (*s, 1)),
    {},
    'The state keeps its structure',
  ),
  'a state that NaN spoils': (of_the_state(), {}, 'does not stay in the state'),
  'not pure': (drifting(), {'sharded': False}, 'A metric is pure'),
  'an `if` on a value': (
    a_metric(only_outside_jit),
    {'sharded': False},
    'Under `jit` a metric does what it does without',
  ),
  'another thing when traced': (
    a_metric(batches_alike),
    {'sharded': False},
    'Under `jit` a metric does what it does without',
  ),
  'refuses arguments': (
    Metric(lambda params: (), lambda grads, state, params, *, space: None),
    {},
    '(?s)accept what they are given.*It raised TypeError.*unexpected keyword',
  ),
  'an ascent without a state': (
    Metric(lambda params: (), lambda grads, state, params, **kwargs: 1.0),
    {},
    r'(?s)`ascend` returns `\(Ascent, state\)`.*It returned 1.0',
  ),
}


@pytest.mark.parametrize(
  ('metric', 'options', 'message'), BROKEN_METRICS.values(), ids=BROKEN_METRICS
)
def test_a_broken_metric_fails(metric, options, message):
  with pytest.raises(AssertionError, match=message):
    testing.assert_metric(metric, arrays(G), arrays(W), **options)


def is_traced_for(x, kind):
  """Whether a value is traced by `vmap` ('Batch'), or by `jit` and `scan`."""
  return isinstance(x, jax.core.Tracer) and kind in type(x).__name__


def test_under_vmap_and_scan_each_gradient_counts():
  """Metrics that are right under `jit`, and wrong where there are several gradients."""

  def metric(factor_of):
    def ascend(grads, state, params, *, space, **extra_args):
      unit, norm = space.normalize(grads)
      factor = factor_of(norm, state)
      return Ascent(times(factor, unit).astype(grads.dtype), factor * norm), state + 1

    return Metric(lambda params: jnp.zeros([], jnp.int32), ascend)

  def in_vmap(norm, state):
    return 2.0 if is_traced_for(norm, 'Batch') else 1.0

  def in_scan(norm, state):
    return 1.0 + state.astype(jnp.float32) if is_traced_for(norm, 'Jaxpr') else 1.0

  w, g = jnp.array([1.0, 2.0]), jnp.array([0.6, 0.8])
  for factor_of, name in {in_vmap: 'vmap', in_scan: 'scan'}.items():
    with pytest.raises(AssertionError, match=f'Under `{name}` a metric does what it'):
      testing.assert_metric(metric(factor_of), g, w, sharded=False)


# Combinations.

COMBINATIONS = {
  name: row.combination or msam_optax.probe_gradient() for name, row in ROWS.items()
}


def gradients(combination, dtype=jnp.float32):
  chosen = (G, G_PROBE, G_OTHER)[: 1 + len(combination.scales)]
  return tuple(arrays(g, dtype) for g in chosen)


def check_combination(combination):
  testing.assert_combination(combination, gradients(combination), arrays(W))


@pytest.mark.parametrize('name', cases(COMBINATIONS, plain=is_default))
def test_every_combination_keeps_the_contract(name):
  check_combination(COMBINATIONS[name])


@pytest.mark.slow
@pytest.mark.usefixtures('x64')
def test_a_combination_keeps_the_contract_in_float64():
  combination = msam_optax.surrogate_gap(0.6)
  g = gradients(combination, jnp.float64)
  testing.assert_combination(combination, g, arrays(W, jnp.float64))


def every(k, due=None, combine=None):
  """Takes its probe in each k-th step, and remembers the last gradient there."""

  def init(params):
    return {'count': jnp.zeros([], jnp.int32), 'last': like_params(params)}

  def remember(grads, state, space):
    g = space.mean(grads[-1])
    good = jnp.all(jnp.isfinite(space.dot(g, g)))
    last = jax.tree.map(
      lambda m, x: jnp.where(good, x.astype(jnp.float32), m), state['last'], g
    )
    return g, {'count': state['count'] + 1, 'last': last}

  return Combination(
    init,
    combine or remember,
    due=due or (lambda g, state, space: state['count'] % k == 0),
  )


def test_a_combination_that_skips_probes_keeps_the_contract():
  check_combination(every(2))


def from_probe(f, **kwargs):
  """A combination without state from ``(g, g1, space) -> update``."""
  return Combination(
    lambda params: (), lambda grads, s, space: (f(*grads, space), s), **kwargs
  )


def stable_that_hides(g, g_probe, space):
  (_, length), (unit, _) = space.normalize(g), space.normalize(g_probe)
  return jax.tree.map(lambda u, x: (length * u).astype(x.dtype), unit, g)


def naive_projection(g, g_probe, space):
  g, g_probe = space.mean((g, g_probe))
  square = space.dot(g_probe, g_probe)
  c = space.dot(g, g_probe) / jnp.where(square > 0, square, 1.0)
  return jax.tree.map(lambda x, y: x - c.astype(y.dtype) * y, g, g_probe)


def ratio_of_norms(g, g_probe, space):
  g, g_probe = space.mean((g, g_probe))
  ratio = space.normalize(g)[1] / space.normalize(g_probe)[1]
  return times(ratio, g_probe)


def other_with_replicas(g, g_probe, space):
  local = space.mean(g) is g
  return times(1.0 if local else 0.5, space.mean(g_probe))


def counting(to):
  return Combination(
    lambda params: jnp.zeros([], jnp.int32),
    lambda grads, state, space: (space.mean(grads[1]), (state + 1).astype(to)),
  )


def momentum():
  """Its running mean keeps a NaN for ever."""

  def combine(grads, state, space):
    mean = moving_mean(state, space.mean(grads[1]))
    return jax.tree.map(lambda m, g: m.astype(g.dtype), mean, grads[1]), mean

  return Combination(like_params, combine)


def unsure():
  calls = []

  def f(g, g_probe, space):
    calls.append(None)
    return times(1.0 + 0.1 * len(calls), space.mean(g_probe))

  return from_probe(f)


def other_when_traced(factor_of):
  """Another update under `jit`, and not for each of some replicas."""

  def combine(grads, state, space):
    g = space.mean(grads[1])
    traced = is_traced_for(state, 'Jaxpr')
    return times(factor_of(state) if traced else 1.0, g), state + 1

  return Combination(lambda params: jnp.zeros([], jnp.int32), combine)


def by_name(g, g_probe, space):
  g_probe = space.mean(g_probe)
  return {'kernel': g_probe['kernel'] + 0.0, 'rest': g_probe['rest']}


PROBE = lambda g, g_probe, space: space.mean(g_probe)
BROKEN_COMBINATIONS = {
  'no mean': (
    from_probe(lambda g, g_probe, space: g_probe),
    'All replicas get the same update',
  ),
  'a mean of one of two': (
    from_probe(
      lambda g, g_probe, space: jax.tree.map(jnp.subtract, space.mean(g_probe), g)
    ),
    'All replicas get the same update',
  ),
  'another thing with replicas': (
    from_probe(other_with_replicas),
    'Replicas with the same gradients get what one device gets',
  ),
  'hides what is not finite': (
    from_probe(
      lambda g, g_probe, space: jax.tree.map(jnp.nan_to_num, space.mean(g_probe))
    ),
    '(?s)A gradient that is not finite is not hidden.*With nan in gradient 0',
  ),
  'hides it in a unit vector': (
    from_probe(
      lambda g, g1, space: stable_that_hides(space.mean(g), space.mean(g1), space)
    ),
    'A gradient that is not finite is not hidden',
  ),
  'squares too large': (
    from_probe(naive_projection),
    r'The update is finite where the gradients are \(all gradients, up to 1e\+20\)',
  ),
  'NaN at zero': (
    from_probe(ratio_of_norms),
    r'The update is finite where the gradients are \(all gradients, all zero\)',
  ),
  'half precision': (
    from_probe(
      lambda g, g_probe, space: jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), space.mean(g_probe)
      )
    ),
    r"(?s)no narrower dtypes.*At \['kernel'\] it is bfloat16, and the gradient"
    ' float32',
  ),
  'integers': (
    from_probe(
      lambda g, g_probe, space: jax.tree.map(
        lambda x: x.astype(jnp.int32), space.mean(g_probe)
      )
    ),
    'The update has no narrower dtypes than the gradients',
  ),
  'leaves as a list': (
    from_probe(lambda g, g_probe, space: jax.tree.leaves(g_probe)),
    'The update is like the gradients',
  ),
  'another shape': (
    from_probe(lambda g, g_probe, space: jax.tree.map(jnp.sum, g_probe)),
    'The update is like the gradients',
  ),
  'leaves by name': (
    from_probe(by_name),
    r"(?s)accept what they are given \(all gradients, \['kernel'\] left out\).*TypeErr",
  ),
  'an update alone': (
    Combination(lambda params: (), lambda grads, state, space: grads[1]),
    r'`combine` returns `\(update, state\)`',
  ),
  'a state of another dtype': (
    counting(jnp.float32),
    r'(?s)The state keeps its structure.*it is float32\[\], not int32\[\]',
  ),
  'a state that NaN spoils': (momentum(), 'What is not finite does not stay'),
  'not pure': (unsure(), 'A combination is pure'),
  'another update under jit': (
    other_when_traced(lambda count: 2.0),
    'Under `jit` it does what it does without',
  ),
  'another second update under jit': (
    other_when_traced(lambda count: 1.0 + count.astype(jnp.float32)),
    'Under `scan` it does what it does in a loop',
  ),
  'cannot do without a probe': (
    every(2, combine=lambda grads, state, space: (space.mean(grads[1]), state)),
    r'(?s)accept what they are given \(`\(g,\)` alone\).*It raised IndexError',
  ),
  '`due` is a number': (
    every(2, due=lambda g, state, space: state['count']),
    '`due` is a bool, one scalar',
  ),
  '`due` has dimensions': (
    every(2, due=lambda g, state, space: state['count'][None] == 0),
    '`due` is a bool, one scalar',
  ),
  '`due` of each replica': (
    every(2, due=lambda g, state, space: space.dot(g, g) > 3.0),
    'All replicas get the same update, state and `due`',
  ),
  'no scales': (
    from_probe(PROBE, scales=()),
    '(?s)It is a Combination, with finite `scales`.*one at least',
  ),
}


@pytest.mark.parametrize(
  ('combination', 'message'), BROKEN_COMBINATIONS.values(), ids=BROKEN_COMBINATIONS
)
def test_a_broken_combination_fails(combination, message):
  with pytest.raises(AssertionError, match=message):
    check_combination(combination)


# Methods.

METHODS = sorted(public_methods())


def loss_fn(params):
  return sum(jnp.sum(x**4 + jnp.sin(x)) for x in jax.tree.leaves(params))


def check_method(tx):
  params = arrays(WITH_SCALAR)
  testing.assert_method(tx, params, loss_fn)
  # What is donated is a copy.
  assert not any(x.is_deleted() for x in jax.tree.leaves(params))


def make(name):
  if name == 'sharpness_aware':
    return msam_optax.sharpness_aware(
      msam_optax.max_norm(), lambda count: 0.1, every(3)
    )
  return getattr(msam_optax, name)()


@pytest.mark.parametrize('name', cases(METHODS, plain=is_default))
def test_every_method_keeps_the_contract(name):
  check_method(make(name))


def test_a_method_with_everything_keeps_the_contract():
  """A mask, a metric with a count, and a wider dtype at the probe."""
  check_method(
    msam_optax.msam(
      0.1,
      alpha=lambda count: 1.0,
      mask={'a': False, 'b': True},
      perturbation_dtype=jnp.float32,
    )
  )


def changed(tx=None, init=None, update=None):
  """A method, Monge SAM by default, with another `init` or `update`."""
  tx = tx or msam_optax.msam(0.1)

  def changed_update(updates, state, params=None, **extra_args):
    result = tx.update(updates, state, params, **extra_args)
    return update(result, state, extra_args) if update else result

  changed_init = (lambda params: init(tx.init(params), params)) if init else tx.init
  return optax.GradientTransformationExtraArgs(changed_init, changed_update)


def in_float32(result, state, extra_args):
  updates, new_state = result
  return jax.tree.map(lambda u: u.astype(jnp.float32), updates), new_state


def hides(result, state, extra_args):
  return jax.tree.map(jnp.nan_to_num, result[0]), result[1]


def always_finite(result, state, extra_args):
  return result[0], result[1]._replace(finite=jnp.array(True))


def stays(result, state, extra_args):
  return result[0], result[1]._replace(count=state.count)


def becomes_float(result, state, extra_args):
  return result[0], result[1]._replace(count=result[1].count.astype(jnp.float32))


def keeps_nan(result, state, extra_args):
  updates, new_state = result
  slope = new_state.slope + 0 * state.slope
  worst = 0 * sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(updates))
  updates = jax.tree.map(lambda u: u + 0 * state.slope.astype(u.dtype), updates)
  return updates, new_state._replace(slope=slope + worst)


def reads_both(result, state, extra_args):
  return result[0], result[1]._replace(rise=state.slope - state.radius)


def refuses(result, state, extra_args):
  if set(extra_args) - {'grad_fn', 'value_and_grad_fn'}:
    raise TypeError('an argument too many')
  return result


def doubled_if(condition):
  """Another update where something holds of the state and the extra arguments."""

  def update(result, state, extra_args):
    return times(2.0 if condition(state, extra_args) else 1.0, result[0]), result[1]

  return changed(update=update)


def first_leaf(state, params):
  """Fails for the stand-in that Optax gives to `init`, a tree without leaves."""
  return state._replace(metric_state=jnp.sum(jax.tree.leaves(params)[0]))


def other_with_value(result, state, extra_args):
  if 'value_and_grad_fn' not in extra_args:
    return result
  return times(2.0, result[0]), result[1]


def wanders():
  calls = []

  def update(result, state, extra_args):
    calls.append(None)
    return times(1.0 + 0.1 * len(calls), result[0]), result[1]

  return changed(update=update)


def clean():
  """Has a count, and the gradient as it came."""
  return optax.GradientTransformationExtraArgs(
    lambda params: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32)),
    lambda updates, state, params=None, **extra_args: (
      updates,
      optax.ScaleByScheduleState(state.count + 1),
    ),
  )


def on_concrete_numbers(result, state, extra_args):
  if not isinstance(result[1].slope, jax.core.Tracer) and result[1].slope > 0:
    return result
  return times(2.0, result[0]), result[1]


def always_aside():
  """Its direction is not zero where the gradient is."""
  return a_metric(
    lambda g, unit, norm, space: (
      jax.tree.map(lambda u: jnp.ones_like(u), unit),
      jnp.asarray(norm + 1),
    )
  )


BROKEN_METHODS = {
  'float32 everywhere': (
    changed(update=in_float32),
    r'(?s)The updates are like the gradients \(params in bfloat16\).*float32',
  ),
  'updates alone': (
    changed(update=lambda result, state, extra_args: result[0]['a']),
    r'`update` returns `\(updates, state\)`',
  ),
  'a state of another dtype': (
    changed(update=becomes_float),
    r'(?s)The state keeps.*At \.count it is float32\[\], not int32\[\]',
  ),
  'a count that stays': (
    changed(update=stays),
    r'(?s)A count in the state grows.*\[0\] became \[0\]',
  ),
  'not pure': (wanders(), 'A method is pure'),
  'refuses arguments': (
    changed(update=refuses),
    '(?s)Extra arguments that it does not know.*It raised TypeError',
  ),
  'another update with values': (
    changed(update=other_with_value),
    '`grad_fn` and `value_and_grad_fn` give the same update',
  ),
  'another update with an argument of others': (
    doubled_if(lambda state, extra_args: 'argument_of_another' in extra_args),
    'Extra arguments that it does not know are left to others',
  ),
  'another update from host memory': (
    doubled_if(lambda state, extra_args: isinstance(state.count, np.ndarray)),
    'The state is of arrays: a copy in host memory does the same',
  ),
  'another update under vmap': (
    doubled_if(lambda state, extra_args: is_traced_for(state.count, 'Batch')),
    'Under `vmap` a method does what it does for each of the params',
  ),
  'needs params with leaves': (
    changed(init=first_leaf),
    '(?s)`optax.tree.map_params` goes through the state.*It raised IndexError',
  ),
  'another update when traced': (
    changed(update=on_concrete_numbers),
    'Under `scan` a method does what it does in a loop',
  ),
  'an array twice in the state': (
    changed(
      init=lambda state, params: state._replace(radius=state.slope),
      update=reads_both,
    ),
    'Under `jit` with donated arguments',
  ),
  'the params in the state': (
    changed(init=lambda state, params: state._replace(metric_state=params)),
    'Under `jit` with donated arguments',
  ),
  'a function in the state': (
    changed(init=lambda state, params: state._replace(metric_state=loss_fn)),
    '`init` and `update` accept what they are given',
  ),
  'no probe': (clean(), 'The update depends on the gradient at the probe'),
  'moves where the gradient is zero': (
    msam_optax.sharpness_aware(always_aside(), 0.1),
    '(?s)A zero gradient is not perturbed.*a',
  ),
  'hides what is not finite': (
    changed(update=hides),
    r'(?s)an update that is not finite in the same leaf.*With nan in the gradient at'
    r" the params the update at \['a'\]",
  ),
  'a flag that is always true': (
    changed(update=always_finite),
    '(?s)`finite` in the state says whether the update is.*it is True',
  ),
  'a state that NaN spoils': (changed(update=keeps_nan), 'does not stay in the state'),
}


@pytest.mark.slow
@pytest.mark.parametrize(('tx', 'message'), BROKEN_METHODS.values(), ids=BROKEN_METHODS)
def test_a_broken_method_fails(tx, message):
  with pytest.raises(AssertionError, match=message):
    check_method(tx)


# Changes of coordinates.


def valley(w):
  return (1 - w[0] * w[1]) ** 2 + jnp.sin(w[0])


POINT = (1.1, -0.6)
TURN = np.array([[0.6, -0.8], [0.8, 0.6]])


def turn(v):
  return jnp.asarray(TURN, v.dtype) @ v


def scale(v):
  return v * jnp.array([2.0, 0.5], v.dtype)


RELATIVE = msam_optax.adaptive(0.0, weights=True)


@pytest.mark.parametrize(
  ('metric', 'change'),
  [
    (msam_optax.euclidean(), turn),
    (msam_optax.monge(0.8), turn),
    (RELATIVE, scale),
    (msam_optax.monge(0.8, RELATIVE), scale),
  ],
  ids=['euclidean, turned', 'monge, turned', 'adaptive, scaled', 'both, scaled'],
)
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_what_metrics_are_invariant_under(metric, change, dtype, request):
  if dtype == 'float64':
    request.getfixturevalue('x64')
  v = jnp.asarray(POINT, dtype)
  testing.assert_invariant(metric, change, valley, v)


@pytest.mark.parametrize(
  ('metric', 'change'),
  [
    (msam_optax.euclidean(), scale),
    (msam_optax.monge(0.8), scale),
    (RELATIVE, turn),
    (msam_optax.diagonal_fisher(), turn),
    (msam_optax.max_norm(), turn),
  ],
)
def test_what_metrics_are_not_invariant_under(metric, change):
  with pytest.raises(AssertionError, match=r'(?s)direction does not depend on.*At the'):
    testing.assert_invariant(metric, change, valley, jnp.array(POINT))


def test_a_slope_that_depends_on_the_coordinates():
  largest = a_metric(lambda g, unit, norm, space: (unit, jnp.max(jnp.abs(g))))
  with pytest.raises(AssertionError, match='The slope does not depend on the coord'):
    testing.assert_invariant(largest, turn, valley, jnp.array(POINT))


def test_a_chart_of_a_tree_with_its_pulled_back_metric():
  """Polar coordinates: ``w = r (cos φ, sin φ)``, whose metric is diag(1, r²)."""

  def chart(v):
    return v['r'] * jnp.stack([jnp.cos(v['phi']), jnp.sin(v['phi'])])

  def ascend(grads, state, params, **extra_args):
    u = {'r': grads['r'], 'phi': grads['phi'] / params['r'] ** 2}
    slope = jnp.sqrt(grads['r'] * u['r'] + grads['phi'] * u['phi'])
    return Ascent(jax.tree.map(lambda x: x / slope, u), slope), state

  polar = Metric(lambda params: (), ascend)
  v = {'r': jnp.array(1.4), 'phi': jnp.array(0.5)}
  monge = msam_optax.monge
  check = functools.partial(testing.assert_invariant, monge(0.8), chart, valley, v)
  check(metric_of_change=monge(0.8, polar))
  with pytest.raises(AssertionError, match='The direction does not depend'):
    check(metric_of_change=monge(0.8, msam_optax.euclidean()))


# What cannot be tested with.


@pytest.mark.parametrize(
  'grads',
  [
    jnp.zeros(2),
    jnp.array([1.0, jnp.nan]),
    jnp.ones(3),
    [jnp.ones(2)],
    jnp.ones(2, int),
  ],
)
def test_examples_that_say_nothing_are_refused(grads):
  with pytest.raises(ValueError, match='real, finite, like the params, and not all'):
    testing.assert_metric(msam_optax.euclidean(), grads, jnp.ones(2))


def test_magnitudes_that_a_dtype_has_not():
  w = jnp.ones(2, jnp.float16)
  with pytest.raises(ValueError, match='in float16 cannot be as large or small'):
    testing.assert_metric(msam_optax.euclidean(), w, w)
  testing.assert_metric(msam_optax.euclidean(), w, w, magnitudes=(1e-3, 1e3))
  with pytest.raises(ValueError, match='give others as `magnitudes`'):
    testing.assert_combination(msam_optax.probe_gradient(), (w, w), w)


def test_as_many_gradients_as_the_combination_has_passes():
  with pytest.raises(ValueError, match=r'scales \(1.0, -1.0\): give 3 gradients'):
    testing.assert_combination(
      msam_optax.curvature(), (jnp.ones(2), jnp.ones(2)), jnp.ones(2)
    )


def test_a_loss_without_a_gradient_is_refused():
  with pytest.raises(ValueError, match='They are zero'):
    testing.assert_method(msam_optax.sam(), jnp.ones(2), lambda w: 0 * jnp.sum(w))
