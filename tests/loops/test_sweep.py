"""Sweeps in one program: ``vmap`` over seeds, and over the method's own numbers."""

import functools

import chex
import jax
import numpy as np
import optax
import pytest

from msam_optax import msam
from tests import by_hand
from tests import methods
from tests.methods import every_kind_slowly
from tests.methods import monge_sam
from tests.methods import transformation
from tests.problems import loss
from tests.problems import normal

pytestmark = pytest.mark.standard_promotion

STEPS, SWEEP = 3, 4
DATA = normal(1, STEPS, 8, 3), normal(2, STEPS, 8, 2)
BATCHES = list(zip(*DATA, strict=True))
SHAPES = {
  'hidden': {'kernel': (3, 5), 'bias': (5,)},
  'out': {'kernel': (5, 2), 'bias': (2,)},
}
# A radius of zero is plain training.
RHOS = np.array([0.0, 0.1, 0.3, 0.6], np.float32)
ALPHAS = np.array([0.0, 0.5, 1.0, 3.0], np.float32)
GRAD = jax.jit(jax.grad(loss))


def init(seed):
  rng = np.random.default_rng(seed)
  draw = lambda shape: (0.5 * rng.normal(size=shape)).astype(np.float32)
  return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def chain(method, params, rho):
  """A whole run, with the method made inside."""
  tx = optax.chain(transformation(method, rho), optax.sgd(0.1))

  def step(carry, batch):
    params, opt_state = carry
    grad_fn = lambda params: jax.grad(loss)(params, batch)
    updates, opt_state = tx.update(grad_fn(params), opt_state, params, grad_fn=grad_fn)
    return (optax.apply_updates(params, updates), opt_state), None

  (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), DATA)
  return params


def drop_in(method, params, rho):
  value_and_grad_fn = methods.drop_in(method, loss, rho)

  def step(params, batch):
    _, grads = value_and_grad_fn(params, batch)
    return jax.tree.map(lambda w, g: w - 0.1 * g, params, grads), None

  return jax.lax.scan(step, params, DATA)[0]


def update_by_hand(method, params, batch, rho):
  return by_hand.update(method, params, [lambda w: GRAD(w, batch)], radii=[rho])


@functools.cache
def run_by_hand(method, seed, rho):
  params, optimizer = init(seed), by_hand.sgd(0.1)
  for batch in BATCHES:
    params = optimizer(params, update_by_hand(method, params, batch, rho))
  return params


def check(stacked, expected):
  for i, tree in enumerate(expected):
    own = jax.tree.map(lambda x: np.asarray(x)[i], stacked)
    chex.assert_trees_all_close(own, tree, rtol=1e-5, atol=2e-6)


INTERFACES = pytest.mark.parametrize('interface', [chain, drop_in])


@INTERFACES
@every_kind_slowly
def test_over_rho(method, interface):
  run = jax.jit(jax.vmap(lambda rho: interface(method, init(0), rho)))
  check(run(RHOS), [run_by_hand(method, 0, float(rho)) for rho in RHOS])


@INTERFACES
def test_over_alpha(interface):
  run = jax.jit(jax.vmap(lambda alpha: interface(monge_sam(alpha), init(0), 0.3)))
  check(run(ALPHAS), [run_by_hand(monge_sam(alpha), 0, 0.3) for alpha in ALPHAS])


@INTERFACES
def test_over_seeds(interface):
  """Each has a norm of its own: nothing is summed over the mapped axis."""
  params = jax.tree.map(lambda *xs: np.stack(xs), *map(init, range(SWEEP)))
  run = jax.jit(jax.vmap(lambda params: interface('msam', params, 0.3)))
  check(run(params), [run_by_hand('msam', seed, 0.3) for seed in range(SWEEP)])


def test_over_a_grid():
  """Seeds by radii by ``α``, nested."""
  seeds = 2
  params = jax.tree.map(lambda *xs: np.stack(xs), *map(init, range(seeds)))
  run = lambda params, rho, alpha: chain(monge_sam(alpha), params, rho)
  run = jax.vmap(run, in_axes=(None, None, 0))
  run = jax.vmap(run, in_axes=(None, 0, None))
  run = jax.jit(jax.vmap(run, in_axes=(0, None, None)))
  trained = run(params, RHOS[2:], ALPHAS[1:3])
  for seed in range(seeds):
    for i, rho in enumerate(RHOS[2:]):
      cells = jax.tree.map(lambda x: np.asarray(x)[seed, i], trained)
      check(cells, [run_by_hand(monge_sam(a), seed, float(rho)) for a in ALPHAS[1:3]])


def test_learning_rate_beside_rho():
  """Pairs of both, as a random search draws them; the optimizer is made inside."""
  rates = np.array([0.01, 0.05, 0.1, 0.2], np.float32)

  def run(rho, rate):
    tx = optax.chain(msam(rho=rho), optax.sgd(rate))
    params = init(0)
    opt_state = tx.init(params)
    grad_fn = lambda params: jax.grad(loss)(params, BATCHES[0])
    updates, _ = tx.update(grad_fn(params), opt_state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates)

  trained = jax.jit(jax.vmap(run))(RHOS[1:], rates[1:])
  expected = []
  for rho, rate in zip(RHOS[1:], rates[1:], strict=True):
    step = by_hand.sgd(float(rate))
    expected.append(step(init(0), update_by_hand('msam', init(0), BATCHES[0], rho)))
  check(trained, expected)
