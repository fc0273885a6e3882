"""LoRA: factors of low rank are trained, and the matrices that they change are not.

Frozen leaves are neither moved nor part of the norm, whether masks leave them out or
the loss closes over them.
"""

import functools

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

from msam_optax import by_name
from tests.by_hand import adam
from tests.by_hand import sgd
from tests.by_hand import train
from tests.methods import cases
from tests.methods import drop_in
from tests.methods import every_kind_slowly
from tests.methods import is_default
from tests.methods import KINDS
from tests.methods import transformation
from tests.problems import init
from tests.problems import normal

pytestmark = pytest.mark.standard_promotion

STEPS, RANK, EPS = 3, 2, 1e-3
X = normal(1, STEPS, 8, 4) + 0.5
Y = normal(2, STEPS, 8, 3)
BATCHES = list(zip(X, Y, strict=True))
FACTORS = by_name('lora_a', 'lora_b')


class LoRADense(nn.Module):
  """A dense layer ``x (W + A B) + b``."""

  features: int

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.normal(0.5)
    a = self.param('lora_a', init, (x.shape[-1], RANK))
    b = self.param('lora_b', init, (RANK, self.features))
    return nn.Dense(self.features, name='base')(x) + (x @ a) @ b


class Net(nn.Module):
  """Two layers with adapters."""

  @nn.compact
  def __call__(self, x):
    return LoRADense(3)(nn.tanh(LoRADense(6)(x)))


MODEL = Net()
PARAMS = init(MODEL.init, jax.random.key(0), X[0])['params']


def loss_fn(params, x, y):
  return jnp.mean((MODEL.apply({'params': params}, x) - y) ** 2)


def frozen(params):
  return jax.tree.map(lambda trained: not trained, FACTORS(params))


def split(params):
  """Factors and the rest, as trees with None in the places of the others."""
  pick = lambda chosen: jax.tree.map(lambda p, c: p if c else None, params, chosen)
  return pick(FACTORS(params)), pick(frozen(params))


def join(factors, base):
  is_none = lambda x: x is None
  return jax.tree.map(
    lambda a, b: b if a is None else a, factors, base, is_leaf=is_none
  )


def joined_loss(factors, base, x, y):
  return loss_fn(join(factors, base), x, y)


GRAD = jax.jit(jax.grad(joined_loss))


@functools.cache
def by_hand(method):
  """Training of the factors alone."""
  factors, base = split(PARAMS)
  grad_fn = lambda factors, _, batch: (GRAD(factors, base, *batch), None)
  optimizer = adam(0.01, eps=EPS)
  factors, _ = train(method, grad_fn, factors, None, BATCHES, optimizer)
  return join(factors, base)


@functools.cache
def masked_by_hand(method):
  """Gradients of all, of which the factors alone are perturbed and change.

  An update that has inner products in it, as GSAM's, has those of all gradients.
  """
  adam_of_factors = adam(0.01, eps=EPS)

  def optimizer(params, grads):
    factors, base = split(params)
    return join(adam_of_factors(factors, split(grads)[0]), base)

  grad_fn = lambda params, _, batch: (jax.grad(loss_fn)(params, *batch), None)
  is_perturbed = lambda path, leaf: 'lora' in path
  params, _ = train(
    method, grad_fn, PARAMS, None, BATCHES, optimizer, is_perturbed=is_perturbed
  )
  return params


def run(step, params, opt_state):
  step = jax.jit(step)
  for x, y in BATCHES:
    params, opt_state = step(params, opt_state, x, y)
  return params


def check(params, method, truth=by_hand):
  chex.assert_trees_all_close(params, truth(method), rtol=1e-5, atol=2e-6)
  chex.assert_trees_all_equal(split(params)[1], split(PARAMS)[1])


def base_optimizer():
  return optax.chain(
    optax.masked(optax.adam(0.01, eps=EPS), FACTORS),
    optax.masked(optax.set_to_zero(), frozen),
  )


def partition_optimizer():
  labels = lambda params: jax.tree.map(
    lambda trained: 'lora' if trained else 'base', FACTORS(params)
  )
  transforms = {'lora': optax.adam(0.01, eps=EPS), 'base': optax.set_to_zero()}
  return optax.partition(transforms, labels)


FROZEN_BY = {'mask': base_optimizer, 'partition': partition_optimizer}


@pytest.mark.parametrize(
  ('method', 'frozen_by'), cases(KINDS, FROZEN_BY, plain=is_default)
)
def test_mask_chain(method, frozen_by):
  optimizer = FROZEN_BY[frozen_by]
  tx = optax.chain(transformation(method, mask=FACTORS), optimizer())

  def step(params, opt_state, x, y):
    grad_fn = lambda params: jax.grad(loss_fn)(params, x, y)
    updates, opt_state = tx.update(grad_fn(params), opt_state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), opt_state

  check(run(step, PARAMS, tx.init(PARAMS)), method, masked_by_hand)


@every_kind_slowly
def test_mask_drop_in(method):
  tx = base_optimizer()

  def step(params, opt_state, x, y):
    _, grads = drop_in(method, loss_fn, mask=FACTORS)(params, x, y)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  check(run(step, PARAMS, tx.init(PARAMS)), method, masked_by_hand)


@pytest.mark.parametrize('interface', ['chain', 'drop-in'])
@every_kind_slowly
def test_gradient_of_the_factors_alone(method, interface):
  """The optimizer never sees the base: what most code for adapters does."""
  factors, base = split(PARAMS)
  head = [transformation(method)] if interface == 'chain' else []
  tx = optax.chain(*head, optax.adam(0.01, eps=EPS))

  def step(factors, opt_state, x, y):
    if interface == 'chain':
      grad_fn = lambda factors: jax.grad(joined_loss)(factors, base, x, y)
      grads, extra = grad_fn(factors), {'grad_fn': grad_fn}
    else:
      _, grads = drop_in(method, joined_loss)(factors, base, x, y)
      extra = {}
    updates, opt_state = tx.update(grads, opt_state, factors, **extra)
    return optax.apply_updates(factors, updates), opt_state

  check(join(run(step, factors, tx.init(factors)), base), method)


@every_kind_slowly
def test_base_in_another_argument(method):
  """Plain JAX: two dicts, of which the first is trained."""
  factors = {'a': normal(4, 4, RANK), 'b': normal(5, RANK, 3)}
  base = {'w': normal(3, 4, 3)}

  def loss(factors, base, x, y):
    w = base['w'] + factors['a'] @ factors['b']
    return jnp.mean((jnp.tanh(x @ w) - y) ** 2)

  tx = optax.chain(transformation(method), optax.sgd(0.1))

  def step(factors, opt_state, x, y):
    grad_fn = lambda factors: jax.grad(loss)(factors, base, x, y)
    updates, opt_state = tx.update(
      grad_fn(factors), opt_state, factors, grad_fn=grad_fn
    )
    return optax.apply_updates(factors, updates), opt_state

  plain = lambda factors, _, batch: (jax.grad(loss)(factors, base, *batch), None)
  expected, _ = train(
    method,
    plain,
    factors,
    None,
    BATCHES,
    sgd(0.1),
    # `b` is what biases are called, in Haiku for instance.
    is_weight=lambda path, _: path == "['a']",
  )
  chained = run(step, factors, tx.init(factors))
  chex.assert_trees_all_close(chained, expected, rtol=1e-5, atol=2e-6)
