"""Masks restrict the metric: what it sees and keeps, and how long its step is."""

import operator

import chex
from flax import nnx
import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from msam_optax import adaptive
from msam_optax import Ascent
from msam_optax import by_name
from msam_optax import capped
from msam_optax import diagonal_fisher
from msam_optax import euclidean
from msam_optax import flax_nnx
from msam_optax import max_norm
from msam_optax import Metric
from msam_optax import monge
from msam_optax import msam
from msam_optax import sharpness_aware
from msam_optax import spectral
from msam_optax import value_and_grad

RHO = 0.3
MASKED = optax.MaskedNode()


def half_square(params):
  """A loss whose gradient at any point is the point."""
  return sum(0.5 * jnp.sum(jnp.square(w)) for w in jax.tree.leaves(params))


# What has a mask: each returns the probe, as the gradient there.


def chain(metric, params, mask):
  tx = sharpness_aware(metric, RHO, mask=mask)
  grad_fn = jax.grad(half_square)
  return tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)[0]


def drop_in(metric, params, mask):
  return value_and_grad(half_square, metric, RHO, mask=mask)(params)[1]


def compiled_once(metric, params, mask):
  value_and_grad_fn = value_and_grad(
    half_square, metric, RHO, mask=mask, compile_once=True
  )
  return value_and_grad_fn(params)[1]


class Model(nnx.Module):
  """One parameter for each leaf of a dict."""

  def __init__(self, params):
    for name, w in params.items():
      setattr(self, name, nnx.Param(w))


def of_model(model):
  return half_square(nnx.state(model, nnx.Param))


def nnx_drop_in(metric, params, mask, **kwargs):
  value_and_grad_fn = flax_nnx.value_and_grad(
    of_model, metric, RHO, mask=mask, **kwargs
  )
  return nnx.to_pure_dict(value_and_grad_fn(Model(params))[1])


def nnx_compiled_once(metric, params, mask):
  return nnx_drop_in(metric, params, mask, compile_once=True)


def nnx_chain(metric, params, mask):
  model, start = Model(params), Model(params)
  tx = optax.chain(sharpness_aware(metric, RHO, mask=mask), optax.sgd(1.0))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  grad_fn = flax_nnx.grad_fn(of_model, model)
  optimizer.update(model, nnx.grad(of_model)(model), grad_fn=grad_fn)
  pure = lambda m: nnx.to_pure_dict(nnx.state(m, nnx.Param))
  return jax.tree.map(operator.sub, pure(start), pure(model))


WAYS = {
  'chain': chain,
  'drop-in': drop_in,
  'compiled once': compiled_once,
  'nnx chain': nnx_chain,
  'nnx drop-in': nnx_drop_in,
  'nnx compiled once': nnx_compiled_once,
}
every_way = pytest.mark.parametrize('way', WAYS.values(), ids=WAYS)


# A dense metric of one's own.

PAIR = {'a': np.array(0.5), 'b': np.array(-2.0)}
FOUR = {'a': np.array(0.5), 'b': np.array([-2.0, 1.0]), 'c': np.array(0.3)}


def coupling(size):
  """A positive definite matrix, far from diagonal."""
  root = np.random.default_rng(0).normal(size=(size, size))
  return root @ root.T + 0.1 * np.eye(size)


def rows(params, names):
  """Where the leaves of these names are in the vector of all parameters."""
  sizes = [np.size(w) for w in params.values()]
  ends = dict(zip(params, np.cumsum(sizes), strict=True))
  return [
    i for name in names for i in range(ends[name] - np.size(params[name]), ends[name])
  ]


def dense(params):
  """The metric of a matrix that couples all parameters, on those that are there."""
  G = coupling(sum(np.size(w) for w in params.values()))

  def ascend(grads, state, params_now, *, space, **extra_args):
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    index = rows(params, [path[0].key for path, _ in leaves])
    g, unravel = ravel_pytree(grads)
    u = jnp.linalg.solve(jnp.asarray(G[np.ix_(index, index)]), g)
    slope = jnp.sqrt(g @ u)
    direction = u / jnp.where(slope > 0, slope, 1.0)
    return Ascent(unravel(direction), slope), state

  return Metric(lambda params: optax.EmptyState(), ascend)


@every_way
@pytest.mark.parametrize(
  ('params', 'names'),
  [(PAIR, 'a'), (PAIR, 'b'), (PAIR, 'ab'), (FOUR, 'b'), (FOUR, 'ac'), (FOUR, 'bc')],
  ids=['a of ab', 'b of ab', 'ab', 'b of abc', 'ac of abc', 'bc of abc'],
)
def test_a_dense_metric_has_its_length_under_every_mask(way, params, names, x64):
  """``δᵀGδ = ρ²``, nothing else moves, and δ is the best of all such steps."""
  probe = way(dense(params), jax.tree.map(jnp.asarray, params), by_name(*names))

  chex.assert_trees_all_equal_shapes_and_dtypes(probe, params)
  delta = np.concatenate([np.ravel(probe[n] - params[n]) for n in params])
  g = np.concatenate([np.ravel(w) for w in params.values()])
  index = rows(params, names)
  G = coupling(g.size)
  np.testing.assert_allclose(delta @ G @ delta, RHO**2, rtol=1e-10)
  u = np.linalg.solve(G[np.ix_(index, index)], g[index])
  want = np.zeros_like(g)
  want[index] = RHO * u / np.sqrt(g[index] @ u)
  np.testing.assert_allclose(delta, want, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
  'mask',
  [
    {'a': True, 'b': {'c': False, 'd': True}, 'e': (True, False)},
    {'a': True, 'b': {'c': False, 'd': True}, 'e': (np.True_, np.False_)},
    lambda params: jax.tree.map(lambda w: jnp.ndim(w) == 0, params),
  ],
  ids=['tree', "tree of NumPy's bools", 'function'],
)
@pytest.mark.parametrize('way', [chain, drop_in, compiled_once])
def test_masks_of_every_kind(way, mask, x64):
  seen = {}

  def ascend(grads, state, params, *, space, **extra_args):
    seen.update(grads=grads, params=params)
    return euclidean().ascend(grads, state, params, space=space)

  def init(params):
    seen.update(init=params)
    return optax.EmptyState()

  w = jnp.array
  params = {'a': w(3.0), 'b': {'c': w([1.0]), 'd': w(4.0)}, 'e': (w(12.0), w([7.0]))}

  probe = way(Metric(init, ascend), params, mask)

  there = {'a': 3.0, 'b': {'c': MASKED, 'd': 4.0}, 'e': (12.0, MASKED)}
  for name in ('init', 'grads', 'params'):
    chex.assert_trees_all_equal_structs(seen[name], there)
  step = RHO / 13
  want = {
    'a': w(3 * (1 + step)),
    'b': {'c': w([1.0]), 'd': w(4 * (1 + step))},
    'e': (w(12 * (1 + step)), w([7.0])),
  }
  chex.assert_trees_all_close(probe, want, rtol=1e-12)


def test_a_prefix_is_a_mask():
  """True for a whole layer, of which the metric sees every leaf."""
  params = {
    'body': {'w': jnp.ones((2, 2)), 'b': jnp.ones(2)},
    'head': {'w': jnp.ones(4)},
  }
  probe = chain(euclidean(), params, {'body': False, 'head': True})
  want = params | {'head': {'w': (1 + RHO / 2) * jnp.ones(4)}}
  chex.assert_trees_all_close(probe, want, rtol=1e-6)


# The metrics of the library.


def vector(tree):
  leaves = [np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)]
  return np.concatenate([np.zeros(0), *leaves])


def length(name, delta, w):
  """The length of a step where the gradient is ``w``, written out."""
  d, g = vector(delta), vector(w)
  T = {n: np.abs(x) + 0.1 if n == 'kernel' else np.ones_like(x) for n, x in w.items()}
  matrix = np.linalg.norm(delta['kernel'], 2) if 'kernel' in delta else 0.0
  others = vector({n: x for n, x in delta.items() if n != 'kernel'})
  return {
    'euclidean': np.linalg.norm(d),
    'adaptive': np.linalg.norm(d / vector(T)),
    'diagonal_fisher': np.sqrt(np.sum((1 + 0.3 * g**2) * d**2)),
    'monge': np.sqrt(d @ d + 0.25 * (g @ d) ** 2),
    'capped': np.linalg.norm(d) * max(1.0, np.linalg.norm(g) / 0.7),
    'max_norm': np.max(np.abs(d)),
    'spectral': max(matrix, np.linalg.norm(others)),
  }[name]


OURS = {
  'euclidean': euclidean(),
  'adaptive': adaptive(0.1, weights=by_name('kernel')),
  'diagonal_fisher': diagonal_fisher(0.3),
  'monge': monge(0.5),
  'capped': capped(sigma=0.7),
  'max_norm': max_norm(),
  'spectral': spectral(matrices=by_name('kernel')),
}
LAYER = {
  'kernel': np.random.default_rng(1).normal(size=(3, 2)),
  'bias': np.random.default_rng(2).normal(size=3),
  'scale': np.array(0.7),
}


@pytest.mark.slow
@every_way
@pytest.mark.parametrize('name', OURS)
def test_every_metric_has_its_length_under_every_mask(name, way, x64):
  """Also where what is called a weight, or a matrix, is masked out."""
  params = jax.tree.map(jnp.asarray, LAYER)
  for names in (('kernel',), ('bias',), ('kernel', 'scale'), ('bias', 'scale')):
    probe = way(OURS[name], params, by_name(*names))

    moved = {n: LAYER[n] for n in names}
    delta = {n: np.asarray(probe[n]) - LAYER[n] for n in names}
    np.testing.assert_allclose(length(name, delta, moved), RHO, rtol=1e-8)
    # As if there were no other leaf.
    alone = {n: params[n] for n in names}
    weights = {n: n == 'kernel' for n in names}
    bare = OURS[name]
    if name == 'adaptive':
      bare = adaptive(0.1, weights=weights)
    if name == 'spectral':
      bare = spectral(matrices=weights)
    want = params | chain(bare, alone, None)
    chex.assert_trees_all_close(probe, want, rtol=1e-9)


@pytest.mark.parametrize('metric', [dense(FOUR), *OURS.values()], ids=['dense', *OURS])
def test_a_leaf_without_a_gradient_is_masked_out(metric, x64):
  params = jax.tree.map(jnp.asarray, FOUR)
  if metric is OURS['adaptive']:
    metric = adaptive(0.1)
  if metric is OURS['spectral']:
    metric = spectral()
  tx = sharpness_aware(metric, RHO)
  without = lambda grads: grads | {'a': None}
  grad_fn = lambda params: without(jax.grad(half_square)(params))

  probe, _ = tx.update(without(params), tx.init(params), params, grad_fn=grad_fn)

  assert probe['a'] is None
  want = chain(metric, params, by_name('b', 'c'))
  chex.assert_trees_all_close(probe, without(want), rtol=1e-12)


# A metric with a state.


def running_mean(decay=0.9):
  """Climbs the exponential mean of the gradients."""

  def init(params):
    return {'mean': optax.tree.zeros_like(params)}

  def ascend(grads, state, params, *, space, **extra_args):
    mean = optax.tree.update_moment(grads, state['mean'], decay, 1)
    unit, _ = space.normalize(mean)
    return Ascent(unit, space.dot(unit, grads)), {'mean': mean}

  return Metric(init, ascend)


NET = {
  'backbone': {'kernel': jnp.ones((64, 32)), 'bias': jnp.ones(32)},
  'head': {'kernel': jnp.array([3.0, 4.0])},
}
head = by_name('head')


def size_of(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_a_state_has_no_bytes_for_a_frozen_backbone():
  scalars = size_of(sharpness_aware(euclidean(), RHO).init(NET))
  masked = sharpness_aware(running_mean(), RHO, mask=head)
  whole = sharpness_aware(running_mean(), RHO)

  assert size_of(masked.init(NET)) == scalars + 4 * 2
  assert size_of(whole.init(NET)) == scalars + 4 * (64 * 32 + 32 + 2)
  # Nor is any made on the way: shapes alone, of a backbone that has no room here.
  large = NET | {'backbone': jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32)}
  shapes = jax.eval_shape(masked.init, large)
  assert size_of(shapes) == scalars + 4 * 2
  frozen = {'backbone': MASKED, 'head': {'kernel': 0}}
  chex.assert_trees_all_equal_structs(shapes.metric_state, {'mean': frozen})


def test_the_state_that_is_kept_is_the_one_by_hand():
  tx = sharpness_aware(running_mean(), RHO, mask=head)
  grad_fn = jax.grad(half_square)

  def step(carry, g):
    state, params = carry
    grads = params | {'head': {'kernel': g}}
    probe, state = tx.update(grads, state, params, grad_fn=grad_fn)
    return (state, params), optax.tree.get(probe['head'], 'kernel')

  gs = np.random.default_rng(3).normal(size=(4, 2)).astype(np.float32)
  (state, _), probes = jax.lax.scan(step, (tx.init(NET), NET), gs)

  mean = np.zeros(2)
  for g, probe in zip(gs.astype(np.float64), probes, strict=True):
    mean = 0.9 * mean + 0.1 * g
    want = np.array([3.0, 4.0]) + RHO * mean / np.linalg.norm(mean)
    np.testing.assert_allclose(probe, want, rtol=1e-5)
  got = state.metric_state['mean']
  np.testing.assert_allclose(got['head']['kernel'], mean, rtol=1e-5)


def test_optax_maps_over_what_the_state_has_of_parameters():
  tx = optax.chain(sharpness_aware(running_mean(), RHO, mask=head), optax.trace(0.9))
  state = tx.init(NET)

  doubled = optax.tree.map_params(tx, lambda x: x + 2.0, state)

  chex.assert_trees_all_equal_shapes_and_dtypes(doubled, state)
  ascent, trace = doubled[0], doubled[1]
  np.testing.assert_array_equal(
    ascent.metric_state['mean']['head']['kernel'], [2.0, 2.0]
  )
  np.testing.assert_array_equal(trace.trace['backbone']['bias'], np.full(32, 2.0))
  assert ascent.count == 0
  assert ascent.slope == 0


def test_a_masked_state_under_inject_hyperparams():
  make = optax.inject_hyperparams(msam, static_args=('base', 'mask'))
  tx = make(rho=0.1, alpha=0.5, base=running_mean(), mask=head)
  state, grad_fn = tx.init(NET), jax.grad(half_square)
  state.hyperparams['rho'] = jnp.float32(RHO)

  probe, state = jax.jit(
    lambda state, params: tx.update(params, state, params, grad_fn=grad_fn)
  )(state, NET)

  # The mean of one gradient, (3, 4), is along it, with its slope of 5.
  want = np.array([3.0, 4.0]) * (1 + RHO / 5 / np.sqrt(1 + 0.25 * 25))
  np.testing.assert_allclose(probe['head']['kernel'], want, rtol=1e-6)
  chex.assert_trees_all_equal(probe['backbone'], NET['backbone'])
  mean = optax.tree.get(state, 'mean')
  assert len(jax.tree.leaves(mean)) == 1
  np.testing.assert_allclose(mean['head']['kernel'], [0.3, 0.4], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('target', ['state', 'shapes'])
def test_a_masked_state_comes_back_from_a_checkpoint(tmp_path, target):
  tx = sharpness_aware(running_mean(), RHO, mask=head)
  grad_fn = jax.grad(half_square)
  _, state = tx.update(NET, tx.init(NET), NET, grad_fn=grad_fn)
  like = tx.init(NET) if target == 'state' else jax.eval_shape(tx.init, NET)

  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'state', state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / 'state', like)

  chex.assert_trees_all_equal(restored, state)
  step = lambda state: tx.update(NET, state, NET, grad_fn=grad_fn)
  chex.assert_trees_all_equal(step(restored), step(state))


# Extra arguments.


def quartic(params):
  """A loss whose gradient is ``w³``: not linear, so that a wrong point is seen."""
  return sum(0.25 * jnp.sum(w**4) for w in jax.tree.leaves(params))


def inquisitive(seen):
  """Euclidean; asks for the gradient at twice its params, and notes what it gets."""

  def ascend(grads, state, params, *, space, rho, grad_fn, **extra_args):
    doubled = jax.tree.map(lambda w: 2.0 * w, params)
    seen.append({'there': grad_fn(doubled), 'rho': rho} | extra_args)
    return euclidean().ascend(grads, state, params, space=space)

  return Metric(lambda params: optax.EmptyState(), ascend)


def assert_there(there, params):
  """The gradient at twice the admitted leaves, and at the others as they are."""
  got = jax.tree.leaves(there)
  np.testing.assert_allclose(got[0], 8 * np.asarray(params['head']['kernel']) ** 3)
  assert len(got) == 1


def test_extra_arguments_of_update_reach_the_metric():
  seen = []
  rho = optax.linear_schedule(0.4, 0.0, transition_steps=4)
  tx = optax.chain(sharpness_aware(inquisitive(seen), rho, mask=head), optax.sgd(1.0))
  grad_fn = jax.grad(quartic)

  _, state = tx.update(NET, tx.init(NET), NET, grad_fn=grad_fn, hint='why', batch=3)
  tx.update(NET, state, NET, value_and_grad_fn=jax.value_and_grad(quartic), value=1.5)

  first, second = seen
  for each, radius in ((first, 0.4), (second, 0.3)):
    assert_there(each.pop('there'), NET)
    np.testing.assert_allclose(each.pop('rho'), radius, rtol=1e-6)
  assert first == {'hint': 'why', 'batch': 3}
  assert second == {'value': 1.5}


@pytest.mark.parametrize('once', [False, True], ids=['two copies', 'one loop'])
def test_the_radius_and_the_gradient_reach_the_metric_of_the_drop_in(once):
  seen = []
  metric = inquisitive(seen)

  def ascend(grads, state, params, **extra_args):
    result = metric.ascend(grads, state, params, **extra_args)
    # In a loop it is traced, so its values leave it by a callback.
    asked = seen.pop()
    note = lambda *leaves: seen.append(leaves)
    jax.debug.callback(note, asked.pop('rho'), *jax.tree.leaves(asked.pop('there')))
    assert not asked
    return result

  wrapped = Metric(metric.init, ascend)
  value_and_grad_fn = value_and_grad(
    quartic, wrapped, RHO, mask=head, compile_once=once
  )
  value_and_grad_fn(NET)
  jax.effects_barrier()

  # In the turn at the params the metric has nothing to ask, and gets zeros.
  assert len(seen) == 1 + once
  rho, *there = seen[-1]
  np.testing.assert_allclose(rho, RHO, rtol=1e-6)
  assert_there(there, NET)


@pytest.mark.slow
def test_the_gradient_that_a_metric_asks_for_is_averaged_as_its_own_is():
  """With ``sync_ascent`` that at other parameters is a mean over replicas as well."""
  seen = []
  tx = sharpness_aware(inquisitive(seen), RHO, axis_name='i', sync_ascent=True)

  def step(c):
    w = {'head': {'kernel': jnp.array([3.0, 4.0])}}
    grad_fn = lambda p: jax.tree.map(lambda x: c * x, p)
    update, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
    return update, seen[-1]['there']

  _, there = jax.vmap(step, axis_name='i')(jnp.array([1.0, 3.0]))
  np.testing.assert_allclose(there['head']['kernel'], [[12.0, 16.0]] * 2, rtol=1e-6)


def test_extra_arguments_reach_the_metric_of_an_nnx_model():
  seen, model = [], Model({'a': jnp.array([3.0, 4.0]), 'b': jnp.ones(2)})
  loss = lambda model: quartic(nnx.state(model, nnx.Param))
  tx = sharpness_aware(inquisitive(seen), RHO, mask=by_name('a'))
  optimizer = nnx.Optimizer(model, optax.chain(tx, optax.sgd(0.1)), wrt=nnx.Param)
  grad_fn = flax_nnx.grad_fn(loss, model)

  optimizer.update(model, nnx.grad(loss)(model), grad_fn=grad_fn, hint='why')

  (got,) = seen
  assert got['hint'] == 'why'
  (there,) = jax.tree.leaves(got['there'])
  np.testing.assert_allclose(there, [8 * 27.0, 8 * 64.0])


# Metrics that are none.


@pytest.mark.parametrize(
  ('ascend', 'message'),
  [
    (lambda grads, state, params: None, "unexpected keyword argument 'space'"),
    (lambda grads, state, params, *, space: None, "keyword argument 'rho'"),
    (
      lambda grads, state, params, *, space, rho, grad_fn: None,
      'unexpected keyword argument',
    ),
    (lambda grads, state, **extra_args: None, 'too many positional arguments'),
    (
      lambda grads, state, params, *, batch, **extra_args: None,
      "missing a required .*'batch'",
    ),
  ],
  ids=['none', 'space alone', 'no others', 'no params', 'needs one'],
)
@pytest.mark.parametrize(
  'make',
  [
    lambda metric: sharpness_aware(metric, RHO),
    lambda metric: value_and_grad(half_square, metric),
    lambda metric: flax_nnx.value_and_grad(of_model, metric),
    lambda metric: msam(base=metric),
    capped,
    spectral,
  ],
  ids=['chain', 'drop-in', 'nnx', 'msam', 'capped', 'spectral'],
)
def test_a_metric_without_room_for_extra_arguments_is_refused(make, ascend, message):
  metric = Metric(lambda params: optax.EmptyState(), ascend)
  with pytest.raises(TypeError, match=rf'cannot be called as one.*{message}') as error:
    make(metric)
  assert 'def ascend(grads, state, params, *, space, **extra_args)' in str(error.value)


@pytest.mark.parametrize(
  ('direction', 'message'),
  [
    (lambda g: {'a': g['a']}, r"is no leaf at \['b'\]"),
    (lambda g: g | {'c': g['a']}, r"an extra leaf at \['c'\]"),
    (lambda g: g | {'b': g['b'][:1]}, r"at \['b'\] its shape is \(1,\), not \(2,\)"),
    (lambda g: jnp.ones(3), 'an extra leaf at the root'),
  ],
  ids=['missing', 'too many', 'shape', 'flat'],
)
@pytest.mark.parametrize('way', [chain, drop_in, compiled_once, nnx_drop_in])
def test_a_direction_that_is_not_like_the_gradients_is_refused(way, direction, message):
  def ascend(grads, state, params, *, space, **extra_args):
    pure = grads if isinstance(grads, dict) else nnx.to_pure_dict(grads)
    return Ascent(direction(pure), jnp.ones([])), state

  metric = Metric(lambda params: optax.EmptyState(), ascend)
  params = {'a': jnp.ones([]), 'b': jnp.ones(2)}
  if way is nnx_drop_in:
    message = 'must be like the gradients'
  with pytest.raises(ValueError, match=message):
    way(metric, params, None)


@pytest.mark.parametrize(
  ('result', 'error', 'message'),
  [
    (lambda ascent, state: ascent, TypeError, 'but it returns a Ascent'),
    (lambda ascent, state: None, TypeError, 'but it returns a NoneType'),
    (lambda ascent, state: ((*ascent,), state), TypeError, 'but it returns a tuple'),
    (
      lambda ascent, state: (ascent._replace(slope=jnp.ones(2)), state),
      ValueError,
      r'slope .* must be a scalar, but its shape is \(2,\)',
    ),
  ],
  ids=['no state', 'None', 'plain tuple', 'slope'],
)
@pytest.mark.parametrize('way', [chain, drop_in, compiled_once, nnx_drop_in])
def test_what_is_no_ascent_and_a_state_is_refused(way, result, error, message):
  def ascend(grads, state, params, *, space, **extra_args):
    ascent, state = euclidean().ascend(grads, state, params, space=space)
    return result(ascent, state)

  metric = Metric(lambda params: optax.EmptyState(), ascend)
  with pytest.raises(error, match=message):
    way(metric, {'a': jnp.ones([]), 'b': jnp.ones(2)}, None)
