"""The formula of each combination on several devices."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import msam_optax
from tests.combinations.maps import assert_on_all
from tests.combinations.maps import cpu
from tests.combinations.maps import KINDS
from tests.combinations.maps import mesh
from tests.combinations.maps import without_pmap_warning
from tests.combinations.problem import assert_close
from tests.combinations.problem import counted_data
from tests.combinations.problem import counted_loss
from tests.combinations.problem import counts_with
from tests.combinations.problem import make_data
from tests.combinations.problem import make_params
from tests.combinations.problem import PARTS
from tests.combinations.problem import RHO
from tests.combinations.truth import COMBINATIONS
from tests.combinations.truth import consecutive
from tests.combinations.truth import METRICS
from tests.combinations.truth import monge_slope
from tests.combinations.truth import truth
from tests.combinations.ways import both_syncs
from tests.combinations.ways import drop_in
from tests.combinations.ways import every_way
from tests.combinations.ways import names
from tests.combinations.ways import passes
from tests.combinations.ways import slow_unless
from tests.combinations.ways import WAYS


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
