"""Many devices: ``shard_map``, checked or not, and ``jit`` with sharded arrays."""

import functools

import chex
import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import msam_optax
from tests.problems import batch
from tests.problems import loss
from tests.problems import mlp_params

SHARDS = 4
if hasattr(jax, 'shard_map'):
  shard_map = jax.shard_map
else:
  from jax.experimental.shard_map import shard_map


def cast(params):
  """Replicated parameters as ones that vary over the axis."""
  if hasattr(jax.lax, 'pcast'):
    return jax.lax.pcast(params, 'i', to='varying')
  return jax.lax.pvary(params, 'i')


def chain_step(params, data, *, sync_ascent):
  tx = msam_optax.msam(rho=0.3, axis_name='i', sync_ascent=sync_ascent)
  grad_fn = lambda p: jax.grad(loss)(p, data)
  updates, state = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
  return updates, state.slope


def drop_in_step(params, data, *, sync_ascent):
  take = msam_optax.value_and_grad(
    loss, rho=0.3, axis_name='i', sync_ascent=sync_ascent
  )
  _, grads = take(params, data)
  return grads, np.float32(0)


def run(step, *, check_vma, cast_first):
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:SHARDS]), ('i',))
  inner = lambda params, data: step(cast(params) if cast_first else params, data)
  mapped = shard_map(
    inner, mesh=mesh, in_specs=(P(), P('i')), out_specs=P(), check_vma=check_vma
  )
  return jax.jit(mapped)(mlp_params(), batch(size=32))


def expected(sync_ascent):
  """A loop over the shards on one device."""
  params, (x, y) = mlp_params(), batch(size=32)
  shards = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 32, 8)]
  own = [jax.grad(loss)(params, shard) for shard in shards]
  mean = jax.tree.map(lambda *gs: sum(gs) / SHARDS, *own)
  at_probes = []
  for shard, g in zip(shards, own, strict=True):
    ascent = mean if sync_ascent else g
    n = float(optax.tree.norm(ascent))
    factor = 0.3 / (n * np.sqrt(1 + n**2))
    probe = jax.tree.map(lambda w, g: w + factor * g, params, ascent)
    at_probes.append(jax.grad(loss)(probe, shard))
  return jax.tree.map(lambda *gs: sum(gs) / SHARDS, *at_probes)


@pytest.mark.parametrize('sync_ascent', [False, True], ids=['own', 'synced'])
@pytest.mark.parametrize('check_vma', [False, True], ids=['unchecked', 'checked'])
@pytest.mark.parametrize('step', [chain_step, drop_in_step])
def test_equals_loop_over_shards(step, check_vma, sync_ascent):
  step = functools.partial(step, sync_ascent=sync_ascent)
  updates, _ = run(step, check_vma=check_vma, cast_first=check_vma)
  chex.assert_trees_all_close(updates, expected(sync_ascent), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('step', [chain_step, drop_in_step])
def test_gradients_that_are_summed_already_are_refused(step):
  step = functools.partial(step, sync_ascent=False)
  with pytest.raises(ValueError, match=r"summed over 'i' already.*pcast\(params, 'i'"):
    run(step, check_vma=True, cast_first=False)


SHARDINGS = {
  'data-parallel': {'kernel': P(), 'bias': P(), 'data': P('i')},
  'fully-sharded': {'kernel': P(None, 'i'), 'bias': P('i'), 'data': P('i')},
  'tensor-parallel': {'kernel': P(None, 'i'), 'bias': P('i'), 'data': P()},
}


@pytest.mark.parametrize('name', SHARDINGS)
def test_jit_with_sharded_arrays_equals_one_device(name):
  """Norm, probe and gradient are those of the whole, wherever its parts lie."""
  specs = SHARDINGS[name]
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ('i',))
  place = lambda x, spec: jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
  params = jax.tree.map(lambda p: p[..., :4], mlp_params())
  params['out']['kernel'] = params['out']['kernel'][:4]
  data = batch(size=32)
  tx = msam_optax.msam(rho=0.3)

  @jax.jit
  def step(params, data):
    take = jax.value_and_grad(lambda p: loss(p, data))
    value, grads = take(params)
    state = tx.init(params)
    return tx.update(grads, state, params, value_and_grad_fn=take, value=value)

  sharded = {
    layer: {leaf: place(x, specs[leaf]) for leaf, x in leaves.items()}
    for layer, leaves in params.items()
  }
  updates, state = step(sharded, tuple(place(x, specs['data']) for x in data))
  chex.assert_trees_all_close((updates, state), step(params, data), rtol=1e-5)
  drop_in = jax.jit(msam_optax.value_and_grad(loss, rho=0.3))(sharded, data)[1]
  chex.assert_trees_all_close(drop_in, updates, rtol=1e-4, atol=1e-6)
