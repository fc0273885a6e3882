"""Combinations: the formula of each in float64, wherever the batch and the params are.

The loss is ``mean (sin(x·a) + x₁b₁ + x₂b₂ − y)²``, whose gradient NumPy has in closed
form. Metrics and combinations are written down here a second time, as formulas of
vectors; means over the parts of a batch are loops.
"""

import functools

import chex
from flax import linen as nn
from flax import nnx
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from benchmarks.common import hlo
import msam_optax
from msam_optax import flax_linen
from msam_optax import flax_nnx

RHO = 0.3
ROWS = 32
PARTS = 4


# ----- The truth ------------------------------------------------------------------


def sam(g, g_plus):
  return g_plus


def wsam(g, g_plus, a=1.7):
  return (1 - a) * g + a * g_plus


def gsam(g, g_plus, alpha=0.6):
  return g_plus - alpha * (g - (g @ g_plus) / (g_plus @ g_plus) * g_plus)


def cr_sam(g, g_plus, g_minus, gamma=0.3, beta=0.2):
  return g_plus + gamma * (g_plus + g_minus - 2 * g) + beta * (g_plus - g_minus)


# The library's, its formula, and where its probes are.
COMBINATIONS = {
  'sam': (msam_optax.probe_gradient(), sam, (1,)),
  'wsam': (msam_optax.weighted(1.7), wsam, (1,)),
  'gsam': (msam_optax.surrogate_gap(0.6), gsam, (1,)),
  'cr_sam': (msam_optax.curvature(0.3, 0.2), cr_sam, (1, -1)),
}
METHODS = {
  'sam': lambda rho, metric: msam_optax.sharpness_aware(metric, rho),
  'wsam': lambda rho, metric: msam_optax.wsam(rho, 1.7 / 2.7, metric=metric),
  'gsam': lambda rho, metric: msam_optax.gsam(rho, 0.6, metric=metric),
  'cr_sam': lambda rho, metric: msam_optax.cr_sam(rho, 0.3, 0.2, metric=metric),
}


def euclidean_slope(w, g):
  return np.sqrt(g @ g), g / np.sqrt(g @ g)


def monge_slope(w, g, alpha=1.5):
  n = np.sqrt(g @ g)
  root = np.sqrt(1 + alpha**2 * n**2)
  return n / root, g / (n * root)


def adaptive_slope(w, g, eta=0.1):
  T = np.abs(w) + eta
  n = np.sqrt((T * g) @ (T * g))
  return n, T**2 * g / n


def everything(params):
  return jax.tree.map(lambda _: True, params)


METRICS = {
  'euclidean': (msam_optax.euclidean(), euclidean_slope),
  'monge': (msam_optax.monge(1.5), monge_slope),
  'adaptive': (msam_optax.adaptive(0.1, weights=everything), adaptive_slope),
}


def value_and_slope(w, x, y, counts):
  """Loss and gradient in float64; ``counts`` says how often each example counts."""
  a, b = w[:3], w[3:]
  residual = np.sin(x @ a) + x[:, :2] @ b - y
  outer = 2 * counts * residual
  slope = np.concatenate([x.T @ (outer * np.cos(x @ a)), x[:, :2].T @ outer])
  total = counts.sum() or 1.0
  return counts @ residual**2 / total, slope / total


def truth(
  name,
  metric='monge',
  *,
  cuts=(slice(None),),
  synced=False,
  counts=None,
  moved=1.0,
  start=None,
  rho=RHO,
):
  """Loss, update, slope and radius, by loops in float64.

  Args:
    name: a key of ``COMBINATIONS``.
    metric: a key of ``METRICS``.
    cuts: which rows are in each part of the batch.
    synced: whether all parts have one ascent.
    counts: how often each example counts, by default once.
    moved: vector, one for each parameter that is perturbed, zero for others.
    start: vector, the parameters.
    rho: the radius.

  Returns:
    The loss, a vector, and the means of the slopes and of the radii.
  """
  _, formula, scales = COMBINATIONS[name]
  w = flat(make_params()) if start is None else start
  x, y = (np.asarray(z, np.float64) for z in make_data())
  counts = np.ones(ROWS) if counts is None else counts
  weights = np.array([counts[cut].sum() for cut in cuts])
  mean = lambda parts: (
    sum(c * p for c, p in zip(weights, parts, strict=True)) / sum(weights)
  )
  at = lambda w, cut: value_and_slope(w, x[cut], y[cut], counts[cut])
  clean = [at(w, cut) for cut in cuts]
  own = [g for _, g in clean]
  ascents = [mean(own)] * len(cuts) if synced else own
  zero = 0.0, np.zeros_like(w)
  rises = [
    METRICS[metric][1](w, moved * g) if np.any(moved * g) else zero for g in ascents
  ]
  probes = [
    mean(
      [
        at(w + rho * scale * moved * direction, cut)[1]
        for (_, direction), cut in zip(rises, cuts, strict=True)
      ]
    )
    for scale in scales
  ]
  slope = mean([slope for slope, _ in rises])
  radius = mean([rho * np.sqrt(u @ u) for _, u in rises])
  return mean([value for value, _ in clean]), formula(mean(own), *probes), slope, radius


def strided(parts):
  """The rows of each micro-batch: of number i these are i, i + parts, …"""
  return [np.arange(i, ROWS, parts) for i in range(parts)]


def consecutive(parts):
  """The rows of each device."""
  return list(np.arange(ROWS).reshape(parts, -1))


# ----- The library ----------------------------------------------------------------


def make_params(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  draw = lambda n: jnp.asarray(rng.normal(size=n), dtype)
  return {'a': draw(3), 'b': draw(2)}


def make_data():
  rng = np.random.default_rng(1)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return draw(ROWS, 3), draw(ROWS)


def flat(tree):
  return np.concatenate(
    [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
  )


def squares(params, x, y):
  a, b = (params[name].astype(jnp.float32) for name in 'ab')
  return (jnp.sin(x @ a) + x[:, :2] @ b - y) ** 2


def loss(params, data):
  return jnp.mean(squares(params, *data))


def counted_loss(params, data):
  """The total over examples, and how many there are."""
  x, y, counts = data
  return jnp.sum(counts * squares(params, x, y)), jnp.sum(counts)


def chain(name, metric='monge', loss=loss, **kwargs):
  """``(params, data) -> (value, updates, state)`` of the transformation."""
  combination, _, _ = COMBINATIONS[name]
  tx = msam_optax.sharpness_aware(METRICS[metric][0], RHO, combination, **kwargs)

  def step(params, data):
    value_and_grad_fn = jax.value_and_grad(lambda p: loss(p, data))
    value, grads = value_and_grad_fn(params)
    updates, _ = tx.update(
      grads, tx.init(params), params, value_and_grad_fn=value_and_grad_fn
    )
    return value, updates

  return step


def drop_in(name, metric='monge', loss=loss, **kwargs):
  return msam_optax.value_and_grad(
    loss, METRICS[metric][0], RHO, COMBINATIONS[name][0], **kwargs
  )


WAYS = {
  'chain': chain,
  'drop-in': drop_in,
  'compiled once': functools.partial(drop_in, compile_once=True),
}


def assert_close(got, want, rtol=2e-6):
  got = got if isinstance(got, np.ndarray) else flat(got)
  np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * np.abs(want).max())


def slow_unless(quick, names):
  """All names, but in a plain run only those in ``quick``."""
  return [pytest.param(x, marks=() if x in quick else pytest.mark.slow) for x in names]


def names(*quick):
  return pytest.mark.parametrize('name', slow_unless(quick, COMBINATIONS))


def ways(*quick):
  return pytest.mark.parametrize('way', slow_unless(quick, WAYS))


every_combination = names(*COMBINATIONS)
every_way = ways(*WAYS)
every_metric = pytest.mark.parametrize('metric', METRICS)
passes = pytest.mark.parametrize('once', [False, True], ids=['two copies', 'one loop'])
both_syncs = pytest.mark.parametrize('sync', [False, True], ids=['own', 'synced'])
both_orders = pytest.mark.parametrize('vectorize', [False, True], ids=['scan', 'vmap'])


# ----- One device -----------------------------------------------------------------


@pytest.mark.slow
@every_metric
@every_combination
def test_methods_in_a_chain(name, metric):
  """Update, value and scalars of each method over each metric."""
  tx = METHODS[name](RHO, METRICS[metric][0])

  @jax.jit
  def step(params, data):
    value_and_grad_fn = jax.value_and_grad(lambda p: loss(p, data))
    value, grads = value_and_grad_fn(params)
    state = tx.init(params)
    return tx.update(
      grads, state, params, value_and_grad_fn=value_and_grad_fn, value=value
    )

  params = make_params()
  updates, state = step(params, make_data())
  value, want, slope, radius = truth(name, metric)
  assert_close(updates, want)
  np.testing.assert_allclose(state.slope, slope, rtol=1e-6)
  np.testing.assert_allclose(state.radius, radius, rtol=1e-5)
  # The recorded probe is the first, uphill one.
  x, y = (np.asarray(z, np.float64) for z in make_data())
  at = lambda w: value_and_slope(w, x, y, np.ones(ROWS))
  _, direction = METRICS[metric][1](flat(params), at(flat(params))[1])
  at_probe, _ = at(flat(params) + RHO * direction)
  np.testing.assert_allclose(state.probe_value, at_probe, rtol=1e-6)
  np.testing.assert_allclose(state.rise, at_probe - value, rtol=1e-5)
  assert state.finite
  assert state.count == 1


@pytest.mark.slow
@passes
@every_combination
def test_the_drop_in(name, once):
  value, grads = jax.jit(drop_in(name, compile_once=once))(make_params(), make_data())
  want_value, want, *_ = truth(name)
  np.testing.assert_allclose(value, want_value, rtol=1e-6)
  assert_close(grads, want)


@passes
@pytest.mark.parametrize('metric', ['euclidean', 'adaptive'])
@names('gsam')
def test_the_drop_in_over_other_metrics(name, metric, once):
  _, grads = jax.jit(drop_in(name, metric, compile_once=once))(
    make_params(), make_data()
  )
  assert_close(grads, truth(name, metric)[1])


@pytest.mark.usefixtures('x64')
@every_way
@names('gsam', 'cr_sam')
def test_double_precision_is_kept(name, way):
  params = make_params(jnp.float64)
  data = tuple(x.astype(jnp.float64) for x in make_data())

  def wide(params, data):
    x, y = data
    return jnp.mean((jnp.sin(x @ params['a']) + x[:, :2] @ params['b'] - y) ** 2)

  _, grads = jax.jit(WAYS[way](name, loss=wide))(params, data)
  assert_close(grads, truth(name, start=flat(params))[1], rtol=1e-13)


@every_way
def test_probes_anywhere_and_as_many_as_wanted(way):
  """Three probes, one of them twice as far and one downhill, told apart by weights."""

  def combine(grads, state, space):
    weights = (1.0, 10.0, 100.0, 1000.0)
    terms = zip(weights, space.mean(grads), strict=True)
    return jax.tree.map(lambda *xs: sum(xs), *(scaled(c, g) for c, g in terms)), state

  scaled = lambda c, tree: jax.tree.map(lambda x: c * x, tree)
  combination = msam_optax.Combination(lambda params: (), combine, (0.5, -1, 2.0))
  formula = lambda g, *gs: g + 10 * gs[0] + 100 * gs[1] + 1000 * gs[2]
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(COMBINATIONS, 'three', (combination, formula, (0.5, -1, 2)))
    _, grads = jax.jit(WAYS[way]('three'))(make_params(), make_data())
    assert_close(grads, truth('three')[1])


@pytest.mark.standard_promotion
@names('gsam')
def test_injected_numbers_may_change(name):
  """Under ``optax.inject_hyperparams``, with a schedule for each number."""
  make = {
    'sam': (msam_optax.sam, {}),
    'wsam': (msam_optax.wsam, {'gamma': 1.7 / 2.7}),
    'gsam': (msam_optax.gsam, {'alpha': 0.6}),
    'cr_sam': (msam_optax.cr_sam, {'gamma': 0.3, 'beta': 0.2}),
  }
  method, numbers = make[name]
  constant = lambda x: lambda count: x
  schedules = {key: constant(x) for key, x in {'rho': RHO, **numbers}.items()}
  tx = optax.inject_hyperparams(method)(**schedules)
  params, data = make_params(), make_data()

  @jax.jit
  def step(params, state):
    grad_fn = jax.grad(lambda p: loss(p, data))
    return tx.update(grad_fn(params), state, params, grad_fn=grad_fn)

  updates, _ = step(params, tx.init(params))
  assert_close(updates, truth(name, 'euclidean')[1])


# ----- Micro-batches --------------------------------------------------------------


@pytest.mark.slow
@both_syncs
@both_orders
@passes
@names('gsam')
def test_micro_batches(name, once, vectorize, sync):
  """What is combined are the means over all micro-batches."""
  value_and_grad_fn = drop_in(
    name, shards=4, vectorize_shards=vectorize, sync_ascent=sync, compile_once=once
  )
  value, grads = jax.jit(value_and_grad_fn)(make_params(), make_data())
  want_value, want, *_ = truth(name, cuts=strided(4), synced=sync)
  np.testing.assert_allclose(value, want_value, rtol=1e-6)
  assert_close(grads, want)


COUNTS = np.random.default_rng(2).integers(1, 4, ROWS).astype(np.float64)


def counts_with(empty):
  counts = COUNTS.copy()
  counts[empty] = 0
  return counts


def counted_data(counts):
  return *make_data(), jnp.asarray(counts, jnp.float32)


@both_syncs
@passes
@names('wsam')
def test_examples_count_by_their_weights(name, once, sync):
  """One of four micro-batches is empty, and the others differ."""
  counts = counts_with(strided(4)[1])
  value_and_grad_fn = drop_in(
    name,
    loss=counted_loss,
    shards=4,
    sync_ascent=sync,
    compile_once=once,
    has_weight=True,
    loss_scale=1024.0,
  )
  value, grads = jax.jit(value_and_grad_fn)(make_params(), counted_data(counts))
  want_value, want, *_ = truth(name, cuts=strided(4), synced=sync, counts=counts)
  np.testing.assert_allclose(value, want_value, rtol=1e-6)
  assert_close(grads, want)


# ----- What parameters may be -----------------------------------------------------


@passes
@names('cr_sam')
def test_parameters_in_several_arguments(name, once):
  value_and_grad_fn = msam_optax.value_and_grad(
    lambda a, data, b: loss({'a': a, 'b': b}, data),
    METRICS['monge'][0],
    RHO,
    COMBINATIONS[name][0],
    argnums=(0, -1),
    shards=2,
    compile_once=once,
  )
  params = make_params()
  _, grads = jax.jit(value_and_grad_fn)(params['a'], make_data(), params['b'])
  assert isinstance(grads, tuple)
  assert_close(grads, truth(name, cuts=strided(2))[1])


@every_way
@names('gsam')
def test_masks_stop_the_probe_and_not_the_gradient(name, way):
  step = WAYS[way](name, mask={'a': True, 'b': False})
  _, grads = jax.jit(step)(make_params(), make_data())
  assert_close(grads, truth(name, moved=np.array([1.0, 1, 1, 0, 0]))[1])


@every_way
@names('gsam')
def test_bfloat16_parameters_with_a_probe_in_float32(name, way):
  """The update is the formula's, rounded to bfloat16 once."""
  params = make_params(jnp.bfloat16)
  step = WAYS[way](name, perturbation_dtype='float32')
  _, grads = jax.jit(step)(params, make_data())
  chex.assert_trees_all_equal_dtypes(grads, params)
  # In a chain the clean gradient comes rounded; drop-ins have it so as well.
  assert_close(grads, truth(name, start=flat(params))[1], rtol=2e-2)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@every_combination
def test_narrow_gradients_are_combined_in_float32(name, dtype):
  """Rounded gradients in, the formula in float32 or wider, one rounding at the end."""
  rng = np.random.default_rng(3)
  combination, formula, scales = COMBINATIONS[name]
  grads = [jnp.asarray(rng.normal(size=64), dtype) for _ in range(1 + len(scales))]
  update, _ = combination.combine(tuple(grads), (), msam_optax.LOCAL)
  want = formula(*(np.asarray(g, np.float64) for g in grads))
  assert update.dtype == dtype
  ulp = float(jnp.finfo(dtype).eps)
  np.testing.assert_allclose(
    np.asarray(update, np.float64), want, rtol=0.501 * ulp, atol=1e-6
  )


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32', 'int32', 'uint8'])
@pytest.mark.parametrize('traced', [False, True], ids=['array', 'traced'])
def test_numbers_of_any_dtype(dtype, traced):
  """They are widened before anything is made of them: 1 − a, −α, γ + β."""
  number = jnp.asarray(1 if 'int' in dtype else 0.1, dtype)
  exact = float(number)
  rng = np.random.default_rng(4)
  grads = [rng.normal(size=5).astype(np.float32) for _ in range(3)]
  cases = [
    (msam_optax.weighted, functools.partial(wsam, a=exact), 2),
    (msam_optax.surrogate_gap, functools.partial(gsam, alpha=exact), 2),
    (
      lambda x: msam_optax.curvature(x, x),
      functools.partial(cr_sam, gamma=exact, beta=exact),
      3,
    ),
  ]
  for make, formula, count in cases:
    seen = tuple(jnp.asarray(g) for g in grads[:count])
    f = lambda x: make(x).combine(seen, (), msam_optax.LOCAL)[0]
    got = (jax.jit(f) if traced else f)(number)
    assert got.dtype == jnp.float32
    assert_close(got, formula(*(g.astype(np.float64) for g in grads[:count])))


def odd_params():
  """Floats that move, and what has another gradient, or none."""
  return {
    **make_params(),
    'count': jnp.arange(3),
    'frozen': jnp.ones(2),
    'z': jnp.array([0.3 + 0.4j, -1.0 + 0.5j], jnp.complex64),
    '_overwrite_with_gradient': {'amax': jnp.array([2.0, 3.0])},
  }


@pytest.mark.slow
@pytest.mark.parametrize(
  'jit', [pytest.param(False, marks=pytest.mark.slow), True], ids=['eager', 'jit']
)
@every_combination
def test_leaves_without_gradients_are_not_in_a_combination(name, jit):
  """Integers, FP8 scaling factors and None stay out of inner products.

  A complex leaf is two real ones. It multiplies the loss by ``1 + |z|²``, and JAX has
  as its gradient the conjugate of ``2 z ℓ``.
  """
  params, data = odd_params(), make_data()
  movable = {'a': True, 'b': True, 'frozen': True, 'count': False, 'z': False}
  mask = {**movable, '_overwrite_with_gradient': False}
  tx = msam_optax.sharpness_aware(
    METRICS['monge'][0], RHO, COMBINATIONS[name][0], mask=mask
  )

  def grad_fn(params):
    a, b, z = (params[name] for name in 'abz')
    gradients_of = jax.grad(
      lambda a, b, z: loss({'a': a, 'b': b}, data) * size(z), (0, 1, 2)
    )
    a, b, z = gradients_of(a, b, z)
    return {
      'a': a,
      'b': b,
      'z': z,
      'count': np.zeros(3, jax.dtypes.float0),
      'frozen': None,
      '_overwrite_with_gradient': {'amax': jnp.array([50.0, 60.0])},
    }

  size = lambda z: 1 + jnp.sum(jnp.real(z * jnp.conj(z)))
  grads = grad_fn(params)
  if not jit:
    updates, state = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
  else:
    update = lambda p: tx.update(grad_fn(p), tx.init(p), p, grad_fn=grad_fn)
    updates, state = jax.jit(update)(params)
  assert updates['frozen'] is None
  assert updates['count'].dtype == jax.dtypes.float0
  assert updates['z'].dtype == jnp.complex64
  np.testing.assert_array_equal(optax.tree.get(updates, 'amax'), [50, 60])

  _, formula, scales = COMBINATIONS[name]
  x, y = (np.asarray(v, np.float64) for v in data)
  z = np.asarray(params['z'], np.complex128)

  def slope(w):
    value, g = value_and_slope(w, x, y, np.ones(ROWS))
    of_z = 2 * np.conj(z) * value
    return np.concatenate([g * (1 + np.sum(np.abs(z) ** 2)), of_z.real, of_z.imag])

  w = flat(make_params())
  g = slope(w)
  _, direction = monge_slope(w, g[:5])
  want = formula(g, *(slope(w + s * RHO * direction) for s in scales))
  got = [updates['a'], updates['b'], jnp.real(updates['z']), jnp.imag(updates['z'])]
  assert_close(got, want)
  assert state.finite


# ----- Several devices ------------------------------------------------------------

cpu = pytest.mark.cpu


def mesh(**axes):
  devices = np.array(jax.devices()[: int(np.prod(list(axes.values())))])
  return jax.sharding.Mesh(devices.reshape(*axes.values()), tuple(axes))


def vary(tree, axis='i'):
  """Replicated arrays as ones that vary over the axis."""
  if hasattr(jax.lax, 'pcast'):
    return jax.lax.pcast(tree, axis, to='varying')
  return jax.lax.pvary(tree, axis)


def deal(tree):
  """Rows for each of the devices, along a new first axis."""
  return jax.tree.map(lambda x: x.reshape(PARTS, -1, *x.shape[1:]), tree)


def in_shard_map(step, check_vma):
  """``step`` on all devices; every result has a first axis, one row for each."""

  def inner(params, data):
    results = step(vary(params) if check_vma else params, data)
    return jax.tree.map(lambda x: jnp.asarray(x)[None], results)

  return jax.jit(
    jax.shard_map(
      inner,
      mesh=mesh(i=PARTS),
      in_specs=(P(), P('i')),
      out_specs=P('i'),
      check_vma=check_vma,
    )
  )


KINDS = {
  'unchecked': lambda step: in_shard_map(step, check_vma=False),
  'checked': lambda step: in_shard_map(step, check_vma=True),
  'vmap': lambda step: (
    lambda params, data: jax.jit(jax.vmap(step, axis_name='i', in_axes=(None, 0)))(
      params, deal(data)
    )
  ),
  'pmap': lambda step: (
    lambda params, data: jax.pmap(step, axis_name='i', in_axes=(None, 0))(
      params, deal(data)
    )
  ),
}
every_kind = pytest.mark.parametrize('kind', KINDS)
without_pmap_warning = pytest.mark.filterwarnings('ignore:.*pmap.*')


def assert_on_all(results, want, rtol=2e-6):
  """The same bits on all replicas, and those of the formula."""
  for x in jax.tree.leaves(results):
    np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))
  assert_close(jax.tree.map(lambda x: x[0], results), want, rtol)


@cpu
@without_pmap_warning
@both_syncs
@every_way
@pytest.mark.parametrize('kind', slow_unless(('checked',), KINDS))
@names('gsam')
def test_replicas(name, kind, way, sync):
  step = WAYS[way](name, axis_name='i', sync_ascent=sync)
  values, updates = KINDS[kind](step)(make_params(), make_data())
  value, want, *_ = truth(name, cuts=consecutive(PARTS), synced=sync)
  assert_on_all(updates, want)
  np.testing.assert_allclose(np.mean(values), value, rtol=1e-6)


@pytest.mark.slow
@cpu
@both_syncs
@every_way
@names('wsam', 'cr_sam')
def test_replicas_in_a_plain_vmap(name, way, sync):
  """The quickest kind of map to compile."""
  step = WAYS[way](name, axis_name='i', sync_ascent=sync)
  _, updates = KINDS['vmap'](step)(make_params(), make_data())
  assert_on_all(updates, truth(name, cuts=consecutive(PARTS), synced=sync)[1])


@cpu
@both_syncs
@passes
@pytest.mark.parametrize('kind', slow_unless(('vmap',), ('vmap', 'checked')))
@names('gsam')
def test_micro_batches_on_each_replica(name, kind, once, sync):
  """Four replicas with two micro-batches each are eight parts."""
  step = drop_in(name, axis_name='i', shards=2, sync_ascent=sync, compile_once=once)
  _, updates = KINDS[kind](step)(make_params(), make_data())
  cuts = [rows[i::2] for rows in consecutive(PARTS) for i in range(2)]
  assert_on_all(updates, truth(name, cuts=cuts, synced=sync)[1])


@cpu
@both_syncs
@passes
@pytest.mark.parametrize(
  'shards', [None, pytest.param(2, marks=pytest.mark.slow)], ids=['whole', 'two each']
)
@names('wsam')
def test_an_empty_replica_adds_nothing(name, shards, once, sync):
  """By weights: one replica has no example, and the others differ."""
  counts = counts_with(consecutive(PARTS)[2])
  step = drop_in(
    name,
    loss=counted_loss,
    axis_name='i',
    shards=shards,
    sync_ascent=sync,
    compile_once=once,
    has_weight=True,
  )
  values, updates = KINDS['vmap'](step)(make_params(), counted_data(counts))
  cuts = [
    rows[i :: shards or 1] for rows in consecutive(PARTS) for i in range(shards or 1)
  ]
  value, want, *_ = truth(name, cuts=cuts, synced=sync, counts=counts)
  assert_on_all(updates, want)
  np.testing.assert_allclose(values, value, rtol=1e-6)


@cpu
@every_way
@names('gsam')
def test_sharded_arrays_under_jit(name, way):
  on = mesh(i=PARTS)
  put = lambda x, spec: jax.device_put(x, NamedSharding(on, spec))
  params = jax.tree.map(lambda x: put(x, P()), make_params())
  data = jax.tree.map(lambda x: put(x, P('i')), make_data())
  _, updates = jax.jit(WAYS[way](name))(params, data)
  assert_close(updates, truth(name)[1])


# The loss Σ hᵢwᵢ⁴/4 of parameters of which each device has a part.
STIFFNESS = np.linspace(0.5, 2.0, 8)
WHOLE = {'part': np.linspace(-1.0, 1.5, 8), 'all': np.array([0.4, -0.7])}


def whole_slope(w):
  return np.concatenate([STIFFNESS, [1.0, 1.0]]) * w**3


def sharded_loss(params, h):
  own = jnp.sum(h * params['part'] ** 4) / 4
  return jax.lax.psum(own, 'i') + jnp.sum(params['all'] ** 4) / 4


def sharded_chain(name):
  """With gradients by hand, so that an unchecked ``shard_map`` has them right."""
  specs = {'part': P('i'), 'all': P()}
  tx = msam_optax.sharpness_aware(
    METRICS['monge'][0], RHO, COMBINATIONS[name][0], param_specs=specs
  )

  def step(params, h):
    grad_fn = lambda p: {'part': h * p['part'] ** 3, 'all': p['all'] ** 3}
    return tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)[0]

  return step


def sharded_drop_in(name, once):
  specs = {'part': P('i'), 'all': P()}
  value_and_grad_fn = drop_in(
    name, loss=sharded_loss, param_specs=specs, compile_once=once
  )
  return lambda params, h: value_and_grad_fn(params, h)[1]


@cpu
@pytest.mark.parametrize(
  ('way', 'check_vma'),
  [('chain', False), ('chain', True), ('drop-in', True), ('compiled once', True)],
)
@names('gsam')
def test_inner_products_of_sharded_parameters_are_of_the_whole(name, way, check_vma):
  once = way == 'compiled once'
  step = sharded_chain(name) if way == 'chain' else sharded_drop_in(name, once)
  specs = {'part': P('i'), 'all': P()}
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), WHOLE)
  got = jax.jit(
    jax.shard_map(
      step,
      mesh=mesh(i=PARTS),
      in_specs=(specs, P('i')),
      out_specs=specs,
      check_vma=check_vma,
    )
  )(params, jnp.asarray(STIFFNESS, jnp.float32))
  _, formula, scales = COMBINATIONS[name]
  w = np.concatenate([WHOLE['part'], WHOLE['all']])
  _, direction = monge_slope(w, whole_slope(w))
  probes = [whole_slope(w + s * RHO * direction) for s in scales]
  assert_close([got['part'], got['all']], formula(whole_slope(w), *probes))


# Gradients that are summed over replicas, and in how many messages.
MESSAGES = {
  ('sam', 'own'): (1, 1),
  ('wsam', 'own'): (1, 1),
  ('gsam', 'own'): (2, 1),
  ('cr_sam', 'own'): (1, 1),
  ('sam', 'synced'): (2, 2),
  ('wsam', 'synced'): (2, 2),
  ('gsam', 'synced'): (2, 2),
  ('cr_sam', 'synced'): (2, 2),
}


def gradients_sent(step, size):
  """Gradients of ``size`` numbers that are summed, and messages that hold one."""
  inner = lambda w, x: step(w, x)[1]
  mapped = jax.shard_map(
    inner,
    mesh=mesh(i=PARTS),
    in_specs=(P(), P('i')),
    out_specs=P(),
    check_vma=False,
  )
  args = jnp.ones(size), jnp.ones((PARTS, size))
  program = hlo.read(jax.jit(mapped).lower(*args).compile().as_text())
  sent = [m for m in hlo.collectives(program) if m.kind == 'all-reduce']
  large = [m for m in sent if m.bytes >= 4 * size]
  assert len(sent) == len(hlo.collectives(program))
  # Beside them a few scalars at most: of slope, radius and the loss.
  assert (
    sum(m.bytes * m.times for m in sent)
    < 4 * size * (sum(m.bytes * m.times for m in large) // (4 * size)) + 4 * 8
  )
  total = sum(m.bytes * m.times for m in large) // (4 * size)
  return total, sum(m.times for m in large)


@cpu
@ways('chain')
@both_syncs
@every_combination
def test_what_replicas_send(name, sync, way):
  """No more than the formula needs, and never a mean twice."""
  quartic = lambda w, x: jnp.sum(jnp.mean(x, 0) * w**4)
  step = WAYS[way](name, loss=quartic, axis_name='i', sync_ascent=sync)
  want = MESSAGES[name, 'synced' if sync else 'own']
  if way == 'compiled once' and sync:
    # Each turn of the loop sends its own, since the first has to.
    turns = 1 + len(COMBINATIONS[name][2])
    want = (turns, turns)
  if want == (2, 1):
    want = gradients_sent(pair_of_means, size=256)  # Older compilers send it in two.
  assert gradients_sent(step, size=256) == want


def pair_of_means(w, x):
  a, b = jax.lax.pmean([w * x[0], w + x[0]], 'i')
  return None, a * b


# ----- Flax -----------------------------------------------------------------------


class Model(nnx.Module):
  """The same loss as a model, with a counter that must go up once a step."""

  def __init__(self):
    self.a = nnx.Param(make_params()['a'])
    self.b = nnx.Param(make_params()['b'])
    self.calls = nnx.Variable(jnp.zeros([], jnp.int32))


def model_loss(model, data):
  model.calls[...] += 1
  return loss({'a': model.a[...], 'b': model.b[...]}, data)


@pytest.mark.standard_promotion
@passes
@names('gsam', 'cr_sam')
def test_nnx_drop_in(name, once):
  model, data = Model(), make_data()
  value_and_grad_fn = flax_nnx.value_and_grad(
    model_loss, METRICS['monge'][0], RHO, COMBINATIONS[name][0], compile_once=once
  )
  value, grads = nnx.jit(value_and_grad_fn)(model, data)
  want_value, want, *_ = truth(name)
  np.testing.assert_allclose(value, want_value, rtol=1e-6)
  assert_close([grads['a'][...], grads['b'][...]], want)
  assert model.calls[...] == 1


@pytest.mark.standard_promotion
@names('gsam', 'cr_sam')
def test_nnx_optimizer(name):
  model, data = Model(), make_data()
  tx = optax.chain(METHODS[name](RHO, METRICS['monge'][0]), optax.sgd(0.1))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer, data):
    grad_fn = flax_nnx.grad_fn(model_loss, model, data)
    _, grads = nnx.value_and_grad(model_loss)(model, data)
    optimizer.update(model, grads, grad_fn=grad_fn)

  step(model, optimizer, data)
  want = flat(make_params()) - 0.1 * truth(name)[1]
  assert_close([model.a[...], model.b[...]], want)
  assert model.calls[...] == 1


class Linen(nn.Module):
  """The same loss as a Linen module."""

  @nn.compact
  def __call__(self, data):
    params = {
      name: self.param(name, lambda _, n=name: make_params()[n]) for name in 'ab'
    }
    return loss(params, data)


@pytest.mark.standard_promotion
@names('gsam', 'cr_sam')
def test_linen_train_state(name):
  module, data = Linen(), make_data()
  tx = optax.chain(chain_of(name), optax.sgd(0.1))
  variables = module.init(jax.random.key(0), data)
  state = flax_linen.TrainState.create(
    apply_fn=module.apply, params=variables['params'], tx=tx
  )

  @jax.jit
  def step(state, data):
    grad_fn = jax.grad(lambda params: state.apply_fn({'params': params}, data))
    return state.apply_gradients(grads=grad_fn(state.params), grad_fn=grad_fn)

  state = step(state, data)
  assert_close(state.params, flat(make_params()) - 0.1 * truth(name)[1])


def chain_of(name, **kwargs):
  return msam_optax.sharpness_aware(
    METRICS['monge'][0], RHO, COMBINATIONS[name][0], **kwargs
  )


# ----- Numbers that are not finite, and very large or small -----------------------


def spoilt_loss(w, data):
  """A loss whose slopes at the params, uphill and downhill are data.

  Where ``w[0]`` has moved from 1 says which of the three it is.
  """
  moved = jax.lax.stop_gradient(w[0]) - 1.0
  slopes = jnp.where(
    moved == 0, data[0, 0], jnp.where(moved > 0, data[0, 1], data[0, 2])
  )
  return jnp.sum(jax.lax.stop_gradient(slopes) * w)


PASSES = {'clean': 0, 'uphill': 1, 'downhill': 2}


@cpu
@both_syncs
@ways('chain')
@pytest.mark.parametrize('bad', [np.nan, np.inf])
@pytest.mark.parametrize(
  ('name', 'where'),
  [(name, where) for name in COMBINATIONS for where in ('clean', 'uphill')]
  + [('cr_sam', 'downhill')],
)
def test_one_bad_number_is_seen_on_all_replicas(name, where, bad, way, sync):
  """In one pass of one replica; no replica may be left with a finite update."""
  rng = np.random.default_rng(5)
  slopes = rng.uniform(0.5, 1.5, size=(PARTS, 1, 3, 4)).astype(np.float32)
  slopes[2, 0, PASSES[where], 1] = bad
  step = spoilt_step(name, way, sync)
  finite, updates = step(jnp.ones(4), jnp.asarray(slopes))
  np.testing.assert_array_equal(updates, np.broadcast_to(updates[:1], updates.shape))
  assert not np.isfinite(updates[0, 1])
  assert not finite.any()


@functools.cache
def spoilt_step(name, way, sync):
  """``(params, slopes) -> (finite, updates)``, compiled once for all bad numbers."""
  kwargs = {'axis_name': 'i', 'sync_ascent': sync}
  if way != 'chain':
    value_and_grad_fn = WAYS[way](name, loss=spoilt_loss, **kwargs)
    step = lambda w, data: (jnp.array(False), value_and_grad_fn(w, data)[1])
  else:
    tx = chain_of(name, **kwargs)

    def step(w, data):
      grad_fn = jax.grad(lambda w: spoilt_loss(w, data))
      updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      return state.finite, updates

  return jax.jit(jax.vmap(step, axis_name='i', in_axes=(None, 0)))


@cpu
@both_syncs
@every_combination
def test_a_bad_clean_gradient_is_seen_where_the_probes_are_good(name, sync):
  """As after an overflow in one pass alone: what one replica has lost is lost."""
  tx = chain_of(name, axis_name='i', sync_ascent=sync)
  w = jnp.ones(4)

  def update(g):
    updates, state = tx.update(g, tx.init(w), w, grad_fn=lambda probe: 2 * probe)
    return state.finite, updates

  grads = jnp.ones((PARTS, 4)).at[2, 1].set(jnp.nan)
  finite, updates = jax.jit(jax.vmap(update, axis_name='i'))(grads)
  np.testing.assert_array_equal(updates, np.broadcast_to(updates[:1], updates.shape))
  assert not np.isfinite(updates[0, 1])
  assert not finite.any()


@every_way
@names('gsam')
def test_bad_slopes_that_are_not_bad_are_combined(name, way):
  """The loss of the test before, with numbers that are finite: by the formula."""
  rng = np.random.default_rng(5)
  slopes = rng.uniform(0.5, 1.5, size=(PARTS, 1, 3, 4)).astype(np.float32)
  finite, updates = spoilt_step(name, way, False)(jnp.ones(4), jnp.asarray(slopes))
  assert finite.all() == (way == 'chain')
  means = slopes.astype(np.float64).mean((0, 1))
  _, formula, scales = COMBINATIONS[name]
  assert_on_all(updates, formula(*means[: 1 + len(scales)]))


@pytest.mark.parametrize('size', [1e-30, 1e-20, 1.0, 1e20, 1e30])
@pytest.mark.parametrize('other', [1e-3, 1.0, 1e3])
def test_the_surrogate_gap_of_very_large_and_small_gradients(size, other):
  """Squares over- and underflow in float32; the update keeps its direction."""
  rng = np.random.default_rng(6)
  g = (size * other * rng.normal(size=7)).astype(np.float32)
  g_probe = (size * rng.normal(size=7)).astype(np.float32)
  got, _ = msam_optax.surrogate_gap(0.6).combine(
    (jnp.asarray(g), jnp.asarray(g_probe)), (), msam_optax.LOCAL
  )
  want = gsam(*(x.astype(np.float64) / size for x in (g, g_probe)))
  assert_close(np.asarray(got, np.float64) / size, want)


@every_way
@names('gsam')
def test_a_zero_gradient_is_a_zero_update(name, way):
  flat_loss = lambda params, data: (
    0.0 * jnp.sum(params['a']) + 0.0 * jnp.sum(params['b'])
  )
  _, updates = WAYS[way](name, loss=flat_loss)(make_params(), make_data())
  np.testing.assert_array_equal(flat(updates), np.zeros(5))


# ----- Probes that are not due in every step, and combinations with a state -------

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
def test_functions_refuse_what_needs_a_state(once):
  stateful = look_sam()._replace(due=None)
  value_and_grad_fn = msam_optax.value_and_grad(
    loss, msam_optax.monge(), RHO, stateful, compile_once=once
  )
  with pytest.raises(ValueError, match=r'combination keeps a state .*`optax\.chain`'):
    value_and_grad_fn(make_params(), make_data())
  with pytest.raises(ValueError, match=r'\(`due`\), and `value_and_grad` '):
    msam_optax.value_and_grad(
      loss, msam_optax.monge(), RHO, look_sam(), compile_once=once
    )
  value_and_grad_fn = flax_nnx.value_and_grad(
    model_loss, msam_optax.monge(), RHO, stateful, compile_once=once
  )
  with pytest.raises(ValueError, match=r'combination keeps a state .*`optax\.chain`'):
    value_and_grad_fn(Model(), make_data())
  with pytest.raises(ValueError, match=r'\(`due`\), and `value_and_grad` '):
    flax_nnx.value_and_grad(
      model_loss, msam_optax.monge(), RHO, look_sam(), compile_once=once
    )


# ----- Errors ---------------------------------------------------------------------

MAKERS = {
  'sharpness_aware': lambda c: msam_optax.sharpness_aware(msam_optax.monge(), RHO, c),
  'value_and_grad': lambda c: msam_optax.value_and_grad(
    loss, msam_optax.monge(), RHO, c
  ),
  'nnx': lambda c: flax_nnx.value_and_grad(model_loss, msam_optax.monge(), RHO, c),
}
every_maker = pytest.mark.parametrize('maker', MAKERS)


@every_maker
@pytest.mark.parametrize(
  'other', [msam_optax.probe_gradient, msam_optax.monge(), 0.9, None, 'gsam']
)
def test_what_is_no_combination_is_refused(maker, other):
  with pytest.raises(TypeError, match='`combination` must be a Combination, such as'):
    MAKERS[maker](other)


@every_maker
@pytest.mark.parametrize('scales', [(), [], 1.0, {1.0}, np.array([1.0])], ids=repr)
def test_scales_are_a_sequence_that_is_not_empty(maker, scales):
  with pytest.raises(ValueError, match='those of its probes, one at least'):
    MAKERS[maker](msam_optax.probe_gradient()._replace(scales=scales))


@every_maker
@pytest.mark.parametrize('scale', [np.nan, -np.inf, np.float32('inf')])
def test_scales_are_finite(maker, scale):
  with pytest.raises(ValueError, match='must be finite, got'):
    MAKERS[maker](msam_optax.probe_gradient()._replace(scales=(1.0, scale)))


@every_maker
@pytest.mark.parametrize('scale', ['1', True, 1j, None, np.ones(2)], ids=repr)
def test_scales_are_real_numbers(maker, scale):
  with pytest.raises(TypeError, match='must be real numbers, got'):
    MAKERS[maker](msam_optax.probe_gradient()._replace(scales=(1.0, scale)))


@every_maker
@pytest.mark.parametrize('part', ['init', 'combine', 'due'])
def test_parts_of_a_combination_are_functions(maker, part):
  with pytest.raises(
    TypeError, match=f'`{part}`.* of a Combination must be .*function'
  ):
    MAKERS[maker](msam_optax.probe_gradient()._replace(**{part: ()}))


@pytest.mark.parametrize(
  ('make', 'number'),
  [
    (msam_optax.weighted, 'a'),
    (msam_optax.surrogate_gap, 'alpha'),
    (lambda x: msam_optax.curvature(gamma=x), 'gamma'),
    (lambda x: msam_optax.curvature(beta=x), 'beta'),
    (lambda x: msam_optax.gsam(alpha=x), 'alpha'),
    (lambda x: msam_optax.wsam(gamma=x), 'gamma'),
    (lambda x: msam_optax.cr_sam(gamma=x), 'gamma'),
    (lambda x: msam_optax.cr_sam(beta=x), 'beta'),
  ],
  ids=['weighted', 'surrogate_gap', 'curvature', 'beta', 'gsam', 'wsam', 'cr', 'cr-b'],
)
def test_numbers_that_make_no_sense_are_refused(make, number):
  for bad in (-0.1, np.nan, np.inf, jnp.array(-1.0), np.float32('nan')):
    with pytest.raises(ValueError, match=f'`{number}` must be finite and >= 0'):
      make(bad)
  with pytest.raises(ValueError, match=rf'`{number}` must be a scalar, got shape \(2,'):
    make(jnp.ones(2))
  for bad in ('1', None, 1j, True, lambda step: 0.1):
    with pytest.raises(TypeError, match=f'`{number}` must be a real number'):
      make(bad)


@pytest.mark.parametrize('gamma', [1, 1.0, 2.5, np.float32(1), jnp.array(1.0)])
def test_a_gamma_that_leaves_nothing_of_the_loss_is_refused(gamma):
  with pytest.raises(ValueError, match='`gamma` must be less than 1, got'):
    msam_optax.wsam(gamma=gamma)


@pytest.mark.parametrize('gamma', [1.0, 1.5, -0.5, np.nan])
def test_a_gamma_that_turns_bad_at_run_time_is_seen(gamma):
  w = jnp.array([0.3, 0.4])

  def step(gamma):
    tx = msam_optax.wsam(0.1, gamma)
    return tx.update(2 * w, tx.init(w), w, grad_fn=lambda w: 2 * w)

  updates, state = jax.jit(step)(jnp.float32(gamma))
  assert np.isnan(updates).all()
  assert not state.finite


BAD_COMBINES = {
  'another structure': lambda grads, state, space: ({'a': grads[0]['a']}, state),
  'another shape': lambda grads, state, space: (
    jax.tree.map(lambda x: x[:1], grads[0]),
    state,
  ),
  'all gradients': lambda grads, state, space: (grads, state),
}


@every_way
@pytest.mark.parametrize('what', BAD_COMBINES)
def test_a_combination_that_returns_something_else_is_named(what, way):
  combination = msam_optax.Combination(lambda params: (), BAD_COMBINES[what])
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(COMBINATIONS, 'bad', (combination, None, (1,)))
    message = '`combine` of a Combination returns must be like the gradients, but'
    with pytest.raises(ValueError, match=message):
      WAYS[way]('bad')(make_params(), make_data())


@every_way
@pytest.mark.parametrize(
  ('what', 'kind'),
  [
    (lambda grads, state, space: grads[-1], 'a dict'),
    (lambda grads, state, space: None, 'a NoneType'),
    (lambda grads, state, space: (*grads, state), 'a tuple of 3'),
  ],
  ids=['update', 'None', 'three'],
)
def test_a_combination_that_returns_no_pair_is_named(what, kind, way):
  """As one does that forgets the state; a vector of two numbers is no pair either."""
  combination = msam_optax.Combination(lambda params: (), what)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(COMBINATIONS, 'bad', (combination, None, (1,)))
    with pytest.raises(
      TypeError, match=rf'must return `\(update, state\)`, not {kind}'
    ):
      WAYS[way]('bad')(make_params(), make_data())
  if kind == 'a dict':
    tx = msam_optax.sharpness_aware(msam_optax.monge(), RHO, combination)
    w = jnp.ones(2)
    with pytest.raises(TypeError, match=r'must return `\(update, state\)`, not a'):
      tx.update(w, tx.init(w), w, grad_fn=lambda w: w)


# ----- Cost -----------------------------------------------------------------------


@pytest.mark.slow
@cpu
@ways('chain', 'compiled once')
@every_combination
def test_matrix_products_are_those_of_the_gradients(name, way):
  """Two gradients a step, or as many as there are probes and one; nothing besides."""

  def network(params, data):
    return jnp.mean((jnp.tanh(data @ params['a']) @ params['b']) ** 2)

  params = {'a': jnp.ones((16, 16)), 'b': jnp.ones((16, 4))}
  data = jnp.ones((8, 16))

  def products(f):
    compiled = jax.jit(f).lower(params, data).compile()
    return hlo.matrix_flops(hlo.read(compiled.as_text()))

  gradients = 1 + len(COMBINATIONS[name][2])
  got = products(WAYS[way](name, 'euclidean', loss=network))
  assert got == gradients * products(jax.value_and_grad(network))


@cpu
@pytest.mark.parametrize('shards', [None, 4], ids=['whole', 'micro-batches'])
def test_one_loop_keeps_no_gradient_that_is_not_asked_for(shards):
  """SAM needs the gradient at one probe alone: CR-SAM's program holds one more."""
  if jax.__version_info__ < (0, 8):
    pytest.skip('the compiler of older versions keeps what nothing uses')
  size = 1 << 16
  quartic = lambda w, x: jnp.sum(jnp.mean(jnp.sin(x * w[None]), 0) ** 2)

  def temporaries(name):
    value_and_grad_fn = drop_in(
      name, 'euclidean', quartic, compile_once=True, shards=shards
    )
    lowered = jax.jit(value_and_grad_fn).lower(jnp.ones(size), jnp.ones((8, size)))
    return lowered.compile().memory_analysis().temp_size_in_bytes

  # One more, but for a few scalars.
  assert temporaries('cr_sam') - temporaries('sam') >= 0.99 * 4 * size


# ----- Properties -----------------------------------------------------------------

vectors = st.lists(
  st.floats(-10, 10, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6),
  min_size=4,
  max_size=4,
).map(lambda xs: np.array(xs, np.float32))
quick = hypothesis.settings(max_examples=60, deadline=None)


def combined(combination, *grads):
  grads = tuple(jnp.asarray(g) for g in grads)
  return np.asarray(combination.combine(grads, (), msam_optax.LOCAL)[0])


@quick
@hypothesis.given(vectors, vectors, vectors)
def test_the_limits_of_each_combination(g, g_plus, g_minus):
  weighted, gap = msam_optax.weighted, msam_optax.surrogate_gap
  np.testing.assert_array_equal(combined(weighted(0.0), g, g_plus), g)
  np.testing.assert_array_equal(combined(weighted(1.0), g, g_plus), g_plus)
  np.testing.assert_array_equal(combined(gap(0.0), g, g_plus), g_plus)
  curvature = msam_optax.curvature(0.0, 0.0)
  np.testing.assert_array_equal(combined(curvature, g, g_plus, g_minus), g_plus)


@quick
@hypothesis.given(vectors, vectors, st.floats(0, 3, width=32))
def test_the_surrogate_gap_leaves_the_part_along_the_probes_gradient(g, g_plus, alpha):
  """``⟨update, g₁⟩ = ‖g₁‖²``: the descent at the probe is as fast as SAM's."""
  update = combined(msam_optax.surrogate_gap(alpha), g, g_plus).astype(np.float64)
  exact = g_plus.astype(np.float64)
  length = np.sqrt(exact @ exact)
  bound = 1e-5 * length * (length + alpha * np.linalg.norm(g.astype(np.float64)))
  assert abs(update @ exact - length**2) <= bound


@quick
@hypothesis.given(vectors, vectors, st.floats(0, 1, width=32))
def test_a_weighted_gradient_is_between_both(g, g_plus, a):
  update = combined(msam_optax.weighted(a), g, g_plus)
  slack = 1e-6 * np.maximum(np.abs(g), np.abs(g_plus))
  assert (update >= np.minimum(g, g_plus) - slack).all()
  assert (update <= np.maximum(g, g_plus) + slack).all()


@quick
@hypothesis.given(vectors, vectors)
def test_curvature_sees_nothing_in_a_quadratic(g, step):
  """``g₊ + g₋ = 2g`` there: γ adds nothing, and β is a longer radius."""
  plus, minus = g + step, g - step
  got = combined(msam_optax.curvature(5.0, 0.0), g, plus, minus)
  np.testing.assert_allclose(got, plus, rtol=1e-5, atol=1e-4)
  got = combined(msam_optax.curvature(0.0, 0.5), g, plus, minus)
  np.testing.assert_allclose(got, g + 2 * step, rtol=1e-5, atol=1e-4)
