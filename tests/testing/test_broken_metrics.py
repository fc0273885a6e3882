"""A metric that is broken in one thing fails, with an error that names it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax
from msam_optax import Ascent
from msam_optax import Metric
from msam_optax import testing
from tests.testing.examples import a_metric
from tests.testing.examples import arrays
from tests.testing.examples import G
from tests.testing.examples import is_traced_for
from tests.testing.examples import like_params
from tests.testing.examples import moving_mean
from tests.testing.examples import times
from tests.testing.examples import W


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


def of_the_state():
  """Climbs along the running mean, which a NaN spoils for ever."""

  def ascend(grads, state, params, *, space, **extra_args):
    mean = moving_mean(state, grads)
    unit, _ = space.normalize(mean)
    unit = jax.tree.map(lambda u, m, g: (u + 0 * m).astype(g.dtype), unit, mean, grads)
    return Ascent(unit, space.dot(grads, unit)), mean

  return Metric(like_params, ascend)


def of_the_state_normalized():
  """Climbs along the running mean, and after a NaN never again."""

  def ascend(grads, state, params, *, space, **extra_args):
    mean = moving_mean(state, grads)
    unit, _ = space.normalize(mean)
    unit = jax.tree.map(lambda u, g: u.astype(g.dtype), unit, grads)
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
    {'matrix': lambda g, w: np.eye(len(g))},
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
  'a state that NaN spoils, unseen': (
    of_the_state_normalized(),
    {},
    'does not stay in the state',
  ),
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
