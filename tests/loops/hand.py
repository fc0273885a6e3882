"""Training by hand: the methods' formulas and two optimizers, in NumPy.

What every loop is compared with: given the plain gradient of a loss, the numbers here
use none of the library's code. Its two doors stand beside them, as a user opens them.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import msam_optax

RHO = {'msam': 0.5, 'sam': 0.2, 'asam': 0.4}
ETA = 0.01


def transformation(method: str, **options: Any) -> Any:
  """The method as a user writes it at the head of a chain."""
  return getattr(msam_optax, method)(rho=RHO[method], **options)


def drop_in(method: str, loss_fn: Callable[..., Any], **options: Any) -> Any:
  """The method as a user writes it in place of ``jax.value_and_grad``."""
  metric = {
    'msam': msam_optax.monge,
    'sam': msam_optax.euclidean,
    'asam': msam_optax.adaptive,
  }[method]()
  return msam_optax.value_and_grad(loss_fn, metric, RHO[method], **options)


def normal(seed: int, *shape: int) -> np.ndarray:
  """Normal numbers, made without a program to compile."""
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def init(function: Callable[..., Any], *args: Any, seed: int = 0) -> Any:
  """Parameters of the structure and shapes that a function would make."""
  rng = np.random.default_rng(seed)
  draw = lambda x: (0.5 * rng.normal(size=x.shape)).astype(np.float32)
  return jax.tree.map(draw, jax.eval_shape(function, *args))


def train(
  method: str,
  take: Callable[..., Any],
  params: Any,
  state: Any,
  batches: Any,
  optimizer: Callable[[Any, Any], Any],
  **options: Any,
) -> tuple[Any, Any]:
  """A loop of a method: two gradients a batch, and the state of the first pass.

  Args:
    method: a key of ``RHO``.
    take: ``(params, state, batch) -> (grads, new state)``, the plain gradient.
    params: pytree of arrays.
    state: what the model carries from batch to batch, statistics for example.
    batches: what ``take`` gets, one a step.
    optimizer: :func:`sgd` or :func:`adam`.
    **options: those of :func:`probe`.

  Returns:
    The last params and state.
  """
  for batch in batches:
    grads, new_state = take(params, state, batch)
    at_probe, _ = take(probe(method, params, grads, **options), state, batch)
    params, state = optimizer(params, at_probe), new_state
  return params, state


def probe(
  method: str,
  params: Any,
  grads: Any,
  *,
  rho: float | None = None,
  alpha: float = 1.0,
  weights: Callable[[str], bool] = lambda path: False,
  moved: Callable[[str], bool] = lambda path: True,
) -> Any:
  """``w + δ`` by the paper's formula of each method, in float64.

  Args:
    method: a key of ``RHO``.
    params: pytree of arrays.
    grads: pytree like ``params``.
    rho: the radius, by default that in ``RHO``.
    alpha: Monge SAM's ``α``.
    weights: which leaves ASAM takes for weights, by their path as JAX writes it.
    moved: which leaves are moved.

  Returns:
    A pytree like ``params``, in their dtypes.
  """
  rho = RHO[method] if rho is None else rho
  paths, leaves, structure = _flatten(params)
  w, g = _stack(params), _stack(grads) * [moved(path) for path in paths]
  t = [
    np.abs(x) + ETA if method == 'asam' and weights(path) else np.ones_like(x)
    for x, path in zip(w, paths, strict=True)
  ]
  t = _each(lambda x: x, t)
  norm = np.sqrt(sum(np.sum(x**2) for x in t * g))
  if method == 'msam':
    norm *= np.sqrt(1 + alpha**2 * norm**2)
  return _unflatten(structure, w + rho * t**2 * g / norm, leaves)


def sgd(learning_rate: float, momentum: float = 0.0) -> Callable[[Any, Any], Any]:
  """Gradient descent with momentum, as a function that remembers its velocity."""
  velocity = 0.0

  def step(params, grads):
    nonlocal velocity
    _, leaves, structure = _flatten(params)
    velocity = momentum * velocity + _stack(grads)
    return _unflatten(structure, leaves - learning_rate * velocity, leaves)

  return step


def adam(
  learning_rate: float, *, eps: float, clip: float = np.inf
) -> Callable[[Any, Any], Any]:
  """Adam behind a clip of the global norm, as a function that remembers."""
  m, v, count = 0.0, 0.0, 0

  def step(params, grads):
    nonlocal m, v, count
    _, leaves, structure = _flatten(params)
    g = _stack(grads)
    g *= min(1.0, clip / np.sqrt(sum(np.sum(x**2) for x in g)))
    m, v, count = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2, count + 1
    scale = _each(np.sqrt, v / (1 - 0.999**count)) + eps
    new = leaves - learning_rate * (m / (1 - 0.9**count)) / scale
    return _unflatten(structure, new, leaves)

  return step


def _flatten(params):
  found, structure = jax.tree_util.tree_flatten_with_path(params)
  paths = [jax.tree_util.keystr(path) for path, _ in found]
  return paths, _each(np.asarray, [leaf for _, leaf in found]), structure


def _unflatten(structure, leaves, like):
  cast = [x.astype(y.dtype) for x, y in zip(leaves, like, strict=True)]
  return jax.tree.unflatten(structure, cast)


def _stack(tree):
  """The leaves in float64, as an array of arrays, with which one can compute."""
  return _each(lambda x: np.asarray(x, np.float64), jax.tree.leaves(tree))


def _each(function, leaves):
  result = np.empty(len(leaves), object)
  for i, leaf in enumerate(leaves):
    result[i] = function(leaf)
  return result
