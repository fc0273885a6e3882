"""The ways to a combined gradient: a chain, and two functions."""

import functools

import jax
import pytest

import msam_optax
from tests.combinations.problem import loss
from tests.combinations.problem import RHO
from tests.combinations.truth import COMBINATIONS
from tests.combinations.truth import METRICS

METHODS = {
  'sam': lambda rho, metric: msam_optax.sharpness_aware(metric, rho),
  'wsam': lambda rho, metric: msam_optax.wsam(rho, 1.7 / 2.7, metric=metric),
  'gsam': lambda rho, metric: msam_optax.gsam(rho, 0.6, metric=metric),
  'cr_sam': lambda rho, metric: msam_optax.cr_sam(rho, 0.3, 0.2, metric=metric),
}


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


def chain_of(name, **kwargs):
  return msam_optax.sharpness_aware(
    METRICS['monge'][0], RHO, COMBINATIONS[name][0], **kwargs
  )


def drop_in(name, metric='monge', loss=loss, **kwargs):
  return msam_optax.value_and_grad(
    loss, METRICS[metric][0], RHO, COMBINATIONS[name][0], **kwargs
  )


WAYS = {
  'chain': chain,
  'drop-in': drop_in,
  'compiled once': functools.partial(drop_in, compile_once=True),
}


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
