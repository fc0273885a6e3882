"""Probes that are not due in every step, and combinations with a state."""

import functools

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import msam_optax
from msam_optax import flax_nnx
from tests.combinations.maps import cpu
from tests.combinations.maps import KINDS
from tests.combinations.maps import mesh
from tests.combinations.maps import vary
from tests.combinations.problem import flat
from tests.combinations.problem import loss
from tests.combinations.problem import make_data
from tests.combinations.problem import make_params
from tests.combinations.problem import Model
from tests.combinations.problem import model_loss
from tests.combinations.problem import PARTS
from tests.combinations.problem import RHO
from tests.combinations.truth import COMBINATIONS
from tests.combinations.truth import consecutive
from tests.combinations.truth import METRICS
from tests.combinations.truth import monge_slope
from tests.combinations.truth import value_and_slope
from tests.combinations.ways import slow_unless

PERIOD, ADDED, RATE = 4, 0.7, 0.05


def look_sam():
  """Every fourth gradient at the probe; between them its part across g, kept."""

  def init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return {'count': jnp.zeros([], jnp.int32), 'across': zeros}

  def combine(grads, state, space):
    g, *probes = space.mean(grads)
    unit, length = space.normalize(g)
    across = state['across']
    if probes:
      update = probes[0]
      along = space.dot(update, unit)
      rest = jax.tree.map(lambda x, u: x - along * u, update, unit)
      across, _ = space.normalize(rest)
    else:
      update = jax.tree.map(lambda x, v: x + ADDED * length * v, g, across)
    return update, {'count': state['count'] + 1, 'across': across}

  return msam_optax.Combination(
    init, combine, due=lambda g, state, space: state['count'] % PERIOD == 0
  )


def look_sam_truth(steps, cuts=(slice(None),)):
  """Parameters after each step of SGD, and the slope that is recorded."""
  w, across = flat(make_params()), np.zeros(5)
  x, y = (np.asarray(z, np.float64) for z in make_data())
  at = lambda w, cut: value_and_slope(w, x[cut], y[cut], np.ones(len(y[cut])))[1]
  path, slopes = [], []
  for i in range(steps):
    own = [at(w, cut) for cut in cuts]
    g = np.mean(own, 0)
    slope = 0.0
    if i % PERIOD == 0:
      rises = [monge_slope(w, g) for g in own]
      update = np.mean(
        [at(w + RHO * u, cut) for (_, u), cut in zip(rises, cuts, strict=True)], 0
      )
      rest = update - (update @ g) / (g @ g) * g
      across = rest / np.sqrt(rest @ rest)
      slope = np.mean([s for s, _ in rises])
    else:
      update = g + ADDED * np.sqrt(g @ g) * across
    w = w - RATE * update
    path.append(w)
    slopes.append(slope)
  return np.array(path), np.array(slopes)


def look_sam_steps(calls=None, **kwargs):
  """``(params, data) -> (params after every step, states)``, a scan of 12 steps."""
  tx = msam_optax.sharpness_aware(METRICS['monge'][0], RHO, look_sam(), **kwargs)

  def steps(params, data):
    def value_and_grad_fn(params):
      if calls is not None:
        jax.debug.callback(lambda: calls.append(None))
      return jax.value_and_grad(loss)(params, data)

    def step(carry, _):
      params, state = carry
      value, grads = jax.value_and_grad(loss)(params, data)
      updates, state = tx.update(
        grads, state, params, value_and_grad_fn=value_and_grad_fn, value=value
      )
      params = jax.tree.map(lambda w, u: w - RATE * u, params, updates)
      return (params, state), (params, state)

    return jax.lax.scan(step, (params, tx.init(params)), length=12)[1]

  return steps


def rows(tree):
  """``[steps, numbers]`` of a tree of arrays ``[steps, ...]``."""
  leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
  return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)


def test_steps_in_which_probes_are_not_due():
  """Twelve steps of three probes: numbers, scalars, and gradients really skipped."""
  calls = []
  params, state = jax.jit(look_sam_steps(calls))(make_params(), make_data())
  jax.effects_barrier()
  assert len(calls) == 3
  path, slopes = look_sam_truth(12)
  np.testing.assert_allclose(rows(params), path, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(state.slope, slopes, rtol=1e-5)
  due = np.arange(12) % PERIOD == 0
  for recorded in (state.slope, state.radius, state.probe_value, state.rise):
    np.testing.assert_array_equal(np.asarray(recorded) != 0, due)
  np.testing.assert_array_equal(state.count, np.arange(1, 13))
  np.testing.assert_array_equal(state.combination_state['count'], np.arange(1, 13))
  assert state.finite.all()


@pytest.mark.slow
def test_probes_that_are_not_due_without_jit():
  calls = []
  tx = msam_optax.sharpness_aware(METRICS['monge'][0], RHO, look_sam())
  params, data = make_params(), make_data()
  state, path = tx.init(params), []
  slope = jax.jit(jax.grad(loss))

  def grad_fn(params):
    jax.debug.callback(lambda: calls.append(None))
    return slope(params, data)

  for _ in range(5):
    grads = slope(params, data)
    updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
    params = jax.tree.map(lambda w, u: w - RATE * u, params, updates)
    path.append(flat(params))
  jax.effects_barrier()
  assert len(calls) == 2
  np.testing.assert_allclose(path, look_sam_truth(5)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_probes_that_are_not_due_under_vmap():
  """Runs side by side, from different parameters."""
  starts = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), make_params())
  many = jax.jit(jax.vmap(look_sam_steps(), in_axes=(0, None)))
  params, state = many(starts, make_data())
  first = jax.tree.map(lambda x: x[0], params)
  np.testing.assert_allclose(rows(first), look_sam_truth(12)[0], rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(
    np.asarray(state.slope) != 0, np.tile(np.arange(12) % PERIOD == 0, (2, 1))
  )


@cpu
@pytest.mark.parametrize(
  'kind', slow_unless(('checked',), ('vmap', 'unchecked', 'checked', 'checked, cast'))
)
def test_probes_that_are_not_due_on_replicas(kind):
  steps = look_sam_steps(axis_name='i')
  if kind.startswith('checked'):
    # The params that a loop carries are those that the means leave equal, or were cast
    # before the state was made of them.
    cast = kind == 'checked, cast'
    params, state = replicated_look_sam(cast)(make_params(), make_data())
  else:
    params, state = KINDS[kind](steps)(make_params(), make_data())
  path, slopes = look_sam_truth(12, consecutive(PARTS))
  for i in range(PARTS):
    mine = jax.tree.map(lambda x, i=i: x[i], params)
    np.testing.assert_allclose(rows(mine), path, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.slope[i], slopes, rtol=1e-5)


def replicated_look_sam(cast):
  """In a checked ``shard_map``: params are cast first, or where gradients are taken."""
  tx = msam_optax.sharpness_aware(METRICS['monge'][0], RHO, look_sam(), axis_name='i')

  def steps(params, data):
    params = vary(params) if cast else params

    def step(carry, _):
      params, state = carry
      grad_fn = jax.grad(lambda p: loss(p, data))
      own = params if cast else vary(params)
      updates, state = tx.update(grad_fn(own), state, own, grad_fn=grad_fn)
      params = jax.tree.map(lambda w, u: w - RATE * u, params, updates)
      return (params, state), (params, state)

    results = jax.lax.scan(step, (params, tx.init(params)), length=12)[1]
    return jax.tree.map(lambda x: x[None], results)

  return jax.jit(
    jax.shard_map(
      steps,
      mesh=mesh(i=PARTS),
      in_specs=(P(), P('i')),
      out_specs=P('i'),
      check_vma=True,
    )
  )


def test_due_sees_the_gradient():
  """A probe only where the gradient is long: both kinds of step in one program."""
  combination = msam_optax.probe_gradient()._replace(
    due=lambda g, state, space: space.normalize(g)[1] > 1.0
  )
  tx = msam_optax.sharpness_aware(msam_optax.euclidean(), 0.5, combination)
  grad_fn = lambda w: 2 * w
  update = jax.jit(lambda w: tx.update(2 * w, tx.init(w), w, grad_fn=grad_fn))
  updates, state = update(jnp.array([0.6, 0.8]))
  np.testing.assert_allclose(updates, [1.8, 2.4], rtol=1e-6)
  np.testing.assert_allclose(state.slope, 2.0, rtol=1e-6)
  updates, state = update(jnp.array([0.06, 0.08]))
  np.testing.assert_array_equal(updates, np.float32([0.12, 0.16]))
  assert state.slope == 0


@pytest.mark.parametrize('name', ['wsam', 'gsam', 'cr_sam'])
def test_a_step_without_probes_has_the_plain_gradient(name):
  combination = COMBINATIONS[name][0]._replace(due=lambda g, state, space: False)
  tx = msam_optax.sharpness_aware(msam_optax.euclidean(), 0.5, combination)
  w = jnp.array([0.6, 0.8])
  updates, state = tx.update(2 * w, tx.init(w), w, grad_fn=lambda w: 2 * w)
  np.testing.assert_array_equal(updates, 2 * w)
  assert state.finite


def test_the_state_of_a_metric_stands_still_where_probes_are_not_due():
  """A schedule in the metric counts probes, and the transformation counts steps."""
  combination = msam_optax.probe_gradient()._replace(due=lambda g, state, space: False)
  metric = msam_optax.monge(alpha=lambda count: jnp.float32(1.0))
  tx = msam_optax.sharpness_aware(metric, 0.5, combination)
  w = jnp.array([0.6, 0.8])
  _, state = tx.update(2 * w, tx.init(w), w, grad_fn=lambda w: 2 * w)
  assert state.metric_state.count == 0
  assert state.count == 1


def test_the_state_of_a_combination_goes_through_optax_and_a_checkpoint():
  """Trees like the params are found in it, and what is saved goes on as before."""
  tx = optax.chain(
    msam_optax.sharpness_aware(msam_optax.monge(), RHO, look_sam()), optax.sgd(RATE)
  )
  params, data = make_params(), make_data()
  state = tx.init(params)

  @jax.jit
  def step(params, state):
    grad_fn = jax.grad(lambda p: loss(p, data))
    updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state

  for _ in range(2):
    params, state = step(params, state)
  doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
  across = optax.tree.get(state, 'across')
  chex.assert_trees_all_equal(
    optax.tree.get(doubled, 'across'), jax.tree.map(lambda x: 2 * x, across)
  )
  assert optax.tree.get(doubled, 'combination_state')['count'] == 2
  saved = [np.asarray(x) for x in jax.tree.leaves((params, state))]
  restored = jax.tree.unflatten(jax.tree.structure((params, state)), saved)
  chex.assert_trees_all_equal(step(*restored), step(params, state))


@pytest.mark.parametrize('once', [False, True], ids=['two copies', 'one loop'])
@pytest.mark.parametrize(
  ('function', 'loss_fn', 'make'),
  [
    (msam_optax.value_and_grad, loss, make_params),
    (flax_nnx.value_and_grad, model_loss, Model),
  ],
  ids=['jax', 'nnx'],
)
def test_functions_refuse_what_needs_a_state(function, loss_fn, make, once):
  drop_in = functools.partial(
    function, loss_fn, msam_optax.monge(), RHO, compile_once=once
  )
  stateful = drop_in(combination=look_sam()._replace(due=None))
  with pytest.raises(ValueError, match=r'combination keeps a state .*`optax\.chain`'):
    stateful(make(), make_data())
  with pytest.raises(ValueError, match=r'\(`due`\), and `value_and_grad` '):
    drop_in(combination=look_sam())
