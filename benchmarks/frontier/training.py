"""Training at several radii and seeds at once, in one program."""

from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.frontier import problems
from benchmarks.frontier.methods import Entry


class Data(NamedTuple):
  """What a seed trains with, and the rows of each step, ``[steps, batch]``."""

  key: Any
  train: Any
  validation: Any
  test: Any
  rows: Any


def make_data(task: problems.Task, seed: int, steps: int) -> Data:
  """The split of a seed, and the order of its batches, epoch by epoch."""
  train, validation, test = task.split(seed)
  rng = np.random.default_rng(seed)
  length, per_epoch = len(train[1]), len(train[1]) // task.batch
  orders = [rng.permutation(length) for _ in range(-(-steps // per_epoch))]
  rows = np.concatenate([order[: per_epoch * task.batch] for order in orders])
  rows = rows[: steps * task.batch].reshape(steps, task.batch)
  return Data(jax.random.key(seed), train, validation, test, rows)


def train(
  task: problems.Task, entry: Entry, knobs: Sequence[float], seeds: Sequence[int], steps
) -> dict[str, Any]:
  """Trains at each value of the knob with each seed.

  Args:
    task: what is learnt.
    entry: the method.
    knobs: radii, or what the method has instead.
    seeds: each sets split, wrong labels, initial weights and order of the batches.
    steps: how many each run takes.

  Returns:
    For each knob a list over the seeds: ``validation`` and ``test`` accuracy after the
    last step, and ``probes``, the share of the steps that had a second gradient.
  """
  data = [make_data(task, seed, steps) for seed in seeds]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *data)
  over_seeds = jax.vmap(functools.partial(run, task, entry, steps), in_axes=(None, 0))
  results = jax.jit(jax.vmap(over_seeds, in_axes=(0, None)))(
    jnp.asarray(knobs, jnp.float32), stacked
  )
  return {name: np.asarray(x, np.float64).tolist() for name, x in results.items()}


def run(
  task: problems.Task, entry: Entry, steps: int, knob: jax.Array, data: Data
) -> dict[str, jax.Array]:
  """One run, whose radius is traced."""
  x, labels = data.train
  tx = entry.make(knob, task.learning_rate, steps)
  params = problems.init(data.key, x.shape[1], task.width)

  def step(carry, rows):
    params, state = carry
    part = rows[:: entry.parts]
    grad = jax.grad(problems.loss)
    updates, state = tx.update(
      grad(params, x[part], labels[part]),
      state,
      params,
      grad_fn=lambda params: grad(params, x[rows], labels[rows]),
    )
    radius = optax.tree.get(state, 'radius', jnp.zeros([]))
    return (optax.apply_updates(params, updates), state), radius > 0

  (params, state), probed = jax.lax.scan(step, (params, tx.init(params)), data.rows)
  params = entry.clean(state, params)
  return {
    'validation': problems.accuracy(params, *data.validation),
    'test': problems.accuracy(params, *data.test),
    'probes': jnp.mean(probed),
  }
