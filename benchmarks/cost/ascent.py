"""The ascent alone: what a step does between its gradients.

It is from gradient and parameters to the probe, with the slope, the radius, and the
marks of what is not finite. By hand, plain SAM reads the gradient for its norm, then
gradient and parameters, and writes the probe: four passes over arrays as large as the
parameters. The norm by hand is a plain sum of squares, which 1e-30 does not survive.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
from typing import Any
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from benchmarks.common.steps import RHO
from benchmarks.common.timing import milliseconds
import msam_optax
from msam_optax import _devices
from msam_optax import metrics
from msam_optax import perturbation

ETA = 0.01

# Parameters and gradients: 100 million numbers in arrays of four million.
LEAVES, SIZE = 25, 4_000_000


class Ascent(NamedTuple):
  """This library's ascent, and the same by hand; both ``(g, w) -> probe, ...``."""

  ours: Callable[[Any, Any], Any]
  by_hand: Callable[[Any, Any], Any]


def ascent_under(metric: metrics.Metric) -> Callable[[Any, Any], Any]:
  """``(g, w) -> (probe, slope, radius, marks)``, as a step computes them."""

  def ours(g, w):
    everywhere = jax.tree.map(lambda _: True, w)
    ascent, _ = metric.ascend(g, metric.init(w), w)
    probe = msam_optax.perturb(w, ascent, RHO)
    rho = jnp.asarray(RHO)
    radius = perturbation.distance(rho, ascent, probe, w, mask=everywhere)
    marks = perturbation.unsound(g, ascent, radius, mask=everywhere)
    return probe, ascent.slope, radius, marks

  return ours


def _along(scale: Callable[[jax.Array], jax.Array]) -> Callable[[Any, Any], Any]:
  """By hand ``w + scale(‖g‖) g``."""

  def by_hand(g, w):
    factor = scale(optax.tree.norm(g))
    return jax.tree.map(lambda w, g: w + factor * g, w, g)

  return by_hand


def _along_adaptive(scale: Callable[[jax.Array], jax.Array]) -> Callable[..., Any]:
  """By hand ``w + scale(‖Tg‖) T²g`` with ``T = |w| + η``."""

  def by_hand(g, w):
    T = jax.tree.map(lambda w: jnp.abs(w) + ETA, w)
    h = jax.tree.map(jnp.multiply, T, g)
    factor = scale(optax.tree.norm(h))
    return jax.tree.map(lambda w, t, h: w + factor * t * h, w, T, h)

  return by_hand


def _flat(n):
  return RHO / n


def _monge(n):
  return RHO / (n * jnp.sqrt(1 + n**2))


def _adaptive():
  return msam_optax.adaptive(ETA, weights=True)


ASCENTS: Mapping[str, Ascent] = {
  'euclidean': Ascent(ascent_under(msam_optax.euclidean()), _along(_flat)),
  'monge': Ascent(ascent_under(msam_optax.monge()), _along(_monge)),
  'adaptive': Ascent(ascent_under(_adaptive()), _along_adaptive(_flat)),
  'monge over adaptive': Ascent(
    ascent_under(msam_optax.monge(base=_adaptive())), _along_adaptive(_monge)
  ),
}


@contextlib.contextmanager
def usual_branch() -> Iterator[None]:
  """Programs that are compiled in it have only the branch that runs, step for step.

  XLA counts a conditional as the larger of its branches. The other one is for norms
  whose square is no number, and for steps that are not finite.
  """
  with mock.patch.object(_devices, 'unless', lambda usual, values, *_: list(values)):
    yield


def passes(run: Callable[[Any, Any], Any], leaves: int, size: int) -> float:
  """Bytes accessed in the branch that runs, as a multiple of the parameters' bytes."""
  arrays = [jax.ShapeDtypeStruct((size,), jnp.float32)] * leaves
  with usual_branch():
    # Another function than the one that is timed, so that it is traced again.
    compiled = jax.jit(lambda g, w: run(g, w)).lower(arrays, arrays).compile()
  cost = compiled.cost_analysis()
  if cost is None:
    raise RuntimeError('This backend of JAX does not tell what a program costs.')
  return cost['bytes accessed'] / (4 * leaves * size)


def weigh(
  rounds: int, leaves: int = LEAVES, size: int = SIZE
) -> dict[str, dict[str, float]]:
  """For each metric the passes over memory and, if ``rounds``, the milliseconds."""
  found = {}
  for name, ascent in ASCENTS.items():
    found[name] = {
      'passes': passes(ascent.ours, leaves, size),
      'passes_by_hand': passes(ascent.by_hand, leaves, size),
    }
    if rounds:
      times = milliseconds(_loops(ascent, leaves, size), rounds)
      found[name] |= {'ms': times['ours'], 'ms_by_hand': times['by_hand']}
  return found


def _loops(ascent, leaves, size):
  keys = jax.random.split(jax.random.key(0), 2 * leaves)
  arrays = [jax.random.normal(key, (size,)) for key in keys]
  g, w = arrays[:leaves], arrays[leaves:]

  def loop_of(run):
    compiled = jax.jit(run).lower(g, w).compile()
    return lambda: jax.block_until_ready(compiled(g, w)) and None

  return {name: loop_of(run) for name, run in ascent._asdict().items()}
