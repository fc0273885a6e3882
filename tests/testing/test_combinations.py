"""Combinations keep the contract, and one that is broken in one thing fails."""

import jax
import jax.numpy as jnp
import pytest

import msam_optax
from msam_optax import Combination
from msam_optax import testing
from tests.methods import cases
from tests.methods import is_default
from tests.methods import METHODS as ROWS
from tests.testing.examples import arrays
from tests.testing.examples import every
from tests.testing.examples import G
from tests.testing.examples import G_OTHER
from tests.testing.examples import G_PROBE
from tests.testing.examples import is_traced_for
from tests.testing.examples import like_params
from tests.testing.examples import moving_mean
from tests.testing.examples import times
from tests.testing.examples import W

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


def momentum_normalized():
  """Adds the direction of its running mean, which after a NaN is zero for ever."""

  def combine(grads, state, space):
    g = space.mean(grads[1])
    mean = moving_mean(state, g)
    unit, _ = space.normalize(mean)
    return jax.tree.map(lambda g, u: g + u.astype(g.dtype), g, unit), mean

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
  'a state that NaN spoils, unseen': (
    momentum_normalized(),
    'What is not finite does not stay',
  ),
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
