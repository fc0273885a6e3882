"""Training into the bad minimum, and fine-tuning from there."""

from collections.abc import Callable
import functools
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from benchmarks.bad_minimum.problem import CLASSES
from benchmarks.bad_minimum.problem import Parts
from benchmarks.bad_minimum.problem import ResNet
from benchmarks.bad_minimum.settings import Settings
from benchmarks.common.storage import write_whole
from msam_optax import flax_nnx


def loss_fn(model: ResNet, x: ArrayLike, y: ArrayLike) -> jax.Array:
  """Mean cross entropy."""
  return optax.losses.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def plain_step(
  model: ResNet, optimizer: nnx.Optimizer, x: ArrayLike, y: ArrayLike
) -> tuple[jax.Array, jax.Array]:
  """One step of the optimizer alone; returns ``n = ‖g‖`` and no radius."""
  grads = nnx.grad(loss_fn)(model, x, y)
  optimizer.update(model, grads)
  return optax.tree.norm(grads), jnp.zeros([])


@nnx.jit
def two_pass_step(
  model: ResNet, optimizer: nnx.Optimizer, x: ArrayLike, y: ArrayLike
) -> tuple[jax.Array, jax.Array]:
  """One step with a probe; returns ``n = ‖g‖`` and the radius ``‖δ‖``."""
  grad_fn = flax_nnx.grad_fn(loss_fn, model, x, y)
  grads = nnx.grad(loss_fn)(model, x, y)
  optimizer.update(model, grads, grad_fn=grad_fn)
  return optax.tree.norm(grads), optax.tree.get(optimizer.opt_state, 'radius')[...]


@nnx.jit
def measure(model: ResNet, x: ArrayLike, y: ArrayLike) -> tuple[jax.Array, jax.Array]:
  """Share of the images whose most likely class is their label, and the mean loss."""
  logits = model(x)
  losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, y)
  return jnp.mean(jnp.argmax(logits, axis=-1) == y), jnp.mean(losses)


def new_model(settings: Settings, seed: int) -> ResNet:
  """The net, with initial weights."""
  return ResNet(settings.width, CLASSES, stride=settings.stride, rngs=nnx.Rngs(seed))


def train_start(
  settings: Settings, seed: int, parts: Parts, *, bad: bool
) -> tuple[ResNet, dict[str, float]]:
  """Trains with Adam until every label is fit, if ``bad`` also the wrong ones.

  Args:
    settings: those of the experiment.
    seed: of the initial weights and the order of the batches.
    parts: the images.
    bad: whether the wrongly labelled images are among what is fit.

  Returns:
    The net, and its accuracies on all parts with the number of epochs it took.
  """
  model = new_model(settings, seed)
  optimizer = nnx.Optimizer(model, _adam(settings.start_rate), wrt=nnx.Param)
  step = nnx.cached_partial(plain_step, model, optimizer)
  fit = (parts.train, parts.wrong) if bad else (parts.train,)
  x, y = (np.concatenate(arrays) for arrays in zip(*fit, strict=True))
  rng = np.random.default_rng((seed, 1))
  epoch, fitted = 0, False
  while epoch < settings.start_epochs and not fitted:
    _run_epoch(step, x, y, settings.batch, rng)
    epoch += 1
    fitted = epoch % 5 == 0 and float(measure(model, x, y)[0]) == 1.0
  look = {name: float(measure(model, *part)[0]) for name, part in _asdict(parts)}
  return model, {**look, 'epochs': epoch}


def fine_tune(
  settings: Settings,
  tx: optax.GradientTransformation,
  radius: float | None,
  seed: int,
  parts: Parts,
  model: ResNet,
) -> dict[str, Any]:
  """Fine-tunes on the correctly labelled images.

  Args:
    settings: those of the experiment.
    tx: one of the ``optimizers``.
    radius: its ``rho``; None for SGD.
    seed: of the order of the batches.
    parts: the images.
    model: the bad start; it is changed.

  Returns:
    Accuracies ``train``, ``validation`` and ``test`` after the last step; means over
    all steps of ``factor = √(1 + α²n²)``, ``shrink`` (1 over it) and ``radius``;
    ``lowest``, the lowest training accuracy seen; and ``curves``.
  """
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  train_step = plain_step if radius is None else two_pass_step
  if radius is not None:
    optimizer.opt_state[0].hyperparams['rho'][...] = jnp.float32(radius)
  step = nnx.cached_partial(train_step, model, optimizer)
  rng = np.random.default_rng((seed, 2))
  looks = [_look(model, parts, 0)]
  steps = []
  for epoch in range(1, settings.epochs + 1):
    steps.append(_run_epoch(step, *parts.train, settings.batch, rng))
    if epoch % settings.every == 0 or epoch == settings.epochs:
      looks.append(_look(model, parts, epoch))
  norms, radii = np.stack(steps, axis=1)
  factor = np.hypot(1.0, settings.alpha * norms)
  curves = {name: [look[name] for look in looks] for name in looks[0]}
  curves |= {
    'slope': norms.mean(axis=1).tolist(),
    'radius': radii.mean(axis=1).tolist(),
  }
  return {
    **{name: looks[-1][name] for name in ('train', 'validation', 'test')},
    'lowest': min(curves['train']),
    'factor': float(factor.mean()),
    'shrink': float((1 / factor).mean()),
    'radius': float(radii.mean()),
    'median_slope': float(np.median(norms)),
    'largest_slope': float(norms.max()),
    'curves': curves,
  }


# Transformations are made once: steps are compiled for the very functions they hold.
_adam = functools.cache(optax.adam)


def _run_epoch(step: Callable[..., Any], x, y, batch: int, rng) -> np.ndarray:
  """All full batches once, in random order; ``[2, steps]``, slopes and radii."""
  order = rng.permutation(len(y))
  recorded = []
  for i in range(0, len(y) - batch + 1, batch):
    rows = order[i : i + batch]
    recorded.append(step(x[rows], y[rows]))
  return np.asarray(jax.device_get(recorded), np.float64).T


def _look(model: ResNet, parts: Parts, epoch: int) -> dict[str, float]:
  look: dict[str, float] = {'epoch': epoch}
  for name, part in _asdict(parts):
    if name != 'wrong':
      accuracy, loss = measure(model, *part)
      look |= {name: float(accuracy), f'{name}_loss': float(loss)}
  return look


def _asdict(parts: Parts):
  return parts._asdict().items()


def save_params(path: Path, model: nnx.Module) -> None:
  """Stores a model's parameters, whole or not at all."""
  leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]

  def write(part):
    with part.open('wb') as file:
      np.savez(file, *leaves)

  write_whole(path, write)


def load_params(path: Path, model: ResNet) -> ResNet:
  """The model with the stored parameters; changes it."""
  state = nnx.state(model, nnx.Param)
  with np.load(path) as file:
    leaves = [jnp.asarray(file[name]) for name in file.files]
  nnx.update(model, jax.tree.unflatten(jax.tree.structure(state), leaves))
  return model
