"""What a compiled program executes, read from its text: operations, loops, messages.

XLA's own cost analysis counts the body of a loop once, however often it runs, and says
nothing of what devices send each other. Both stand in the optimised program: this
module finds how often every computation is executed, and counts matrix products,
bytes at the boundaries of fusions, and collectives as often as they happen.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import math
import re
from typing import NamedTuple

import numpy as np

_ITEMSIZE = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2}
_ITEMSIZE |= {'f32': 4, 's32': 4, 'u32': 4, 'f64': 8, 's64': 8, 'u64': 8, 'c64': 8}
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\]')
_LAYOUT = re.compile(r'(?<=\])\{[^{}]*\}|/\*.*?\*/')
_HEAD = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\{$')
_OP = re.compile(
  r'\s*(ROOT )?%?([\w.\-]+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([\w\-]+)\(([^()]*)\)(.*)'
)
_CALLED = re.compile(
  r'(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)'
)
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
# Nothing is read or written by these, or it is counted where it is done.
_FREE = {'parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast', 'while'}
_FREE |= {'call', 'conditional', 'after-all', 'partition-id', 'replica-id', 'iota'}
COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)

Shape = tuple[str, tuple[int, ...]]


class Op(NamedTuple):
  """One instruction: its name, operation, arrays of the result, operands, the rest."""

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  rest: str
  is_root: bool


class Program(NamedTuple):
  """The computations of a program by name, and how often each is executed.

  Attributes:
    computations: the instructions of each, by name.
    times: executions of each; those inside a fusion are the fusion's.
    fused: names of those that are inside a fusion or a reduction.
  """

  computations: Mapping[str, Mapping[str, Op]]
  times: Mapping[str, int]
  fused: frozenset[str]


class Collective(NamedTuple):
  """A message between devices.

  Attributes:
    kind: one of ``COLLECTIVES``.
    bytes: of the array on each device: what is gathered, summed or sent.
    times: how often it happens in a step.
    groups: the devices, by number, of each group that sends among itself; of a
      permutation pairs of sender and receiver.
  """

  kind: str
  bytes: int
  times: int
  groups: tuple[tuple[int, ...], ...]


def read(text: str) -> Program:
  """Reads a compiled program, ``compiled.as_text()``.

  Raises:
    ValueError: if the number of times that a loop runs cannot be read.
  """
  computations, entry, current = {}, '', None
  for line in text.splitlines():
    line = _LAYOUT.sub('', line)
    if current is None:
      if head := _HEAD.match(line):
        current = computations.setdefault(head[2], {})
        entry = head[2] if head[1] else entry
    elif line.startswith('}'):
      current = None
    elif op := _OP.match(line):
      operands = tuple(x.strip().split('%')[-1] for x in op[5].split(',') if x.strip())
      shapes = _shapes(op[3])
      current[op[2]] = Op(op[2], op[4], shapes, operands, op[6], op[1] is not None)
  times = dict.fromkeys(computations, 0)
  fused: set[str] = set()
  _execute(computations, entry, 1, times, fused)
  return Program(computations, times, frozenset(fused))


def collectives(program: Program) -> list[Collective]:
  """Every message of a step; the parts of an asynchronous one count once.

  Raises:
    ValueError: if the groups of devices of a message cannot be read.
  """
  found: dict[tuple[str, str], Collective] = {}
  for name, op in _executed(program):
    kind = op.opcode.removesuffix('-start')
    if kind not in COLLECTIVES:
      continue
    sent = sum(map(_nbytes, _operand_shapes(program.computations[name], op)))
    if kind == 'all-gather':
      both = sum(map(_nbytes, op.shapes))
      # The result of the start includes its operands.
      sent = both if kind == op.opcode else both - sent
    # An asynchronous one is a chain of fusions that show it again and again.
    chained = re.search(r'channel_id=\d+(?=.*chain_id=)', op.rest)
    key = (kind, chained[0] if chained else f'{name}/{op.name}')
    times = max(program.times[name], found[key].times if key in found else 0)
    found[key] = Collective(kind, sent, times, _groups(op.rest))
  return list(found.values())


def matrix_flops(program: Program, *, loops: bool = True) -> float:
  """FLOPs of all matrix products and convolutions.

  Args:
    program: the program.
    loops: whether bodies of loops count as often as they run, or once, as in XLA's
      analysis.

  Returns:
    Two for each multiplication that is added up.
  """
  flops = 0.0
  for name, op in _executed(program):
    if op.opcode in ('convolution', 'dot'):
      ops = program.computations[name]
      lhs, rhs = (shape[1] for shape in _operand_shapes(ops, op))
      count = _dot if op.opcode == 'dot' else _convolution
      once = 2.0 * count(lhs, rhs, op.shapes[0][1], op.rest)
      flops += once * (program.times[name] if loops else 1)
  return flops


def boundary_bytes(program: Program, *, loops: bool = True) -> float:
  """Bytes that operations outside of fusions read and write; ``loops`` as above."""
  total = 0.0
  for name, op in _executed(program):
    if name in program.fused or op.opcode in _FREE or op.opcode.endswith('-done'):
      continue
    shapes = (*op.shapes, *_operand_shapes(program.computations[name], op))
    total += sum(map(_nbytes, shapes)) * (program.times[name] if loops else 1)
  return total


def _groups(rest):
  """The groups of devices of a message, in any of the ways that XLA writes them."""
  if listed := re.search(r'(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}', rest):
    rows = re.findall(r'\{([\d,]*)\}', listed[1])
    return tuple(tuple(int(x) for x in row.split(',')) for row in rows)
  numbers = lambda text: [int(x) for x in text.split(',')]
  iota = r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?'
  if found := re.search(iota, rest):
    shape = numbers(found[2])
    order = numbers(found[3]) if found[3] else range(len(shape))
    ids = np.arange(math.prod(shape)).reshape(shape).transpose(order)
    return tuple(map(tuple, ids.reshape(numbers(found[1])).tolist()))
  named = r'replica_groups=mesh\[([^\]]+)\] *\{([^}:]*)\}(?!.*device_ids=\()'
  if found := re.search(named, rest):
    axes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", found[1])}
    over = re.findall(r"'(\w+)'", found[2])
    ids = np.arange(math.prod(axes.values())).reshape(*axes.values())
    ids = np.moveaxis(ids, [list(axes).index(x) for x in over], range(-len(over), 0))
    size = math.prod(axes[name] for name in over)
    return tuple(map(tuple, ids.reshape(-1, size).tolist()))
  unknown = re.search(r'replica_groups=(?!\{\}).*', rest)
  if unknown:
    raise ValueError(f'This notation of groups is not known: {unknown[0]}')
  return ()


def _executed(program: Program) -> Iterator[tuple[str, Op]]:
  for name, ops in program.computations.items():
    if program.times[name]:
      for op in ops.values():
        yield name, op


def _execute(computations, name, times, counted, fused):
  """Adds executions of a computation, and so of those that it calls."""
  counted[name] += times
  for op in computations[name].values():
    called = dict(_CALLED.findall(op.rest))
    if op.opcode == 'while':
      known = re.search(r'"known_trip_count":\{"n":"(\d+)"', op.rest)
      trips = int(known[1]) if known else _trips(computations, called)
      _execute(computations, called['body'], times * trips, counted, fused)
      continue
    inner = list(called.values())
    if branches := _BRANCHES.search(op.rest):
      inner += [x.strip().lstrip('%') for x in branches[1].split(',')]
    if op.opcode == 'conditional':
      inner = [x for x in inner if _has_nothing_to_do(computations[x])] or inner
    for target in inner:
      if op.opcode not in ('call', 'conditional') or name in fused:
        fused.add(target)
      _execute(computations, target, times, counted, fused)


def _has_nothing_to_do(ops):
  """Whether a branch hands on what it gets: the other one hardly ever runs."""
  return all(op.opcode in _FREE or op.opcode.startswith('copy') for op in ops.values())


def _trips(computations, called):
  """How often a loop ``for (i = 0; i < bound; i += step)`` runs."""
  try:
    ops = computations[called['condition']]
    root = next(op for op in ops.values() if op.is_root)
    counter, bound = (ops[x] for x in root.operands)
    index = re.findall(r'index=(\d+)', counter.rest)[0]
    ops = computations[called['body']]
    result = next(op for op in ops.values() if op.is_root)
    parts = [ops[x] for x in ops[result.operands[int(index)]].operands]
    step = next(int(op.operands[0]) for op in parts if op.opcode == 'constant')
    if 'direction=LT' not in root.rest or bound.opcode != 'constant':
      raise ValueError(root)
    return math.ceil(int(bound.operands[0]) / step)
  except (KeyError, ValueError, TypeError, StopIteration, IndexError) as error:
    raise ValueError(
      f'The loop with the body {called["body"]!r} does not count up to a constant.'
    ) from error


def _shapes(text):
  return tuple(
    (kind, tuple(int(n) for n in dims.split(',') if n))
    for kind, dims in _ARRAY.findall(text)
  )


def _operand_shapes(ops, op):
  return [shape for x in op.operands if x in ops for shape in ops[x].shapes]


def _nbytes(shape: Shape) -> int:
  kind, dims = shape
  return _ITEMSIZE.get(kind, 1) * math.prod(dims)


def _dot(lhs, rhs, out, rest):
  del rhs
  contracted = re.findall(r'lhs_contracting_dims=\{([\d,]*)\}', rest)[0]
  return math.prod(out) * math.prod(lhs[int(i)] for i in contracted.split(',') if i)


def _convolution(lhs, rhs, out, rest):
  """Multiplications of a convolution: only those that do not meet padding or gaps."""
  labels = re.findall(r'dim_labels=(\w+)_(\w+)->(\w+)', rest)[0]
  left, right, result = (dict(zip(s, range(9), strict=False)) for s in labels)
  window = re.search(r'window=\{([^}]*)\}', rest)
  window = dict(x.split('=') for x in window[1].split()) if window else {}
  count = out[result['b']] * out[result['f']] * rhs[right['i']]
  for i in (name for name in left if name.isdigit()):
    count *= _meetings(
      lhs[left[i]],
      rhs[right[i]],
      out[result[i]],
      **{key: value.split('x')[int(i)] for key, value in window.items()},
    )
  return count


def _meetings(n, k, m, *, pad='0_0', stride='1', lhs_dilate='1', rhs_dilate='1', **_):
  """How many pairs of an output and a weight along an axis meet an input."""
  low = int(pad.split('_')[0])
  at = np.arange(m)[:, None] * int(stride) + np.arange(k) * int(rhs_dilate) - low
  gap = int(lhs_dilate)
  return int(np.sum((at % gap == 0) & (at >= 0) & (at // gap < n)))
