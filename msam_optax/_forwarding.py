"""Which outputs of a program are its inputs, handed back as they are."""

from collections.abc import Iterator
from typing import Any

from jax.extend import core

# Equations that run a program on their operands, and return what it returns.
_CALLS = frozenset(('jit', 'pjit', 'remat2', 'checkpoint', 'closed_call'))


def sources(jaxpr: core.Jaxpr) -> list[int | None]:
  """The position of the input that each output is, also through calls and loops.

  A transformed function hands back all that it gets, in arrays that are new to its
  caller. That those are the old ones only the program tells.

  Args:
    jaxpr: the program.

  Returns:
    A number for each output, or None where it may be another array.
  """
  source = {x: i for i, x in enumerate(jaxpr.invars)}
  for eqn in jaxpr.eqns:
    for output, i in _handed_back(eqn):
      operand = eqn.invars[i]
      if isinstance(operand, core.Var) and operand in source:
        source[eqn.outvars[output]] = source[operand]
  return [source.get(x) if isinstance(x, core.Var) else None for x in jaxpr.outvars]


def _handed_back(eqn: core.JaxprEqn) -> Iterator[tuple[int, int]]:
  """The outputs of an equation that are operands of it, with their positions."""
  is_loop = eqn.primitive.name == 'scan'
  inner: Any = eqn.params.get('jaxpr', eqn.params.get('call_jaxpr'))
  if inner is None or not (is_loop or eqn.primitive.name in _CALLS):
    return
  inner = getattr(inner, 'jaxpr', inner)
  for output, i in enumerate(sources(inner)):
    if i is not None and (not is_loop or _same_in_loop(output, i, eqn, inner)):
      yield output, i


def _same_in_loop(output, i, eqn, inner):
  """Whether what a turn hands back makes that of the whole loop.

  Operands are constants, what is carried, and what is read row by row; results are what
  is carried, and what is written row by row.
  """
  read, written = (
    sum(_rank(x) != _rank(y) for x, y in zip(whole, turn, strict=True))
    for whole, turn in ((eqn.invars, inner.invars), (eqn.outvars, inner.outvars))
  )
  carried = len(eqn.outvars) - written
  if output < carried:
    return i == len(eqn.invars) - read - carried + output
  return i >= len(eqn.invars) - read


def _rank(x):
  return len(getattr(x.aval, 'shape', ()))
