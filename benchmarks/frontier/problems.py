"""The tasks: pictures, some of them mislabelled, and a net of two layers."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.bad_minimum.problem import split_fashion
from benchmarks.demo.training import split_digits

CLASSES = 10
WRONG = 0.2


class Task(NamedTuple):
  """A data set, and how a net learns it.

  Attributes:
    split: ``seed -> (train, validation, test)``, each of them ``(x [n, d], labels)``.
    width: units of the hidden layer.
    steps: of a method with two gradients a step; others have as many, or as many more
      as come to as many gradients.
    batch: pictures per step.
    learning_rate: Adam's, at the beginning; it goes to zero as a cosine.
  """

  split: Callable[[int], tuple[Any, Any, Any]]
  width: int
  steps: int
  batch: int
  learning_rate: float


def digits(seed: int) -> tuple[Any, Any, Any]:
  """500 of scikit-learn's digits to learn from, 300 to choose by, 997 to test."""
  parts = split_digits(seed, train=500, validation=300, wrong=WRONG)
  flat = lambda part: (part[0].reshape(len(part[0]), -1), part[1])
  return flat(parts.train), flat(parts.validation), flat(parts.test)


def fashion(seed: int) -> tuple[Any, Any, Any]:
  """1,000 pictures of clothes, at half the resolution; 500 to choose, 1,500 to test."""
  right = round(1000 * (1 - WRONG))
  parts = split_fashion(seed, train=right, wrong=1000 - right)
  x, y = (np.concatenate(two) for two in zip(parts.train, parts.wrong, strict=True))
  half = lambda x: x.reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(len(x), -1)
  small = lambda part: (half(part[0]), part[1])
  return small((x, y)), small(parts.validation), small(parts.test)


TASKS = {
  'digits': Task(digits, width=128, steps=1200, batch=50, learning_rate=3e-3),
  'fashion': Task(fashion, width=128, steps=1500, batch=50, learning_rate=3e-3),
}


def init(key: jax.Array, inputs: int, width: int) -> dict[str, jax.Array]:
  """The parameters of the net, by He's rule."""
  k1, k2 = jax.random.split(key)
  return {
    'hidden': jax.random.normal(k1, (inputs, width)) * np.sqrt(2 / inputs),
    'hidden_bias': jnp.zeros(width),
    'out': jax.random.normal(k2, (width, CLASSES)) * np.sqrt(1 / width),
    'out_bias': jnp.zeros(CLASSES),
  }


def logits(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
  """One hidden layer of rectified units."""
  h = jax.nn.relu(x @ params['hidden'] + params['hidden_bias'])
  return h @ params['out'] + params['out_bias']


def loss(params: dict[str, jax.Array], x: jax.Array, labels: jax.Array) -> jax.Array:
  """Mean cross entropy."""
  log_p = jax.nn.log_softmax(logits(params, x))
  return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], axis=1))


def accuracy(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
  """Share of the pictures whose most likely class is their label."""
  return jnp.mean(jnp.argmax(logits(params, x), axis=-1) == labels)
