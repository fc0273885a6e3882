"""Sharpness-aware gradients and training by hand, in NumPy and float64.

What everything is compared with. The gradient of the loss is JAX's, and all else is
the formulas of a row in ``methods``: one device, a loop over the parts of a batch, and
none of the library's code.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tests.methods import find
from tests.methods import Method


def is_matrix(path: str, leaf: np.ndarray) -> bool:
  """Which leaves are weights where names say nothing else."""
  return leaf.ndim > 1


def every_leaf(path: str, leaf: np.ndarray) -> bool:
  """Which leaves are perturbed where nothing else is said."""
  return True


def gradient(
  method: str | Method,
  loss: Callable[[Any, Any], Any],
  params: Any,
  data: Any,
  *,
  parts: int = 1,
  shards: int = 1,
  **options: Any,
) -> tuple[np.floating, Any]:
  """The loss of a batch and its sharpness-aware gradient.

  Args:
    method: a key of ``METHODS``, or a row.
    loss: ``(params, data) -> scalar``, a mean over the batch.
    params: pytree of arrays.
    data: pytree of arrays with the batch as first axis.
    parts: how many equal parts the batch is cut into, consecutive rows each, as over
      devices.
    shards: how many micro-batches each of these is cut into, the ``i``-th of the rows
      ``i``, ``i + shards``, and so on.
    **options: those of :func:`update`.

  Returns:
    The mean of the losses at ``params``, and what :func:`update` gives.
  """
  size = len(jax.tree.leaves(data)[0]) // parts
  cuts = [
    jax.tree.map(lambda x, p=p, i=i: x[p * size : (p + 1) * size][i::shards], data)
    for p in range(parts)
    for i in range(shards)
  ]
  value_and_grad = jax.jit(jax.value_and_grad(loss))
  value = np.mean([value_and_grad(params, cut)[0] for cut in cuts])
  gradients = [lambda w, cut=cut: value_and_grad(w, cut)[1] for cut in cuts]
  return value, update(method, params, gradients, **options)


def update(
  method: str | Method,
  params: Any,
  gradients: Sequence[Callable[[Any], Any]],
  *,
  synced: bool = False,
  weights: Sequence[float] | None = None,
  radii: Sequence[float] | None = None,
  is_weight: Callable[[str, np.ndarray], bool] = is_matrix,
  is_perturbed: Callable[[str, np.ndarray], bool] = every_leaf,
  memory: dict[Any, Any] | None = None,
) -> Any:
  """The sharpness-aware gradient, given the plain one of each part of a batch.

  Args:
    method: a key of ``METHODS``, or a row.
    params: pytree of arrays.
    gradients: ``params -> grads``, one function for each part.
    synced: whether the parts go up their mean gradient, or each its own.
    weights: how much each part counts in the means; by default all the same.
    radii: the radius of each part; by default that of the row.
    is_weight: ``(path, leaf) -> bool``, which leaves ASAM takes for weights, by
      their path as JAX writes it.
    is_perturbed: which leaves are perturbed, likewise. All have a part in the update.
    memory: what a method that remembers has seen in the steps before, to which this
      step is added; by default it is the first.

  Returns:
    A pytree like the gradients, in their dtypes.
  """
  row = find(method)
  grads = [gradient(params) for gradient in gradients]
  mean = lambda vectors: np.average(vectors, axis=0, weights=weights)
  own = [_vector(g) for g in grads]
  ascents = [mean(own)] * len(own) if synced else own
  memory = {} if memory is None else memory
  deltas = [
    _delta(
      row, params, g, rho, is_weight, is_perturbed, memory.setdefault(('delta', i), {})
    )
    for i, (g, rho) in enumerate(
      zip(ascents, radii or [row.rho] * len(own), strict=True)
    )
  ]
  at_probes = [
    [
      _vector(gradient(_like(params, _vector(params) + scale * delta)))
      for gradient, delta in zip(gradients, deltas, strict=True)
    ]
    for scale in row.scales
  ]
  remembered = _remembered(row, memory.setdefault('update', {}))
  update = row.update(mean(own), *map(mean, at_probes), **remembered)
  return _like(grads[0], update)


def probe(
  method: str | Method,
  params: Any,
  grads: Any,
  rho: float | None = None,
  *,
  is_weight: Callable[[str, np.ndarray], bool] = is_matrix,
) -> Any:
  """``w + δ``, like ``params`` and in their dtypes."""
  row = find(method)
  rho = row.rho if rho is None else rho
  delta = _delta(row, params, _vector(grads), rho, is_weight)
  return _like(params, _vector(params) + delta)


def slope(method: str | Method, params: Any, grads: Any) -> float:
  """``⟨g, δ⟩/ρ``, the rise of the loss per unit of radius."""
  row, g = find(method), _vector(grads)
  return g @ _delta(row, params, g, row.rho, is_matrix) / row.rho


def train(
  method: str | Method,
  grad_fn: Callable[..., Any],
  params: Any,
  state: Any,
  batches: Any,
  optimizer: Callable[[Any, Any], Any],
  **options: Any,
) -> tuple[Any, Any]:
  """A loop of a method, with the model's state as the first pass leaves it.

  Args:
    method: a key of ``METHODS``, or a row.
    grad_fn: ``(params, state, batch) -> (grads, new state)``, the plain gradient.
    params: pytree of arrays.
    state: what the model carries from batch to batch, statistics for example.
    batches: what ``grad_fn`` gets, one per step.
    optimizer: :func:`sgd` or :func:`adam`.
    **options: those of :func:`update`.

  Returns:
    The last params and state.
  """
  memory = {}
  for batch in batches:
    states = []

    def plain(w, state=state, batch=batch, states=states):
      grads, new_state = grad_fn(w, state, batch)
      states.append(new_state)
      return grads

    new = update(method, params, [plain], memory=memory, **options)
    params, state = optimizer(params, new), states[0]
  return params, state


def sgd(learning_rate: float, momentum: float = 0.0) -> Callable[[Any, Any], Any]:
  """Gradient descent with momentum, as a function that remembers its velocity."""
  velocity = 0.0

  def step(params, grads):
    nonlocal velocity
    velocity = momentum * velocity + _vector(grads)
    return _like(params, _vector(params) - learning_rate * velocity)

  return step


def adam(
  learning_rate: float, *, eps: float, clip: float = np.inf
) -> Callable[[Any, Any], Any]:
  """Adam behind a clip of the global norm, as a function that remembers."""
  m, v, count = 0.0, 0.0, 0

  def step(params, grads):
    nonlocal m, v, count
    g = _vector(grads)
    g *= min(1.0, clip / np.linalg.norm(g))
    m, v, count = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2, count + 1
    scale = np.sqrt(v / (1 - 0.999**count)) + eps
    new = _vector(params) - learning_rate * (m / (1 - 0.9**count)) / scale
    return _like(params, new)

  return step


def _delta(row, params, g, rho, is_weight, is_perturbed=every_leaf, memory=None):
  delta, w = np.zeros_like(g), _vector(params)
  on = _entries(params, is_perturbed)
  remembered = _remembered(row, {} if memory is None else memory)
  if g[on].any():  # Else no direction is the steepest.
    is_weight = _entries(params, is_weight)[on]
    delta[on] = row.delta(w[on], g[on], rho, is_weight, **remembered)
  return delta


def _remembered(row, memory):
  return {'memory': memory} if row.remembers else {}


def _entries(params, is_chosen):
  """For each entry of the vector of the parameters, whether its leaf is chosen."""
  leaves = [
    (jax.tree_util.keystr(path), np.asarray(leaf))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  ]
  return np.concatenate([np.full(x.size, is_chosen(path, x)) for path, x in leaves])


def _vector(tree):
  """All leaves as one vector in float64."""
  leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
  return np.concatenate(leaves)


def _like(tree, vector):
  """The entries of a vector in the structure, shapes and dtypes of a tree."""
  leaves, structure = jax.tree.flatten(tree)
  ends = np.cumsum([np.size(x) for x in leaves])[:-1]
  return jax.tree.unflatten(
    structure,
    [
      part.reshape(np.shape(x)).astype(np.asarray(x).dtype)
      for part, x in zip(np.split(vector, ends), leaves, strict=True)
    ],
  )
