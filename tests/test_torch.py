"""Beside PyTorch: ``pytorch-optimizer``, from the same start on the same batches.

Where it has another rule than the authors of a method, its rule is the paper's with one
change. A row then has both: with that change ours does what it does, and as it is, ours
does not. ``docs/methods.md`` has the table for users.
"""

from collections.abc import Callable
import functools
import types
from typing import Any
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest

import msam_optax
from tests.contracts.test_training import PROBLEMS

torch = pytest.importorskip('torch')
pytorch_optimizer = pytest.importorskip('pytorch_optimizer')

pytestmark = [pytest.mark.slow, pytest.mark.standard_promotion]

RHO = 0.3


def torch_quadratic(leaves, data):
  (bias, kernel), (x, y) = leaves, data
  return (x @ torch.cat([kernel.ravel(), bias]) - y).square().mean()


def torch_network(leaves, data):
  (hidden_bias, hidden, out_bias, out), (x, y) = leaves, data
  h = torch.tanh(x @ hidden + hidden_bias)
  return (h @ out + out_bias - y).square().mean()


TORCH_LOSSES = {'quadratic': torch_quadratic, 'network': torch_network}


class Pair(NamedTuple):
  """A method in both libraries.

  Attributes:
    theirs: the name of the class in ``pytorch_optimizer``.
    options: its keyword arguments, but for the radius.
    ours: ``(optimizer, learning_rate) -> transformation``, which does the same.
    rule: likewise, the method of the paper, if that is not the same.
  """

  theirs: str
  options: dict[str, Any]
  ours: Callable[..., optax.GradientTransformationExtraArgs]
  rule: Callable[..., optax.GradientTransformationExtraArgs] | None = None


def before(method, **options):
  """A method at the head of a chain."""
  return lambda optimizer, _: optax.chain(method(rho=RHO, **options), optimizer)


def decoupled(optimizer, learning_rate):
  return msam_optax.decoupled_wsam(optimizer, learning_rate, RHO, gamma=0.75)


def leaf_by_leaf(combination):
  """The combination for each leaf on its own, as if it were all there is."""

  def init(params):
    return [combination.init(x) for x in jax.tree.leaves(params)]

  def combine(grads, state, space):
    of_leaves = zip(*map(jax.tree.leaves, grads), strict=True)
    pairs = [
      combination.combine(leaf_grads, leaf_state, space)
      for leaf_grads, leaf_state in zip(of_leaves, state, strict=True)
    ]
    updates, state = map(list, zip(*pairs, strict=True))
    return jax.tree.unflatten(jax.tree.structure(grads[0]), updates), state

  def due(g, state, space):
    return combination.due(g, state[0], space)

  return combination._replace(init=init, combine=combine, due=due)


EVERYWHERE = msam_optax.adaptive(0.0, weights=True)
LEAF_BY_LEAF = leaf_by_leaf(msam_optax.reused(every=3))

PAIRS = {
  'sam': Pair('SAM', {}, before(msam_optax.sam)),
  'gsam': Pair('GSAM', {'alpha': 0.6}, before(msam_optax.gsam, alpha=0.6)),
  'wsam': Pair(
    'WSAM',
    {'gamma': 0.75, 'decouple': False},
    before(msam_optax.wsam, gamma=0.75),
  ),
  'decoupled_wsam': Pair('WSAM', {'gamma': 0.75}, decoupled),
  'friendly_sam': Pair(
    'FriendlySAM',
    {'sigma': 0.7, 'lmbda': 0.8},
    before(msam_optax.friendly_sam, sigma=0.7, decay=0.8),
  ),
  # Every leaf is a weight, biases as well, and there is no η.
  'asam': Pair(
    'SAM',
    {'adaptive': True},
    before(msam_optax.asam, eta=0.0, weights=True),
    rule=before(msam_optax.asam),
  ),
  'gsam over asam': Pair(
    'GSAM',
    {'alpha': 0.6, 'adaptive': True},
    before(msam_optax.gsam, alpha=0.6, metric=EVERYWHERE),
    rule=before(msam_optax.gsam, alpha=0.6, metric=msam_optax.adaptive()),
  ),
  # Each tensor has a norm and a projection of its own.
  'look_sam': Pair(
    'LookSAM',
    {'k': 3, 'alpha': 0.7},
    before(
      msam_optax.sharpness_aware,
      metric=msam_optax.euclidean(),
      combination=LEAF_BY_LEAF,
    ),
    rule=before(msam_optax.look_sam, every=3, alpha=0.7),
  ),
}


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('problem', PROBLEMS)
@pytest.mark.parametrize('method', PAIRS)
def test_steps_are_those_of_pytorch_optimizer(method, problem):
  pair = PAIRS[method]
  got = path(pair.ours, problem)
  # Both of its implementations, for one tensor at a time and for all at once.
  for foreach in (False, True):
    assert_close(got, torch_path(pair, problem, foreach))
  if pair.rule is not None:
    assert np.abs(path(pair.rule, problem) - got).max() > 0.01


@pytest.mark.usefixtures('x64')
def test_gsam_has_the_same_radius_at_every_learning_rate():
  lr = optax.linear_schedule(0.1, 0.02, transition_steps=8)
  ours = msam_optax.rho_following(
    lr, lr_max=0.1, lr_min=0.02, rho_max=0.6, rho_min=0.04
  )
  for step in range(9):
    theirs = pytorch_optimizer.ProportionScheduler(
      types.SimpleNamespace(last_lr=[float(lr(step))]),
      max_lr=0.1,
      min_lr=0.02,
      max_value=0.6,
      min_value=0.04,
    )
    assert_close(ours(step), theirs.step())


def assert_close(ours, theirs):
  # It rounds the norms of gradients to float32.
  np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=2e-7)


def path(make, problem):
  """All parameters after each step of ours, ``[steps, parameters]``."""
  loss, params, batches, learning_rate = PROBLEMS[problem]()
  tx = make(optax.sgd(learning_rate, momentum=0.9), learning_rate)

  @jax.jit
  def step(params, state, data):
    grad_fn = functools.partial(jax.grad(loss), data=data)
    updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state

  params = jax.tree.map(jax.numpy.asarray, params)
  state, points = tx.init(params), []
  for data in batches:
    params, state = step(params, state, data)
    points.append(np.concatenate([x.ravel() for x in jax.tree.leaves(params)]))
  return np.stack(points)


def torch_path(pair, problem, foreach):
  """The same of theirs."""
  _, params, batches, learning_rate = PROBLEMS[problem]()
  model = torch.nn.ParameterList(map(tensor, jax.tree.leaves(params)))
  optimizer = torch_optimizer(pair, model, learning_rate, foreach)
  points = []
  for data in batches:
    closure = functools.partial(
      compute_gradients, model, TORCH_LOSSES[problem], tuple(map(tensor, data))
    )
    closure()
    optimizer.step(closure)
    points.append(np.concatenate([x.detach().numpy().ravel() for x in model]))
  return np.stack(points)


def torch_optimizer(pair, model, learning_rate, foreach):
  params, base = model.parameters(), torch.optim.SGD
  of_base = {'lr': learning_rate, 'momentum': 0.9}
  make = getattr(pytorch_optimizer, pair.theirs)
  options = {**pair.options, 'foreach': foreach}
  if pair.theirs == 'GSAM':
    radius = types.SimpleNamespace(step=lambda: RHO)
    return make(params, base(model.parameters(), **of_base), model, radius, **options)
  if pair.theirs == 'WSAM':
    options['model'] = model
  return make(params=params, base_optimizer=base, rho=RHO, **of_base, **options)


def compute_gradients(model, loss, data):
  """Their closure. GSAM's returns a pair, and the others do not use what it returns."""
  with torch.enable_grad():
    model.zero_grad()
    value = loss(model, data)
    value.backward()
  return None, value


def tensor(x):
  return torch.tensor(np.asarray(x, np.float64))
