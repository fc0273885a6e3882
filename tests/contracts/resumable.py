"""Trainings that are killed and resumed, as a program of its own.

``python -m tests.contracts.resumable kill <directory> <name> …`` trains half of the
steps of each, saves, and is killed; ``resume`` instead of ``kill`` goes on from there
in another process and saves the ends.
"""

import functools
import os
import pathlib
import signal
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import msam_optax
from tests.methods import KINDS
from tests.methods import REMEMBERING
from tests.methods import transformation

HALF, STEPS = 5, 10
# A GPU's matrix products are chosen by how long they take, in each process anew, and
# the last bits differ.
SAME_IN_ALL_PROCESSES = {'xla_gpu_autotune_level': 0}

_SCHEDULE = optax.cosine_decay_schedule(0.2, STEPS)

# What stands before Adam: each method, and Monge SAM with all that can have a state.
TRANSFORMATIONS = {
  **{name: transformation(name) for name in KINDS + REMEMBERING},
  'rho_schedule': msam_optax.msam(_SCHEDULE),
  'alpha_schedule': msam_optax.msam(_SCHEDULE, alpha=_SCHEDULE),
  'inject_hyperparams': optax.inject_hyperparams(msam_optax.msam)(
    rho=_SCHEDULE, alpha=0.5
  ),
  'memory': msam_optax.msam(_SCHEDULE, base=msam_optax.smoothed()),
  'low_rank': msam_optax.sharpness_aware(
    msam_optax.low_rank_monge(3, _SCHEDULE), _SCHEDULE
  ),
  'neighborhood': msam_optax.sharpness_aware(
    msam_optax.neighborhood_monge(2, 0.1, key=jax.random.key(0)), _SCHEDULE
  ),
}


def make_tx(name: str) -> optax.GradientTransformationExtraArgs:
  return optax.chain(TRANSFORMATIONS[name], optax.adam(_SCHEDULE))


def init(name: str) -> tuple[Any, Any]:
  """The params of a small network, and the optimizer's state."""
  rng = np.random.default_rng(0)
  params = {
    'hidden': {'kernel': rng.normal(size=(2, 16)), 'bias': np.zeros(16)},
    'out': {'kernel': rng.normal(size=(16, 2)), 'bias': np.zeros(2)},
  }
  params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), params)
  return params, make_tx(name).init(params)


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
  """Points in the plane, and whether they are inside the unit circle."""
  x = np.random.default_rng([1, step]).normal(size=(32, 2)).astype(np.float32)
  return x, (np.linalg.norm(x, axis=1) < 1).astype(np.int32)


def loss_fn(params: Any, x: jax.Array, inside: jax.Array) -> jax.Array:
  hidden = jnp.tanh(x @ params['hidden']['kernel'] + params['hidden']['bias'])
  logits = hidden @ params['out']['kernel'] + params['out']['bias']
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, inside)
  return jnp.mean(losses)


def train(name: str, carry: tuple[Any, Any], first: int, last: int) -> tuple[Any, Any]:
  """The params and state after the steps ``first`` to ``last``, excluded."""
  tx = make_tx(name)

  @functools.partial(jax.jit, compiler_options=SAME_IN_ALL_PROCESSES)
  def train_step(params, state, x, inside):
    value_and_grad_fn = lambda params: jax.value_and_grad(loss_fn)(params, x, inside)
    value, grads = value_and_grad_fn(params)
    updates, state = tx.update(
      grads, state, params, value=value, value_and_grad_fn=value_and_grad_fn
    )
    return optax.apply_updates(params, updates), state

  for step in range(first, last):
    carry = train_step(*carry, *batch(step))
  return carry


def save(path: pathlib.Path, tree: Any) -> None:
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, tree)


def restore(path: pathlib.Path, like: Any) -> Any:
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(path, jax.eval_shape(lambda: like))


def main(action: str, directory: str, *names: str) -> None:
  if jax.default_backend() != 'cpu':  # As in the tests, which compare with it.
    jax.config.update('jax_default_matmul_precision', 'highest')
  for name in names:
    half, end = (pathlib.Path(directory) / name / x for x in ('half', 'end'))
    if action == 'kill':
      save(half, train(name, init(name), 0, HALF))
    else:
      save(end, train(name, restore(half, init(name)), HALF, STEPS))
  if action == 'kill':
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == '__main__':
  main(*sys.argv[1:])
