"""Times of several things in turns, and what they come to."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import math
import statistics
import time
import traceback
from typing import NamedTuple

import numpy as np

WARM_UP = 2  # rounds that are not counted
LEAST = 3  # rounds that are counted even if the time is over


class Timing(NamedTuple):
  """What was timed, and what could not be.

  Attributes:
    seconds: for every name one time per round; all lists are of the same length.
    failures: for every name that raised, what :func:`explain` says of it.
  """

  seconds: dict[str, list[float]]
  failures: dict[str, dict[str, str]]


def time_in_turns(
  loops: dict[str, Callable[[], None]],
  *,
  rounds: int,
  left: Callable[[], float] = lambda: math.inf,
) -> Timing:
  """Times each loop once a round, so that a slow moment hits them all.

  Args:
    loops: functions that return when the device has finished. Those that raise (out
      of memory, say) are deleted from the dict, and with them the arrays they hold.
    rounds: how many rounds count; two more go before, to warm up.
    left: the seconds left; when it is negative, no further round begins.

  Returns:
    A :class:`Timing`.
  """
  failures = {}
  seconds: dict[str, list[float]] = {name: [] for name in loops}
  for turn in range(WARM_UP + rounds):
    if turn >= WARM_UP + LEAST and left() < 0:
      break
    for name in rotated(list(loops), turn):
      start = time.perf_counter()
      try:
        loops[name]()
      except Exception as error:
        failures[name] = explain(error)
        del loops[name], seconds[name]
        continue
      if turn >= WARM_UP:
        seconds[name].append(time.perf_counter() - start)
  return Timing(seconds, failures)


def milliseconds(
  loops: Mapping[str, Callable[[], None]], rounds: int, steps: int = 1
) -> dict[str, float]:
  """Median milliseconds per step, of loops that take ``steps`` and must not raise."""
  timing = time_in_turns(dict(loops), rounds=rounds)
  if timing.failures:
    raise RuntimeError(f'Not timed: {timing.failures}')
  return {
    name: 1000 * statistics.median(seconds) / steps
    for name, seconds in timing.seconds.items()
  }


def rotated(names: list[str], turn: int) -> list[str]:
  """Another one begins in every round."""
  start = turn % max(len(names), 1)
  return names[start:] + names[:start]


def spread(values: np.ndarray | Sequence[float]) -> dict[str, float]:
  """Median and quartiles."""
  low, median, high = np.percentile(values, [25, 50, 75])
  return {'median': float(median), 'q25': float(low), 'q75': float(high)}


def explain(error: Exception) -> dict[str, str]:
  """An exception as strings, which unlike itself keep no arrays alive."""
  text = f'{type(error).__name__}: {error}'[:2000]
  if 'RESOURCE_EXHAUSTED' in text or 'out of memory' in text.lower():
    return {'failed': 'out of memory', 'message': text}
  where = ''.join(traceback.format_exception(error))[-4000:]
  return {'failed': 'error', 'message': text, 'traceback': where}
