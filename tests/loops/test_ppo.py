"""PPO in one compiled program: epochs, minibatches and seeds in scans behind vmap.

The gradient is clipped by its global norm. Clipping stands behind the method: before
it, it would change Monge SAM's radius, and leave what is applied unclipped.
"""

import functools
from typing import Any
from typing import NamedTuple

import chex
from flax import linen as nn
from flax.training import train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msam_optax.flax_linen import TrainState
from tests import methods
from tests.by_hand import adam
from tests.by_hand import train
from tests.methods import every_kind_slowly
from tests.methods import transformation
from tests.problems import init
from tests.problems import normal

pytestmark = pytest.mark.standard_promotion

SEEDS, EPOCHS, MINIBATCHES = 2, 2, 3
ROLLOUT = 24
LEARNING_RATE, EPS, MAX_GRAD_NORM, CLIP_EPS = 0.01, 1e-3, 0.5, 0.2


class ActorCritic(nn.Module):
  """The logits of three actions, and the value of a state."""

  @nn.compact
  def __call__(self, x):
    actor = nn.Dense(3)(nn.tanh(nn.Dense(8)(x)))
    critic = nn.Dense(1)(nn.tanh(nn.Dense(8)(x)))
    return actor, jnp.squeeze(critic, axis=-1)


class Transition(NamedTuple):
  """What a rollout has recorded."""

  action: Any
  value: Any
  log_prob: Any
  obs: Any


NETWORK = ActorCritic()


def log_probability(logits, action):
  return jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], -1)[:, 0]


def loss_fn(params, transitions, gae, targets):
  """The clipped surrogate, the clipped loss of the values, and the entropy."""
  logits, value = NETWORK.apply(params, transitions.obs)
  change = jnp.clip(value - transitions.value, -CLIP_EPS, CLIP_EPS)
  value_losses = jnp.square(value - targets)
  value_losses_clipped = jnp.square(transitions.value + change - targets)
  value_loss = 0.5 * jnp.maximum(value_losses, value_losses_clipped).mean()

  log_prob = log_probability(logits, transitions.action)
  ratio = jnp.exp(log_prob - transitions.log_prob)
  gae = (gae - gae.mean()) / (gae.std() + 1e-8)
  clipped = jnp.clip(ratio, 1 - CLIP_EPS, 1 + CLIP_EPS)
  loss_actor = -jnp.minimum(ratio * gae, clipped * gae).mean()

  log_probs = jax.nn.log_softmax(logits)
  entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1).mean()
  total = loss_actor + 0.5 * value_loss - 0.01 * entropy
  return total, (value_loss, loss_actor, entropy)


def run_seed(params, minibatches, create, take_step):
  """The update of one seed: epochs over the minibatches of its rollout."""

  def update_epoch(state, minibatches):
    return jax.lax.scan(take_step, state, minibatches)

  state, losses = jax.lax.scan(update_epoch, create(params), minibatches)
  return state.params, losses


def linen_state(method):
  tx = optax.chain(
    transformation(method),
    optax.clip_by_global_norm(MAX_GRAD_NORM),
    optax.adam(LEARNING_RATE, eps=EPS),
  )

  def take_step(state, minibatch):
    value_and_grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, _), grads = value_and_grad_fn(state.params, *minibatch)
    grad_fn = lambda params: value_and_grad_fn(params, *minibatch)[1]
    return state.apply_gradients(grads=grads, grad_fn=grad_fn), loss

  create = lambda params: TrainState.create(apply_fn=None, params=params, tx=tx)
  return create, take_step


class Carry(NamedTuple):
  """What a loop without Flax's state carries."""

  params: Any
  opt_state: Any


def plain_optax(method):
  tx = optax.chain(
    transformation(method),
    optax.clip_by_global_norm(MAX_GRAD_NORM),
    optax.adam(LEARNING_RATE, eps=EPS),
  )

  def take_step(carry, minibatch):
    params, opt_state = carry
    value_and_grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, _), grads = value_and_grad_fn(params, *minibatch)
    grad_fn = lambda params: value_and_grad_fn(params, *minibatch)[1]
    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
    return Carry(optax.apply_updates(params, updates), opt_state), loss

  return lambda params: Carry(params, tx.init(params)), take_step


def drop_in(method):
  """Flax's own state, with the optimizer that the loop has had all along."""
  tx = optax.chain(
    optax.clip_by_global_norm(MAX_GRAD_NORM), optax.adam(LEARNING_RATE, eps=EPS)
  )

  def take_step(state, minibatch):
    value_and_grad_fn = methods.drop_in(method, loss_fn, has_aux=True)
    (loss, _), grads = value_and_grad_fn(state.params, *minibatch)
    return state.apply_gradients(grads=grads), loss

  create = lambda params: train_state.TrainState.create(
    apply_fn=None, params=params, tx=tx
  )
  return create, take_step


GRAD = jax.jit(jax.grad(loss_fn, has_aux=True))


@functools.cache
def prepared():
  """Parameters ``[seed]``, and minibatches ``[seed, epoch, minibatch, row]``.

  The rollouts need no game. Their policy is a little older, so that some ratios are
  clipped.
  """
  rng = np.random.default_rng(0)
  inits = [
    init(NETWORK.init, jax.random.key(0), jnp.zeros(4), seed=seed)
    for seed in range(SEEDS)
  ]
  params = jax.tree.map(lambda *leaves: np.stack(leaves), *inits)
  obs = normal(1, SEEDS, ROLLOUT, 4)
  logits, value = jax.tree.map(
    np.asarray, jax.jit(jax.vmap(NETWORK.apply))(params, obs)
  )
  older = logits + 0.3 * normal(2, *logits.shape)
  action = rng.integers(3, size=(SEEDS, ROLLOUT))
  chosen = np.take_along_axis(older, action[..., None], -1)[..., 0]
  log_prob = chosen - np.log(np.sum(np.exp(older), -1))
  advantages = normal(3, SEEDS, ROLLOUT)
  rollout = Transition(action, value, log_prob, obs), advantages, advantages + value
  shuffled = np.stack([rng.permutation(ROLLOUT) for _ in range(EPOCHS)])
  shuffled = shuffled.reshape(EPOCHS, MINIBATCHES, -1)
  return params, jax.tree.map(lambda x: x[:, shuffled], rollout)


@functools.cache
def by_hand(method, seed):
  params, minibatches = jax.tree.map(lambda x: x[seed], prepared())
  batches = [
    jax.tree.map(lambda x: x[epoch, i], minibatches)
    for epoch in range(EPOCHS)
    for i in range(MINIBATCHES)
  ]
  clipped = []

  def grad_fn(params, _, batch):
    grads, _ = GRAD(params, *batch)
    squares = [np.sum(np.square(g)) for g in jax.tree.leaves(grads)]
    clipped.append(np.sqrt(sum(squares)) > MAX_GRAD_NORM)
    return grads, None

  optimizer = adam(LEARNING_RATE, eps=EPS, clip=MAX_GRAD_NORM)
  params, _ = train(method, grad_fn, params, None, batches, optimizer)
  # Gradients at probes: some are clipped, so the order matters.
  assert any(clipped[1::2])
  return params


@pytest.mark.slow
@pytest.mark.parametrize('interface', [linen_state, plain_optax, drop_in])
@every_kind_slowly
def test_is_training_by_hand_of_each_seed(method, interface):
  create, take_step = interface(method)
  run = jax.jit(
    jax.vmap(functools.partial(run_seed, create=create, take_step=take_step))
  )
  params, losses = run(*prepared())
  assert losses.shape == (SEEDS, EPOCHS, MINIBATCHES)
  for seed in range(SEEDS):
    own = jax.tree.map(lambda x: np.asarray(x)[seed], params)
    chex.assert_trees_all_close(own, by_hand(method, seed), rtol=1e-5, atol=2e-6)
