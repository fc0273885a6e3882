"""The ascent alone: how near to the bandwidth of the device's memory it comes.

The ideal reads the gradient for its norm, then gradient and parameters, and writes the
probe: 4 times the bytes of the parameters. This is what is divided by the time, also
where more was moved, so that a figure compares with another by the time alone.
"""

from collections.abc import Callable
from collections.abc import Iterator
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.common.steps import RHO
from benchmarks.common.timing import explain
from benchmarks.common.timing import spread
from benchmarks.common.timing import time_in_turns
from benchmarks.gpu.steps import memory
from benchmarks.gpu.steps import SKIPPED
import msam_optax

COPY = 'copy, the same arrays'


class Operation(NamedTuple):
  """Something that is done to trees.

  Attributes:
    run: takes parameters and gradients, or one array where ``flat``.
    passes: how often the ideal reads or writes the bytes of the parameters.
    flat: whether it is given one array of the same bytes.
  """

  run: Callable[..., Any]
  passes: int
  flat: bool = False


def ascend(w, g):
  """This library's: ``monge().ascend`` and ``perturb``."""
  metric = msam_optax.monge()
  ascent, _ = metric.ascend(g, metric.init(w), w)
  return msam_optax.perturb(w, ascent, RHO)


def by_hand(w, g):
  """The same in one pass for the norm, which 1e-30 and 1e+30 do not survive."""
  n = optax.tree.norm(g)
  radius = RHO / (n * jnp.sqrt(1 + n**2))
  return jax.tree.map(lambda w, g: w + radius * g, w, g)


OPERATIONS = {
  COPY: Operation(lambda w, g: jax.tree.map(jnp.copy, g), 2),
  'copy, one array': Operation(jnp.copy, 2, flat=True),
  'monge().ascend and perturb': Operation(ascend, 4),
  'by hand, one pass for the norm': Operation(by_hand, 4),
}


def measure(
  *,
  width: int,
  layers: int,
  vocabulary: int,
  rounds: int,
  repeats: int,
  left: Callable[[], float],
) -> Iterator[dict[str, Any]]:
  """Times every operation on trees with the shapes of a transformer, float32.

  Yields:
    What is known so far: bytes of the parameters and figures by operation, with
    ``GB_per_s`` of the ideal and the ``ratio`` of that to a copy of the same arrays.
  """
  shapes = transformer_shapes(width, layers, vocabulary)
  w, g = jax.jit(lambda key: random_trees(key, shapes))(jax.random.key(0))
  size = sum(x.nbytes for x in jax.tree.leaves(w))
  figures: dict[str, dict[str, Any]] = {}
  result = {'bytes': size, 'leaves': len(jax.tree.leaves(w)), 'operations': figures}
  loops = {}
  for name, operation in OPERATIONS.items():
    if left() <= 0:
      figures[name] = SKIPPED
      continue
    try:
      args = (jnp.ones(size // 4),) if operation.flat else (w, g)
      compiled = jax.jit(operation.run).lower(*args).compile()
      figures[name] = {'passes': operation.passes, 'memory': memory(compiled)}
      loops[name] = repeated(compiled, args, repeats)
    except Exception as error:
      figures[name] = explain(error)
  yield result
  timing = time_in_turns(loops, rounds=rounds, left=left)
  for name, failure in timing.failures.items():
    figures[name] |= failure
  for name, seconds in timing.seconds.items():
    each = np.asarray(seconds) / repeats
    moved = OPERATIONS[name].passes * size / 1e9
    figures[name]['ms'] = spread(1000 * each) | {'rounds': (1000 * each).tolist()}
    figures[name]['GB_per_s'] = spread(moved / each)
    if COPY in timing.seconds:
      copied = OPERATIONS[COPY].passes / OPERATIONS[name].passes
      ratio = np.divide(timing.seconds[COPY], seconds) / copied
      figures[name]['ratio'] = spread(ratio)
  yield result


def repeated(compiled: Any, args: tuple[Any, ...], repeats: int) -> Callable[[], None]:
  """A function that calls another some times and waits for the last."""

  def run():
    for _ in range(repeats):
      result = compiled(*args)
    jax.block_until_ready(result)

  return run


def transformer_shapes(width: int, layers: int, vocabulary: int) -> dict[str, Any]:
  """Shapes of kernels, biases and scales, layer by layer, and of the embedding."""
  kernels = {
    **{name: (width, width) for name in ('query', 'key', 'value', 'out')},
    'up': (width, 4 * width),
    'down': (4 * width, width),
  }
  biases = {f'{name}_bias': shape[1:] for name, shape in kernels.items()}
  norms = {f'norm_{i}_{kind}': (width,) for i in (1, 2) for kind in ('scale', 'bias')}
  layer = kernels | biases | norms
  return {
    'embedding': (vocabulary, width),
    **{f'layer_{i}': dict(layer) for i in range(layers)},
  }


def random_trees(key: jax.Array, shapes: dict[str, Any]) -> tuple[Any, Any]:
  """Parameters and gradients of the order of those in training."""
  leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
  sizes = [math.prod(shape) for shape in leaves]

  def draw(key, scale):
    # One array, cut up: hundreds of random ones would take minutes to compile.
    parts = jnp.split(scale * jax.random.normal(key, sum(sizes)), np.cumsum(sizes)[:-1])
    return tree.unflatten([x.reshape(s) for x, s in zip(parts, leaves, strict=True)])

  w, g = jax.random.split(key)
  return draw(w, 0.02), draw(g, 1e-4)
