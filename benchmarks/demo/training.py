"""Handwritten digits, and a small net trained on them with Adam, SAM and Monge SAM."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax
from sklearn.datasets import load_digits

from msam_optax import flax_nnx
from msam_optax import msam
from msam_optax import sam

CLASSES = 10


class Settings(NamedTuple):
  """All that is the same for every method.

  Attributes:
    train: number of training images.
    validation: number of validation images.
    wrong: share of wrong training labels.
    batch: images per step.
    epochs: passes over the training images.
    learning_rate: Adam's.
    width: channels of the first convolution.
  """

  train: int = 500
  validation: int = 300
  wrong: float = 0.2
  batch: int = 50
  epochs: int = 40
  learning_rate: float = 3e-3
  width: int = 8


class Split(NamedTuple):
  """Images ``[n, 8, 8, 1]`` in [0, 1] with labels; only training labels are noisy."""

  train: tuple[np.ndarray, np.ndarray]
  validation: tuple[np.ndarray, np.ndarray]
  test: tuple[np.ndarray, np.ndarray]


def split_digits(seed: int, *, train: int, validation: int, wrong: float) -> Split:
  """Splits the 1,797 digits and moves a share of the training labels to other classes.

  Args:
    seed: of the permutation and of which labels become wrong.
    train: number of training images.
    validation: number of validation images; all others are for the test.
    wrong: share of the training labels that are replaced by another class.

  Returns:
    The three parts.
  """
  rng = np.random.default_rng(seed)
  images, labels = load_digits(return_X_y=True)
  order = rng.permutation(len(labels))
  x = (images[order].reshape(-1, 8, 8, 1) / 16).astype(np.float32)
  y = labels[order].astype(np.int32)
  chosen = rng.permutation(train)[: round(wrong * train)]
  noisy = y[:train].copy()
  noisy[chosen] = (noisy[chosen] + rng.integers(1, CLASSES, len(chosen))) % CLASSES
  end = train + validation
  return Split((x[:train], noisy), (x[train:end], y[train:end]), (x[end:], y[end:]))


class Net(nnx.Module):
  """Two convolutions with GroupNorm, and a dense layer."""

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    self.conv_1 = nnx.Conv(1, width, (3, 3), rngs=rngs)
    self.norm_1 = nnx.GroupNorm(width, num_groups=2, rngs=rngs)
    self.conv_2 = nnx.Conv(width, 2 * width, (3, 3), strides=2, rngs=rngs)
    self.norm_2 = nnx.GroupNorm(2 * width, num_groups=2, rngs=rngs)
    self.dense = nnx.Linear(16 * 2 * width, CLASSES, rngs=rngs)

  def __call__(self, x: ArrayLike) -> jax.Array:
    x = nnx.relu(self.norm_1(self.conv_1(jnp.asarray(x))))
    x = nnx.relu(self.norm_2(self.conv_2(x)))
    return self.dense(x.reshape(x.shape[0], -1))


class Run(NamedTuple):
  """What one training run came to.

  Attributes:
    train: accuracy on the training images with the labels, right or wrong, they have.
    validation: accuracy on the validation images after the last step.
    test: accuracy on the test images after the last step.
    factor: mean over all steps of ``√(1 + ‖g‖²)``.
    shrink: mean over all steps of ``1/√(1 + ‖g‖²)``.
    rise: mean over all steps of ``ℓ(w + δ) − ℓ(w)``; 0 for Adam.
  """

  train: float
  validation: float
  test: float
  factor: float
  shrink: float
  rise: float


def optimizers(learning_rate: float) -> dict[str, optax.GradientTransformation]:
  """The transformation of each method; ``rho`` is in its state, set run by run."""
  adam = optax.adam(learning_rate)
  return {
    'Adam': adam,
    'SAM': optax.chain(optax.inject_hyperparams(sam)(rho=0.0), adam),
    'Monge SAM': optax.chain(optax.inject_hyperparams(msam)(rho=0.0), adam),
  }


def loss_fn(model: Net, x: ArrayLike, y: ArrayLike) -> jax.Array:
  """Mean cross entropy."""
  return optax.losses.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def train_step(
  model: Net, optimizer: nnx.Optimizer, x: ArrayLike, y: ArrayLike
) -> tuple[jax.Array, jax.Array]:
  """One step of SAM or Monge SAM; returns ``‖g‖`` and the rise at the probe."""
  value_and_grad_fn = flax_nnx.value_and_grad_fn(loss_fn, model, x, y)
  loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
  optimizer.update(model, grads, value=loss, value_and_grad_fn=value_and_grad_fn)
  return optax.tree.norm(grads), optax.tree.get(optimizer.opt_state, 'rise')[...]


@nnx.jit
def adam_step(
  model: Net, optimizer: nnx.Optimizer, x: ArrayLike, y: ArrayLike
) -> tuple[jax.Array, jax.Array]:
  """One step of Adam alone; returns ``‖g‖`` and no rise, there being no probe."""
  _, grads = nnx.value_and_grad(loss_fn)(model, x, y)
  optimizer.update(model, grads)
  return optax.tree.norm(grads), jnp.zeros([])


@nnx.jit
def accuracy(model: Net, x: ArrayLike, y: ArrayLike) -> jax.Array:
  """Share of the images whose most likely class is their label."""
  return jnp.mean(jnp.argmax(model(x), axis=-1) == y)


def start(
  settings: Settings, tx: optax.GradientTransformation, rho: float | None, seed: int
) -> tuple[Net, Callable[[ArrayLike, ArrayLike], Any]]:
  """A fresh net, and a function that takes a step of training it on a batch.

  Args:
    settings: those of the experiment.
    tx: one of :func:`optimizers`.
    rho: the radius, or None for Adam.
    seed: of the initial weights.

  Returns:
    The net, and the function from images and labels to ``‖g‖`` and the rise.
  """
  model = Net(settings.width, rngs=nnx.Rngs(seed))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  if rho is None:
    return model, nnx.cached_partial(adam_step, model, optimizer)
  optimizer.opt_state[0].hyperparams['rho'][...] = jnp.float32(rho)
  return model, nnx.cached_partial(train_step, model, optimizer)


def train(
  settings: Settings,
  tx: optax.GradientTransformation,
  rho: float | None,
  seed: int,
  split: Split,
) -> Run:
  """Trains from scratch; the seed sets initial weights and the order of the batches."""
  model, step = start(settings, tx, rho, seed)
  x, y = split.train
  rng = np.random.default_rng(seed)
  recorded = []
  for _ in range(settings.epochs):
    order = rng.permutation(len(y))
    for i in range(0, len(y) - settings.batch + 1, settings.batch):
      rows = order[i : i + settings.batch]
      recorded.append(step(x[rows], y[rows]))
  norm, rise = np.asarray(jax.device_get(recorded), np.float64).T
  factor = np.hypot(1, norm)
  return Run(
    train=float(accuracy(model, *split.train)),
    validation=float(accuracy(model, *split.validation)),
    test=float(accuracy(model, *split.test)),
    factor=float(factor.mean()),
    shrink=float((1 / factor).mean()),
    rise=float(rise.mean()),
  )
