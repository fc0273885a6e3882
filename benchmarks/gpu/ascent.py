"""The ascent alone: how near to the bandwidth of the device's memory it comes.

The ideal reads the gradient for its norm, then gradient and parameters, and writes the
probe: 4 times the bytes of the parameters. This is what is divided by the time, also
where more was moved, so that a figure compares with another by the time alone.

Many operations run in one program, as the ascent does in a step of training: what the
host needs to begin a program with hundreds of arrays is no part of the figures.
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
ONE_COPY = 'copy, one array'


class Operation(NamedTuple):
  """Something that is done to parameters and gradients.

  Attributes:
    run: ``(w, g) -> w``, new parameters, which overwrite the old ones.
    passes: how often the ideal reads or writes the bytes of the parameters.
    copy: the copy of as many arrays, which its speed is compared with.
  """

  run: Callable[[Any, Any], Any]
  passes: int
  copy: str = COPY


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


def copy(w, g):
  """What the memory can do; negated, since XLA would leave out a plain copy."""
  del w
  return jax.tree.map(jnp.negative, g)


OPERATIONS = {
  COPY: Operation(copy, 2),
  'monge().ascend and perturb': Operation(ascend, 4),
  'by hand, one pass for the norm': Operation(by_hand, 4),
  ONE_COPY: Operation(copy, 2, ONE_COPY),
  'monge().ascend and perturb, one array': Operation(ascend, 4, ONE_COPY),
  'by hand, one array': Operation(by_hand, 4, ONE_COPY),
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

  Args:
    width: of the transformer.
    layers: of the transformer.
    vocabulary: of the transformer.
    rounds: how many times each program is timed.
    repeats: how many operations a program does.
    left: the seconds left.

  Yields:
    What is known so far: bytes of the parameters and figures by operation, with
    ``GB_per_s`` of the ideal and the ``ratio`` of that to a copy of the same arrays.
  """
  shapes = transformer_shapes(width, layers, vocabulary)
  leaves = jax.tree.leaves(shapes, is_leaf=is_shape)
  size = 4 * sum(math.prod(shape) for shape in leaves)
  figures: dict[str, dict[str, Any]] = {}
  result = {'bytes': size, 'leaves': len(leaves), 'operations': figures}
  loops = {}
  for name, operation in OPERATIONS.items():
    if left() <= 0:
      figures[name] = SKIPPED
      continue
    try:
      make = random_trees if operation.copy == COPY else random_vectors
      trees = jax.jit(lambda key, make=make: make(key, shapes))(jax.random.key(0))
      program = jax.jit(many_times(operation.run, repeats), donate_argnums=0)
      compiled = program.lower(trees).compile()
      figures[name] = {'passes': operation.passes, 'memory': memory(compiled)}
      loops[name] = repeated(compiled, trees)
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
    copied = OPERATIONS[name].copy
    if copied in timing.seconds:
      as_far = OPERATIONS[name].passes / OPERATIONS[copied].passes
      ratio = as_far * np.divide(timing.seconds[copied], seconds)
      figures[name]['ratio'] = spread(ratio)
  yield result


def many_times(
  run: Callable[[Any, Any], Any], repeats: int
) -> Callable[[Any], tuple[Any, Any]]:
  """A program of many operations, none of which can be left out or merged.

  Each has another gradient, a multiple of the one that is in memory, or XLA would take
  its norm once for all. The multiplication is part of the kernels that read it.
  """

  def once(turn, trees):
    w, g = trees
    factor = 1.0 + 0.01 * turn.astype(jnp.float32)
    return run(w, jax.tree.map(lambda x: factor * x, g)), g

  return lambda trees: jax.lax.fori_loop(0, repeats, once, trees)


def repeated(compiled: Any, trees: Any) -> Callable[[], None]:
  """A function that runs a program on its own results, and waits for them."""
  carried = [trees]

  def run():
    carried[0] = jax.block_until_ready(compiled(carried[0]))

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


def is_shape(x: Any) -> bool:
  """Whether a node of a tree of shapes is a shape."""
  return isinstance(x, tuple)


def random_vectors(key: jax.Array, shapes: dict[str, Any]) -> tuple[Any, Any]:
  """Parameters and gradients of the order of those in training, each as one array."""
  leaves = jax.tree.leaves(shapes, is_leaf=is_shape)
  size = sum(math.prod(shape) for shape in leaves)
  w, g = jax.random.split(key)
  return 0.02 * jax.random.normal(w, (size,)), 1e-4 * jax.random.normal(g, (size,))


def random_trees(key: jax.Array, shapes: dict[str, Any]) -> tuple[Any, Any]:
  """The same, cut up: hundreds of random arrays would take minutes to compile."""
  leaves, tree = jax.tree.flatten(shapes, is_leaf=is_shape)
  cuts = np.cumsum([math.prod(shape) for shape in leaves])[:-1]

  def cut(flat):
    parts = zip(jnp.split(flat, cuts), leaves, strict=True)
    return tree.unflatten([x.reshape(shape) for x, shape in parts])

  w, g = random_vectors(key, shapes)
  return cut(w), cut(g)
