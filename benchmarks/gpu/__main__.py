"""Is it right on a GPU, and what does it cost there?

Run `python -m benchmarks.gpu` on a machine with one GPU, from the root of a clone; JAX,
Optax and Flax are all it needs. In less than eight minutes it

* compares ascents and two-pass gradients with float64 in NumPy,
* times the ascent alone beside a copy of the same arrays, and
* weighs and times the steps of training of a transformer and a ResNet-18.

Results are written after every part. The exit status is 1 if a comparison failed or
something raised (other than for want of memory, which is a result), 2 without a GPU.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import functools
import os
from pathlib import Path
import subprocess
import time
from typing import Any

import jax

from benchmarks.common.command import make_parser
from benchmarks.common.environment import describe
from benchmarks.common.environment import version
from benchmarks.common.steps import HAND
from benchmarks.common.timing import explain
from benchmarks.gpu import ascent as gpu_ascent
from benchmarks.gpu import checks as gpu_checks
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu import steps as gpu_steps
from benchmarks.gpu.steps import COMPILE_ONCE

FULL = {
  'checks': {'many': gpu_checks.MANY},
  'ascent': dict(width=1024, layers=16, vocabulary=50304, rounds=20, repeats=10),
  'transformer': dict(
    vocabulary=8192, length=512, width=1024, layers=8, heads=16, batch=16
  ),
  'resnet': dict(
    size=224, width=64, stages=(2, 2, 2, 2), classes=1000, groups=32, batch=128
  ),
  'steps': dict(names=None, rounds=10, repeats=3, reserve=20.0),
}
SMOKE = {
  'checks': {'many': 2**12},
  'ascent': dict(width=16, layers=1, vocabulary=32, rounds=2, repeats=1),
  'transformer': dict(vocabulary=16, length=8, width=8, layers=2, heads=2, batch=2),
  'resnet': dict(size=16, width=4, stages=(1,), classes=4, groups=2, batch=2),
  'steps': dict(names=(HAND, COMPILE_ONCE), rounds=2, repeats=1, reserve=0.0),
}
CARD = ('name', 'driver_version', 'memory.total', 'power.limit', 'clocks.max.sm')
PACKAGES = ('jax-cuda12-plugin', 'jax-cuda13-plugin', 'nvidia-cudnn-cu12')
Part = Callable[[Callable[[], float]], Iterator[dict[str, Any]]]


def parts(settings: Mapping[str, Any]) -> dict[str, Part]:
  """What is measured, in order: each takes the seconds left, and yields results."""

  def steps(name: str, dtype: str) -> Part:
    make = functools.partial(network, name, dtype, settings[name])
    return lambda left: gpu_steps.weigh(make, left=left, say=say, **settings['steps'])

  return {
    'correctness': lambda left: checks(left=left, **settings['checks']),
    'ascent': lambda left: gpu_ascent.measure(left=left, **settings['ascent']),
    'transformer, bfloat16 arithmetic': steps('transformer', 'bfloat16'),
    'ResNet-18, bfloat16 arithmetic': steps('resnet', 'bfloat16'),
    'transformer, float32': steps('transformer', 'float32'),
    'ResNet-18, float32': steps('resnet', 'float32'),
  }


def network(name: str, dtype: str, sizes: Mapping[str, Any]) -> Any:
  """A network and its loss. Only here is Flax needed."""
  from benchmarks.gpu import models as gpu_models

  problem = getattr(gpu_models, name)(**sizes)
  return gpu_models.in_bfloat16(problem) if dtype == 'bfloat16' else problem


def checks(many: int, left: Callable[[], float]) -> Iterator[dict[str, Any]]:
  """The comparisons; a failure is printed at once."""
  found, unfinished = [], {}
  for check in gpu_checks.run_checks(many):
    if left() <= 0:
      unfinished = gpu_steps.SKIPPED
      break
    found.append(check._asdict() | {'passed': check.passed})
    if not check.passed:
      say(f'  FAILED {gpu_report.failure(found[-1])}')
  held = sum(check['passed'] for check in found)
  say(f'  {held} of {len(found)} comparisons hold')
  yield {'checks': found} | unfinished


def main(argv: list[str] | None = None) -> int:
  """Measures what there is time for; returns the exit status."""
  parser = make_parser('gpu', __doc__)
  parser.add_argument('--smoke', action='store_true', help='tiny sizes, on any device')
  parser.add_argument('--budget', type=float, default=450, help='seconds in all')
  args = parser.parse_args(argv)
  end = time.perf_counter() + args.budget
  left = lambda: end - time.perf_counter()
  if jax.default_backend() == 'cpu' and not args.smoke:
    say('There is no GPU here: JAX runs on the CPU. (--smoke runs tiny sizes on it.)')
    return 2
  settings = SMOKE if args.smoke else FULL
  results = {
    'environment': describe() | describe_gpu(),
    'settings': settings
    | {'smoke': args.smoke, 'budget': args.budget, 'donated': True}
    | {
      # Options of JAX are attributes only at run time.
      'matmul_precision': str(jax.config.jax_default_matmul_precision),  # pyright: ignore
      'XLA_FLAGS': os.environ.get('XLA_FLAGS', ''),
    },
    'parts': {},
  }
  say(f'{results["environment"]["device"]}; results go to {args.out}')
  for name, part in parts(settings).items():
    say(f'[{args.budget - left():.0f} s] {name}')
    if left() <= 0:
      results['parts'][name] = gpu_steps.SKIPPED
      say(f'  {gpu_steps.said(gpu_steps.SKIPPED)}')
    else:
      run_part(name, part, left, results, args.out)
    results['skipped'] = [' '.join(path) for path in failed(results, 'skipped')]
    gpu_report.write(results, args.out)
  say('\n' + gpu_report.write(results, args.out))
  wrong = [*complaints(results)]
  for name in results['skipped']:
    say(f'skipped: {name}')
  for line in [*wrong, f'{args.budget - left():.0f} s, {len(wrong)} complaints']:
    say(line)
  return int(bool(wrong))


def run_part(
  name: str,
  part: Part,
  left: Callable[[], float],
  results: dict[str, Any],
  folder: Path,
) -> None:
  """Runs a part and writes what it yields; what it raises is also a result."""
  try:
    for so_far in part(left):
      results['parts'][name] = so_far
      gpu_report.write(results, folder)
  except Exception as error:
    failure = explain(error)
    results['parts'][name] = results['parts'].get(name, {}) | failure
    say(f'  {gpu_steps.said(failure)}')


def complaints(results: Mapping[str, Any]) -> Iterator[str]:
  """What makes the exit status 1: each failed comparison, and each error."""
  for part in results['parts'].values():
    for check in part.get('checks', []):
      if not check['passed']:
        yield f'FAILED {gpu_report.failure(check)}'
  for path, figures in failed(results, 'error').items():
    yield f'FAILED {" ".join(path)}: {gpu_steps.said(figures)}'


def failed(results: Mapping[str, Any], how: str) -> dict[tuple[str, ...], Any]:
  """The parts, and what is in them, that failed in a way, by their names."""
  found = {}
  for name, part in results['parts'].items():
    inside = part.get('steps', {}) | part.get('operations', {})
    named = {(name,): part} | {(name, entry): f for entry, f in inside.items()}
    found |= {path: f for path, f in named.items() if f.get('failed') == how}
  return found


def describe_gpu() -> dict[str, str]:
  """Card, driver and CUDA, as far as they can be found out."""
  device = jax.devices()[0]
  client = getattr(device, 'client', None)
  found = {'backend': ' '.join(str(getattr(client, 'platform_version', '')).split())}
  for package in PACKAGES:
    if (installed := version(package)) != 'not installed':
      found[package] = installed
  query = ['nvidia-smi', f'--query-gpu={",".join(CARD)}', '--format=csv,noheader']
  try:
    answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
    found |= dict(zip(CARD, answer.stdout.split('\n')[0].split(', '), strict=True))
  except (OSError, ValueError, subprocess.SubprocessError):
    pass  # no such program, or one that says something else
  return found


def say(line: str) -> None:
  """Prints at once, also into a file."""
  print(line, flush=True)


if __name__ == '__main__':
  raise SystemExit(main())
