"""The ascent on a part of the batch, and what it costs."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import by_hand
from tests.methods import drop_in
from tests.methods import METHODS
from tests.problems import batch
from tests.problems import loss
from tests.problems import mlp_params


def by_part(params, data, k, loss=loss, rho=METHODS['msam'].rho):
  """Monge SAM whose ascent gradient is of every ``k``-th row, by NumPy."""
  grad = jax.grad(loss)
  part = jax.tree.map(lambda x: x[::k], data)
  probe = by_hand.probe('msam', params, grad(params, part), rho)
  return loss(params, part), grad(probe, data)


@pytest.mark.parametrize('k', [4])
def test_the_ascent_on_a_part_of_the_batch(k):
  params, data = mlp_params(), batch()
  got = drop_in('msam', loss, ascent_fraction=1 / k)(params, data)
  chex.assert_trees_all_close(got, by_part(params, data, k), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('sync', [False, True], ids=['own', 'synced'])
@pytest.mark.parametrize('vectorize', [False, True], ids=['scan', 'vmap'])
def test_the_ascent_on_a_part_of_each_micro_batch(sync, vectorize):
  params, data = mlp_params(), batch(size=12)
  value_and_grad_fn = drop_in(
    'msam',
    loss,
    ascent_fraction=0.5,
    shards=3,
    sync_ascent=sync,
    vectorize_shards=vectorize,
  )
  _, got = value_and_grad_fn(params, data)
  cuts = [jax.tree.map(lambda x, i=i: x[i::3], data) for i in range(3)]
  grad = jax.grad(loss)
  mean = lambda trees: jax.tree.map(lambda *x: sum(x) / len(x), *trees)
  if sync:
    ascent = mean([grad(params, jax.tree.map(lambda x: x[::2], cut)) for cut in cuts])
    expected = grad(by_hand.probe('msam', params, ascent), data)
  else:
    expected = mean([by_part(params, cut, 2)[1] for cut in cuts])
  chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_ascent_on_a_part_counts_examples_by_their_weight():
  """The value is the mean over the part, and the gradient one over all examples."""

  def total(params, data):
    x, y, weight = data
    each = jax.vmap(lambda x, y: loss(params, (x[None], y[None])))(x, y)
    return jnp.sum(each * weight), jnp.sum(weight)

  mean = lambda params, data: (lambda t, n: t / n)(*total(params, data))
  params, data = mlp_params(), (*batch(), jnp.array([1.0, 0, 2, 1, 0, 1, 3, 1]))
  value_and_grad_fn = drop_in('msam', total, ascent_fraction=0.25, has_weight=True)
  expected = by_part(params, data, 4, mean)
  chex.assert_trees_all_close(
    value_and_grad_fn(params, data), expected, rtol=1e-5, atol=1e-6
  )

  empty = (*batch(), jnp.array([0.0, 0, 2, 1, 0, 1, 3, 1]))
  chex.assert_trees_all_close(
    value_and_grad_fn(params, empty),
    jax.value_and_grad(mean)(params, empty),
    rtol=1e-5,
    atol=1e-6,
  )


@pytest.mark.cpu
def test_each_device_climbs_by_its_share_of_the_rows():
  """Under `jit` no row of a sharded batch leaves its device."""
  params, data = mlp_params(), batch(size=32)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ('data',))
  spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  value_and_grad_fn = jax.jit(drop_in('msam', loss, ascent_fraction=0.25))
  placed = jax.device_put(data, spread)
  got = value_and_grad_fn(params, placed)
  chex.assert_trees_all_close(got, by_part(params, data, 4), rtol=1e-5, atol=1e-6)
  text = str(value_and_grad_fn.lower(params, placed).compile().as_text())
  assert 'all-reduce' in text
  assert not re.search(r'all-gather|all-to-all|collective-permute', text)


def test_the_ascent_on_a_part_costs_a_part():
  """In matrix products, by XLA's own count."""
  params, data = mlp_params(), batch(size=256)
  flops = {
    name: jax.jit(step).lower(params, data).compile().cost_analysis()['flops']
    for name, step in {
      'plain': jax.value_and_grad(loss),
      'quarter': drop_in('msam', loss, ascent_fraction=0.25),
    }.items()
  }
  np.testing.assert_allclose(flops['quarter'] / flops['plain'], 1.25, atol=0.06)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'ascent_fraction': 0.3}, 'must be one over a whole number'),
    ({'ascent_fraction': 0.0}, r'must be in \(0, 1\]'),
    ({'ascent_fraction': 2}, r'must be in \(0, 1\]'),
    ({'ascent_fraction': 0.5, 'compile_once': True}, 'give one of them'),
    ({'ascent_fraction': 1 / 3}, '`ascent_fraction` cuts every array'),
  ],
)
def test_a_part_that_cannot_be_is_named(options, message):
  with pytest.raises(ValueError, match=message):
    drop_in('msam', loss, **options)(mlp_params(), batch())
