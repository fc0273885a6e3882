"""The methods written out by hand in NumPy's float64, and nothing else.

Squares of 1e-30 and 1e+30 are normal numbers in float64, so the formulas stand here
as they are in the papers, without the scaling that float32 needs.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import numpy as np

ETA_ADAPTIVE = 0.01
ETA_FISHER = 0.3

Tree = dict[str, Any]
# The inverse of a diagonal metric at gradients g and parameters w, leaf by leaf.
Inverse = Callable[[np.ndarray, np.ndarray], Any]


class Ascent(NamedTuple):
  """Direction ``G⁻¹g/√(gᵀG⁻¹g)`` and slope ``√(gᵀG⁻¹g)``, in float64."""

  direction: Tree
  slope: float


def euclidean(g, w):
  """``I``"""
  return 1.0


def adaptive(g, w):
  """``(|w| + η)²`` on weights, 1 on biases."""
  return (np.abs(w) + ETA_ADAPTIVE) ** 2 if w.ndim > 1 else 1.0


def diagonal_fisher(g, w):
  """``(1 + ηg²)⁻¹``"""
  return 1.0 / (1.0 + ETA_FISHER * g**2)


def ascent(inverse: Inverse, alpha: float, g: Tree, w: Tree) -> Ascent:
  """The ascent under ``B + α²ggᵀ`` by the formula of Sherman and Morrison.

  With ``u = B⁻¹g`` and ``s² = gᵀu`` the slope is ``s/√(1 + α²s²)``, and the direction
  is ``u`` over ``s√(1 + α²s²)``.
  """
  g, w = wide(g), wide(w)
  u = {k: inverse(g[k], w[k]) * g[k] for k in g}
  s = np.sqrt(sum(np.sum(g[k] * u[k]) for k in g))
  length = np.sqrt(1.0 + alpha**2 * s**2)
  return Ascent({k: u[k] / s / length for k in g}, float(s / length))


def loss_and_grad(w: Tree, data: Any, scale: float) -> tuple[float, Tree]:
  """``scale`` times the mean squared error of a network with one layer of tanh."""
  w, (x, y) = wide(w), (np.asarray(a, np.float64) for a in data)
  h = np.tanh(x @ w['kernel_1'] + w['bias_1'])
  error = h @ w['kernel_2'] + w['bias_2'] - y
  e = scale * 2.0 * error / error.size
  d = (e @ w['kernel_2'].T) * (1.0 - h**2)
  grads = {
    'kernel_1': x.T @ d,
    'bias_1': d.sum(0),
    'kernel_2': h.T @ e,
    'bias_2': e.sum(0),
  }
  return float(scale * np.mean(error**2)), grads


def two_pass(
  inverse: Inverse,
  alpha: float,
  rho: float,
  w: Tree,
  data: Any,
  scale: float,
  *,
  grads_as: Any,
  probe_as: Any,
) -> Tree:
  """The gradient at the probe, with gradients and probe rounded to dtypes."""
  _, g = loss_and_grad(w, data, scale)
  direction, _ = ascent(inverse, alpha, rounded(g, grads_as), w)
  probe = {k: np.asarray(w[k], np.float64) + rho * direction[k] for k in w}
  return loss_and_grad(rounded(probe, probe_as), data, scale)[1]


def rounded(tree: Tree, dtype: Any) -> Tree:
  """Float64 values that ``dtype`` can represent."""
  return wide({k: np.asarray(x).astype(dtype) for k, x in tree.items()})


def wide(tree: Tree) -> Tree:
  """The leaves in float64."""
  return {k: np.asarray(x).astype(np.float64) for k, x in tree.items()}
