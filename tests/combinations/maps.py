"""Kinds of maps over replicas."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from tests.combinations.problem import assert_close
from tests.combinations.problem import PARTS

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
