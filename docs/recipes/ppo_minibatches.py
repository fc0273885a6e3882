"""PPO: epochs over shuffled minibatches in `lax.scan`, inside one `jit`.

When to use it: a PureJaxRL-style loop, or any loop that scans over minibatches.

What to watch out for:

* Clip after `msam`. Clipping before it would change Monge SAM's radius, and would leave
  the gradient that is applied unclipped.
* Advantages are normalized inside the loss, so both passes see the same ones.
* `grad_fn` closes over the minibatch of the scan, never over the whole rollout.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from msam_optax import msam

RHO, CLIP_EPS, MAX_GRAD_NORM = 0.1, 0.2, 0.5
EPOCHS, MINIBATCHES, ROLLOUT, ACTIONS = 4, 4, 256, 3
tx = optax.chain(
  msam(rho=RHO),
  optax.clip_by_global_norm(MAX_GRAD_NORM),
  optax.adam(1e-2, eps=1e-5),
)


class Transition(NamedTuple):
  """What a rollout records, one row per time step."""

  obs: jax.Array
  action: jax.Array
  log_prob: jax.Array
  value: jax.Array
  advantage: jax.Array
  target: jax.Array


def network(params, obs):
  """Logits of the actions, and the value of the state."""
  hidden = jnp.tanh(obs @ params['w'] + params['b'])
  return hidden @ params['actor'], hidden @ params['critic']


def log_probability(logits, action):
  return jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], -1)[:, 0]


def loss_fn(params, batch):
  logits, value = network(params, batch.obs)
  ratio = jnp.exp(log_probability(logits, batch.action) - batch.log_prob)
  advantage = (batch.advantage - batch.advantage.mean()) / batch.advantage.std()
  clipped = jnp.clip(ratio, 1 - CLIP_EPS, 1 + CLIP_EPS)
  actor_loss = -jnp.minimum(ratio * advantage, clipped * advantage).mean()
  value_loss = 0.5 * jnp.mean((value - batch.target) ** 2)
  log_probs = jax.nn.log_softmax(logits)
  entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1).mean()
  return actor_loss + 0.5 * value_loss - 0.01 * entropy


def minibatch_step(carry, batch):
  params, opt_state = carry
  loss, grads = jax.value_and_grad(loss_fn)(params, batch)
  grad_fn = lambda params: jax.grad(loss_fn)(params, batch)
  updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
  return (optax.apply_updates(params, updates), opt_state), loss


def shuffled(rollout, key):
  """The rows of a rollout in a new order, `[minibatch, row]`."""
  order = jax.random.permutation(key, ROLLOUT).reshape(MINIBATCHES, -1)
  return jax.tree.map(lambda x: x[order], rollout)


@jax.jit
def update(params, opt_state, rollout, key):
  """All epochs over one rollout; returns the losses `[epoch, minibatch]`."""

  def epoch(carry, key):
    return jax.lax.scan(minibatch_step, carry, shuffled(rollout, key))

  keys = jax.random.split(key, EPOCHS)
  (params, opt_state), losses = jax.lax.scan(epoch, (params, opt_state), keys)
  return params, opt_state, losses


def init():
  rng = np.random.default_rng(0)
  draw = lambda *shape: (0.5 * rng.normal(size=shape)).astype(np.float32)
  return {
    'w': draw(4, 16),
    'b': draw(16),
    'actor': draw(16, ACTIONS),
    'critic': draw(16),
  }


def play(params):
  """A one-step game: the action of the largest observation has reward 1."""
  rng = np.random.default_rng(1)
  obs = rng.normal(size=(ROLLOUT, 4)).astype(np.float32)
  logits, value = network(params, obs)
  action = rng.integers(ACTIONS, size=ROLLOUT)
  reward = (action == np.argmax(obs[:, :ACTIONS], axis=1)).astype(np.float32)
  log_prob = log_probability(logits, action)
  rows = obs, action, log_prob, value, reward - value, reward
  return Transition(*map(jnp.asarray, rows))


def train():
  params = init()
  params, _, losses = update(params, tx.init(params), play(params), jax.random.key(2))
  return params, [float(loss) for loss in losses.mean(axis=1)]


if __name__ == '__main__':
  print('loss per epoch:', *(f'{loss:.3f}' for loss in train()[-1]))
