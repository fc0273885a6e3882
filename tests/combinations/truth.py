"""Metrics and combinations as formulas of vectors in float64.

Means over the parts of a batch are loops.
"""

import jax
import numpy as np

import msam_optax
from tests.combinations.problem import flat
from tests.combinations.problem import make_data
from tests.combinations.problem import make_params
from tests.combinations.problem import RHO
from tests.combinations.problem import ROWS


def sam(g, g_plus):
  return g_plus


def wsam(g, g_plus, a=1.7):
  return (1 - a) * g + a * g_plus


def gsam(g, g_plus, alpha=0.6):
  return g_plus - alpha * (g - (g @ g_plus) / (g_plus @ g_plus) * g_plus)


def cr_sam(g, g_plus, g_minus, gamma=0.3, beta=0.2):
  return g_plus + gamma * (g_plus + g_minus - 2 * g) + beta * (g_plus - g_minus)


# The library's, its formula, and where its probes are.
COMBINATIONS = {
  'sam': (msam_optax.probe_gradient(), sam, (1,)),
  'wsam': (msam_optax.weighted(1.7), wsam, (1,)),
  'gsam': (msam_optax.surrogate_gap(0.6), gsam, (1,)),
  'cr_sam': (msam_optax.curvature(0.3, 0.2), cr_sam, (1, -1)),
}


def euclidean_slope(w, g):
  return np.sqrt(g @ g), g / np.sqrt(g @ g)


def monge_slope(w, g, alpha=1.5):
  n = np.sqrt(g @ g)
  root = np.sqrt(1 + alpha**2 * n**2)
  return n / root, g / (n * root)


def adaptive_slope(w, g, eta=0.1):
  T = np.abs(w) + eta
  n = np.sqrt((T * g) @ (T * g))
  return n, T**2 * g / n


def everything(params):
  return jax.tree.map(lambda _: True, params)


METRICS = {
  'euclidean': (msam_optax.euclidean(), euclidean_slope),
  'monge': (msam_optax.monge(1.5), monge_slope),
  'adaptive': (msam_optax.adaptive(0.1, weights=everything), adaptive_slope),
}


def value_and_slope(w, x, y, counts):
  """Loss and gradient in float64; ``counts`` says how often each example counts."""
  a, b = w[:3], w[3:]
  residual = np.sin(x @ a) + x[:, :2] @ b - y
  outer = 2 * counts * residual
  slope = np.concatenate([x.T @ (outer * np.cos(x @ a)), x[:, :2].T @ outer])
  total = counts.sum() or 1.0
  return counts @ residual**2 / total, slope / total


def truth(
  name,
  metric='monge',
  *,
  cuts=(slice(None),),
  synced=False,
  counts=None,
  moved=1.0,
  start=None,
  rho=RHO,
):
  """Loss, update, slope and radius, by loops in float64.

  Args:
    name: a key of ``COMBINATIONS``.
    metric: a key of ``METRICS``.
    cuts: which rows are in each part of the batch.
    synced: whether all parts have one ascent.
    counts: how often each example counts, by default once.
    moved: vector, one for each parameter that is perturbed, zero for others.
    start: vector, the parameters.
    rho: the radius.

  Returns:
    The loss, a vector, and the means of the slopes and of the radii.
  """
  _, formula, scales = COMBINATIONS[name]
  w = flat(make_params()) if start is None else start
  x, y = (np.asarray(z, np.float64) for z in make_data())
  counts = np.ones(ROWS) if counts is None else counts
  weights = np.array([counts[cut].sum() for cut in cuts])
  mean = lambda parts: (
    sum(c * p for c, p in zip(weights, parts, strict=True)) / sum(weights)
  )
  at = lambda w, cut: value_and_slope(w, x[cut], y[cut], counts[cut])
  clean = [at(w, cut) for cut in cuts]
  own = [g for _, g in clean]
  ascents = [mean(own)] * len(cuts) if synced else own
  zero = 0.0, np.zeros_like(w)
  rises = [
    METRICS[metric][1](w, moved * g) if np.any(moved * g) else zero for g in ascents
  ]
  probes = [
    mean(
      [
        at(w + rho * scale * moved * direction, cut)[1]
        for (_, direction), cut in zip(rises, cuts, strict=True)
      ]
    )
    for scale in scales
  ]
  slope = mean([slope for slope, _ in rises])
  radius = mean([rho * np.sqrt(u @ u) for _, u in rises])
  return mean([value for value, _ in clean]), formula(mean(own), *probes), slope, radius


def strided(parts):
  """The rows of each micro-batch: of number i these are i, i + parts, …"""
  return [np.arange(i, ROWS, parts) for i in range(parts)]


def consecutive(parts):
  """The rows of each device."""
  return list(np.arange(ROWS).reshape(parts, -1))
