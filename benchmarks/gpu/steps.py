"""Memory and time of the training steps of one network."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import time
from typing import Any
from typing import TYPE_CHECKING

import jax
import numpy as np

from benchmarks.common.steps import CHAIN
from benchmarks.common.steps import DROP_IN
from benchmarks.common.steps import drop_in_compile_once
from benchmarks.common.steps import HAND
from benchmarks.common.steps import make_loop
from benchmarks.common.steps import OPAQUE
from benchmarks.common.steps import Step
from benchmarks.common.steps import STEPS
from benchmarks.common.timing import explain
from benchmarks.common.timing import spread
from benchmarks.common.timing import time_in_turns

if TYPE_CHECKING:  # so that what needs no network does not need Flax
  from benchmarks.common.networks import Problem

ADAM = 'adam'
COMPILE_ONCE = 'drop-in, compile_once'
SKIPPED = {'failed': 'skipped', 'message': 'the time is over'}
MEMORY = ('temp', 'argument', 'output', 'alias', 'generated_code')


def steps(names: Sequence[str] | None = None) -> dict[str, Callable[[Any], Step]]:
  """The steps, all or those named, the most important first."""
  known = {name: STEPS[name] for name in (HAND, CHAIN, DROP_IN, ADAM, OPAQUE)}
  known[COMPILE_ONCE] = drop_in_compile_once
  return {name: known[name] for name in names or known}


def weigh(
  make_problem: Callable[[], 'Problem'],
  *,
  names: Sequence[str] | None,
  rounds: int,
  repeats: int,
  reserve: float,
  left: Callable[[], float],
  say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
  """Compiles every step, then times all of them in turns.

  Args:
    make_problem: makes the network, its loss and a batch.
    names: keys of :func:`steps`, or None for all.
    rounds: how many times each step is timed.
    repeats: how many steps of training are taken each time.
    reserve: the seconds to leave for the times: no step is compiled if
      compiling the slowest one again would leave less.
    left: the seconds left.
    say: prints a line.

  Yields:
    What is known so far. A step has its ``figures``, or what ``failed``.
  """
  problem = make_problem()
  parameters = sum(w.size for w in jax.tree.leaves(problem.params))
  items = int(jax.tree.leaves(problem.batch)[-1].size)
  figures: dict[str, dict[str, Any]] = {}
  loops: dict[str, Callable[[], None]] = {}
  result = {'parameters': parameters, 'items': items, 'steps': figures}
  slowest = reserve  # a guess, until one is compiled
  for name, make in steps(names).items():
    start = time.perf_counter()
    if left() < slowest + reserve:
      figures[name] = dict(SKIPPED)
    else:
      try:
        step = make(problem.loss)
        compiled, figures[name] = compile_step(step, problem)
        loops[name] = make_loop(compiled, step, problem.params, problem.batch, repeats)
      except Exception as error:
        figures[name] = figures.get(name, {}) | explain(error)
    slowest = max(slowest, time.perf_counter() - start)
    say(f'  {name}: {said(figures[name])}')
    yield result
  timing = time_in_turns(loops, rounds=rounds, left=left)
  for name, failure in timing.failures.items():
    say(f'  {name}: {said(failure)}')
    figures[name] |= failure
  for name, times in step_times(timing.seconds, repeats).items():
    figures[name] |= times
  result['memory_stats'] = memory_stats()
  yield result


def step_times(
  seconds: Mapping[str, list[float]], repeats: int
) -> dict[str, dict[str, Any]]:
  """Milliseconds per step, and the ratio to the step by hand if that was timed."""
  times = {}
  for name, measured in seconds.items():
    ms = 1000 * np.asarray(measured) / repeats
    times[name] = {'ms': spread(ms) | {'rounds': ms.tolist()}}
    if HAND in seconds:
      # Round by round, so that a slow moment of the machine cancels.
      times[name]['ratio'] = spread(np.divide(measured, seconds[HAND]))
  return times


def compile_step(step: Step, problem: 'Problem') -> tuple[Any, dict[str, Any]]:
  """The compiled step, the seconds that took, and XLA's bytes."""
  carry = jax.eval_shape(lambda w: (w, step.tx.init(w)), problem.params)
  start = time.perf_counter()
  lowered = jax.jit(step.run, donate_argnums=0).lower(carry, problem.batch)
  traced = time.perf_counter()
  compiled = lowered.compile()
  return compiled, {
    'trace_s': traced - start,
    'compile_s': time.perf_counter() - traced,
    'memory': memory(compiled),
  }


def memory(compiled: Any) -> dict[str, int]:
  """Bytes of a compiled function, by kind, and in all while it runs."""
  analysis = compiled.memory_analysis()
  sizes = {kind: getattr(analysis, f'{kind}_size_in_bytes', None) for kind in MEMORY}
  sizes = {kind: int(size) for kind, size in sizes.items() if size is not None}
  # Donated arguments are the outputs: counted once.
  kinds = {'temp': 1, 'argument': 1, 'output': 1, 'alias': -1}
  if kinds.keys() <= sizes.keys():
    sizes['total'] = sum(sign * sizes[kind] for kind, sign in kinds.items())
  return sizes


def memory_stats() -> dict[str, int]:
  """What the device says of its memory; the peak is that of the process so far."""
  return {k: int(v) for k, v in (jax.devices()[0].memory_stats() or {}).items()}


def said(figures: Mapping[str, Any]) -> str:
  """A step's figures in a line."""
  if 'failed' in figures:
    return f'{figures["failed"]}: {figures["message"].splitlines()[0][:200]}'
  temporaries = figures['memory'].get('temp', 0) / 1e9
  return f'compiled in {figures["compile_s"]:.1f} s, {temporaries:.2f} GB temporaries'
