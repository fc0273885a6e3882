"""What a step of Monge SAM costs beside the same two gradients written by hand.

Run `python -m benchmarks.cost`. FLOPs, bytes accessed and peak temporaries are XLA's
own figures for the compiled step (parameters and optimizer state donated), so they are
exact and do not depend on the machine's load; the times do, and no bar rests on them.

Of a conditional XLA counts the larger branch, which in this library is the one that
hardly ever runs. Bytes are those of the program without it.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import statistics
import time
from typing import Any
from typing import NamedTuple

import jax

from benchmarks.common import networks
from benchmarks.common import steps
from benchmarks.common.command import make_parser
from benchmarks.common.command import publish
from benchmarks.common.environment import describe
from benchmarks.common.tables import Document
from benchmarks.common.tables import Table
from benchmarks.common.terminal import progress
from benchmarks.common.timing import milliseconds
from benchmarks.common.timing import rotated
from benchmarks.cost import ascent

OURS = (steps.CHAIN, steps.DROP_IN)
PROBLEMS = {
  'transformer': networks.transformer,
  'conv net': networks.conv_net,
  'MLP': networks.mlp,
}
# What is added is per parameter: it shows most where a step sees little. No bars here.
SMALLEST = {'transformer, one sequence': lambda: networks.transformer(batch=1)}
QUICK_ASCENT = (2, 1000)
COMPILES = 5
QUICK = {'conv net': lambda: networks.conv_net(size=8, width=8, layers=1, batch=8)}

HEAD = ('step', 'FLOPs', 'bytes', '/ opaque', 'temps', 'state kB', 'compile')
NOTE = (
  'Ratios to the two gradients written by hand; "/ opaque" is bytes accessed as a ratio'
  ' to optax.contrib.sam in opaque mode; state is what the optimizer carries beyond'
  ' Adam alone. contrib.sam is plain SAM, and in transparent mode a step of training is'
  ' two calls: its FLOPs, bytes and time are the sum of both. Parameters and optimizer'
  ' state are donated. Times are medians of interleaved rounds; compiling includes'
  ' tracing. The ascent alone is over 100 million float32 numbers in 25 arrays; a pass'
  ' reads or writes as many bytes as they have.'
)


class Bar(NamedTuple):
  """An upper bound on a figure of this library's steps.

  Attributes:
    figure: the figure, a key of what :func:`weigh` returns.
    reference: the step whose figure it is divided by, or None for the figure itself.
    bound: the largest value allowed.
  """

  figure: str
  reference: str | None
  bound: float


BARS = (
  Bar('flops', steps.HAND, 1.01),
  Bar('temporaries', steps.HAND, 1.03),
  Bar('bytes', steps.OPAQUE, 1.02),
  Bar('state_beyond_adam', None, 1000),
)


def compile_step(
  step: steps.Step, problem: networks.Problem
) -> tuple[Any, dict[str, float]]:
  """The compiled step with XLA's figures for one step of training."""
  opt_state = step.tx.init(problem.params)
  adam_state = steps.STEPS['adam'](problem.loss).tx.init(problem.params)
  carry = (problem.params, opt_state)

  def lower():
    # Another function each time, to be traced again.
    run = lambda carry, batch: step.run(carry, batch)
    return jax.jit(run, donate_argnums=0).lower(carry, problem.batch)

  whole = lower()
  compiled = whole.compile()
  cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
  with ascent.usual_branch():
    usual = lower()
  # A step without this library has no other branch.
  same = usual.as_text() == whole.as_text()
  usual_cost = (compiled if same else usual.compile()).cost_analysis()
  if cost is None or usual_cost is None or memory is None:
    raise RuntimeError('This backend of JAX does not tell what a program costs.')
  return compiled, {
    'flops': step.calls * cost['flops'],
    'bytes': step.calls * usual_cost['bytes accessed'],
    'temporaries': memory.temp_size_in_bytes,
    'state': _nbytes(opt_state),
    'state_beyond_adam': _nbytes(opt_state) - _nbytes(adam_state),
  }


def compile_seconds(
  problem: networks.Problem, names: Sequence[str], rounds: int
) -> dict[str, float]:
  """Median seconds to trace and compile each step, in turns."""
  seconds: dict[str, list[float]] = {name: [] for name in names}
  for turn in range(rounds):
    for name in rotated(list(names), turn):
      step = steps.STEPS[name](problem.loss)
      carry = (problem.params, step.tx.init(problem.params))
      jax.clear_caches()
      start = time.perf_counter()
      jax.jit(step.run, donate_argnums=0).lower(carry, problem.batch).compile()
      seconds[name].append(time.perf_counter() - start)
  return {name: statistics.median(found) for name, found in seconds.items() if found}


def weigh(
  problem: networks.Problem,
  names: tuple[str, ...] = tuple(steps.STEPS),
  rounds: int = 0,
  compiles: int = 0,
) -> dict[str, dict[str, float]]:
  """Figures of each step of training by its name.

  Args:
    problem: the network whose step is weighed.
    names: keys of ``STEPS``.
    rounds: how many times every step is timed, in turns; 0 leaves the times out.
    compiles: how many times every step is compiled, in turns; 0 as well.

  Returns:
    For every name the bytes and operations that XLA counts, the bytes of the optimizer
    state, the seconds to trace and compile and, if ``rounds``, the median ``step_ms``.
  """
  figures, loops = {}, {}
  for name in names:
    step = steps.STEPS[name](problem.loss)
    compiled, figures[name] = compile_step(step, problem)
    loops[name] = steps.make_loop(compiled, step, problem.params, problem.batch)
  for name, time_of in (milliseconds(loops, rounds) if rounds else {}).items():
    figures[name]['step_ms'] = time_of
  for name, time_of in compile_seconds(problem, names, compiles).items():
    figures[name]['compile_s'] = time_of
  return figures


def check_bars(figures: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
  """What each bar comes to: step, figure, value, bound, and whether it holds."""
  rows = []
  for bar in BARS:
    for name in OURS:
      if name not in figures:
        continue
      unit = figures[bar.reference][bar.figure] if bar.reference else 1
      measured = figures[name][bar.figure] / unit
      holds = measured <= bar.bound
      rows.append({'step': name, **bar._asdict(), 'measured': measured, 'holds': holds})
  return rows


def main(argv: list[str] | None = None) -> int:
  """Measures, prints and writes; the exit status says whether all bars hold."""
  parser = make_parser('cost', __doc__)
  parser.add_argument('--quick', action='store_true', help='one tiny network, no bars')
  parser.add_argument('--rounds', type=int, default=15, help='times a step is timed')
  args = parser.parse_args(argv)
  rounds = min(args.rounds, 2) if args.quick else args.rounds
  compiles = 1 if args.quick else COMPILES
  problems = {}
  makers: dict[str, Callable[[], networks.Problem]] = (
    QUICK if args.quick else PROBLEMS | SMALLEST
  )
  with progress(len(makers) + 1) as tell:
    tell('the ascent alone')
    alone = ascent.weigh(rounds, *(QUICK_ASCENT if args.quick else ()))
    for name, make in makers.items():
      tell(name)
      problem = make()
      figures = weigh(problem, rounds=rounds, compiles=compiles)
      bars = check_bars(figures) if name in PROBLEMS and not args.quick else []
      count = sum(w.size for w in jax.tree.leaves(problem.params))
      problems[name] = {'parameters': count, 'figures': figures, 'bars': bars}
  settings = {
    'quick': args.quick,
    'rounds': rounds,
    'compiles': compiles,
    'donated': True,
  }
  results = {
    'environment': describe(),
    'settings': settings,
    'problems': problems,
    'ascent': alone,
  }
  publish(args.out / 'cost', results, report(results))
  return int(not all(bar['holds'] for p in problems.values() for bar in p['bars']))


def report(results: Mapping[str, Any]) -> Document:
  """A table for each network, in ratios to the step by hand, and the bars."""
  problems = results['problems'].items()
  parts: list[str | Table] = [_ascents(results['ascent'])]
  for name, problem in problems:
    parts += [_caption(name, problem), _table(problem['figures'])]
  bars = [_bar(name, bar) for name, problem in problems for bar in problem['bars']]
  head = ['network', 'step', 'figure', 'measured', 'at most', '']
  return [*parts, NOTE, *([Table('Bars', head, bars)] if bars else [])]


def _table(figures: Mapping[str, Mapping[str, float]]) -> Table:
  """The steps of one network."""
  timed = ['time'] if 'step_ms' in figures[steps.HAND] else []
  rows = []
  for name, f in figures.items():
    ratio = lambda figure, to=steps.HAND, f=f: f[figure] / figures[to][figure]
    row = [
      name,
      f'{ratio("flops"):.4f}',
      f'{ratio("bytes"):.4f}',
      f'{ratio("bytes", steps.OPAQUE):.4f}',
      f'{ratio("temporaries"):.4f}',
      f'{f["state_beyond_adam"] / 1000:,.2f}',
      f'{ratio("compile_s"):.2f}',
    ]
    rows.append(row + ([f'{ratio("step_ms"):.2f}'] if timed else []))
  return Table('', [*HEAD, *timed], rows)


def _ascents(found: Mapping[str, Mapping[str, float]]) -> Table:
  """The ascent alone, beside the same by hand."""
  head = ['ascent alone', 'passes', 'by hand', 'ratio', 'ms', 'by hand', 'ratio']
  rows = []
  for name, f in found.items():
    row = [name]
    for figure in ('passes', 'ms'):
      ours, by_hand = f[figure], f[f'{figure}_by_hand']
      row += [f'{ours:.2f}', f'{by_hand:.2f}', f'{ours / by_hand:.3f}']
    rows.append(row)
  return Table('', head, rows)


def _bar(name: str, bar: Mapping[str, Any]) -> list[str]:
  figure = ' / '.join(filter(None, (bar['figure'], bar['reference'])))
  measured, bound = f'{bar["measured"]:.6g}', f'{bar["bound"]:g}'
  return [
    name,
    bar['step'],
    figure,
    measured,
    bound,
    '' if bar['holds'] else 'EXCEEDED',
  ]


def _caption(name: str, problem: Mapping[str, Any]) -> str:
  hand = problem['figures'][steps.HAND]
  milliseconds = f', {hand["step_ms"]:.0f} ms per step' if 'step_ms' in hand else ''
  return (
    f'{name}: {problem["parameters"]:,} parameters; by hand'
    f' {hand["flops"] / 1e6:,.0f} MFLOP, {hand["bytes"] / 1e6:,.0f} MB accessed,'
    f' {hand["temporaries"] / 1e6:.1f} MB'
    f' temporaries, {hand["compile_s"]:.1f} s to compile{milliseconds}'
  )


def _nbytes(tree: Any) -> int:
  return sum(x.nbytes for x in jax.tree.leaves(tree))


if __name__ == '__main__':
  raise SystemExit(main())
