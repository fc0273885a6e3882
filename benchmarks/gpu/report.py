"""The results of `benchmarks.gpu` as JSON and as Markdown tables."""

from collections.abc import Iterator
from collections.abc import Mapping
import json
import math
import os
from pathlib import Path
from typing import Any

STEP_NOTE = (
  'ms: the median of interleaved rounds, with quartiles; ratio: to the two gradients'
  ' written by hand, round by round. GB: XLA’s figures for the compiled step, with'
  ' parameters and optimizer state donated; total is arguments, outputs and'
  ' temporaries together. The first step’s time to compile has the autotuning in it'
  ' from which the others profit.'
)
ASCENT_NOTE = (
  'GB/s: the bytes of the ideal over the time. The ideal of a copy is 2 times the bytes'
  ' of the arrays, that of the ascent 4: read the gradient for the norm, then gradient'
  ' and parameters, write the probe. ratio: of these speeds, round by round.'
)


def write(results: Mapping[str, Any], folder: Path) -> None:
  """Writes `gpu.json` and `gpu.md`, each at once, so that none is ever half there."""
  folder.mkdir(parents=True, exist_ok=True)
  texts = {
    'gpu.json': json.dumps(strict(results), indent=2, allow_nan=False) + '\n',
    'gpu.md': markdown(results),
  }
  for name, text in texts.items():
    part = folder / f'{name}.part'
    part.write_text(text, encoding='utf-8')
    os.replace(part, folder / name)


def markdown(results: Mapping[str, Any]) -> str:
  """Where it was measured, and a table for every part."""
  lines = [', '.join(f'{k} {v}' for k, v in results['environment'].items()), '']
  for name, part in results['parts'].items():
    lines += [f'**{name}**', '']
    if 'failed' in part:
      lines += [f'{part["failed"]}: {part["message"].splitlines()[0]}', '']
    for key, table in TABLES.items():
      if key in part:
        lines += [*table(part), '']
  return '\n'.join(lines)


def check_lines(part: Mapping[str, Any]) -> Iterator[str]:
  """The worst of every kind of comparison, and each that failed."""
  worst: dict[str, Mapping[str, Any]] = {}
  share = lambda check: check['error'] / check['tolerance'] if check['tolerance'] else 0
  for check in part['checks']:
    kind = check['name'].split(':')[0]
    if check['passed'] and share(check) >= share(worst.get(kind, check)):
      worst[kind] = check
  failed = [check for check in part['checks'] if not check['passed']]
  yield f'{len(part["checks"]) - len(failed)} of {len(part["checks"])} hold.'
  yield ''
  for check in failed:
    yield f'- **FAILED** {failure(check)}'
  yield from (
    *([''] if failed else []),
    '| worst of | error | allowed |',
    '| --- | ---: | ---: |',
  )
  for check in worst.values():
    yield f'| {check["name"]} | {check["error"]:.1e} | {check["tolerance"]:.1e} |'


def failure(check: Mapping[str, Any]) -> str:
  """Which check failed, and by how much."""
  if check['message']:
    return f'{check["name"]}: {check["message"].splitlines()[0]}'
  return f'{check["name"]}: off by {check["error"]:.3g}, allowed {check["tolerance"]:g}'


def step_lines(part: Mapping[str, Any]) -> Iterator[str]:
  """The steps of a network."""
  yield f'{part["parameters"]:,} parameters, {part["items"]:,} labels a step'
  yield ''
  yield '| step | ms | ratio | labels/s | temporaries GB | total GB | compile s |'
  yield '| --- | ---: | ---: | ---: | ---: | ---: | ---: |'
  for name, f in part['steps'].items():
    cells = [f.get('failed', ''), '', '']
    if 'ms' in f:
      rate = part['items'] / f['ms']['median'] * 1000
      cells = [between(f['ms'], '.2f'), between(f.get('ratio'), '.3f'), f'{rate:,.0f}']
    sizes = [gigabytes(f.get('memory', {}).get(k)) for k in ('temp', 'total')]
    seconds = f'{f["compile_s"]:.1f}' if 'compile_s' in f else ''
    yield f'| {" | ".join([name, *cells, *sizes, seconds])} |'
  if peak := part.get('memory_stats', {}).get('peak_bytes_in_use'):
    yield ''
    yield f'Most memory in use by the process so far: {gigabytes(peak)} GB.'
  yield ''
  yield STEP_NOTE


def ascent_lines(part: Mapping[str, Any]) -> Iterator[str]:
  """The ascent beside copies."""
  yield f'{part["bytes"] / 1e9:.3f} GB of float32 parameters in {part["leaves"]} arrays'
  yield ''
  yield '| operation | ms | GB/s | ratio to the copy | temporaries GB |'
  yield '| --- | ---: | ---: | ---: | ---: |'
  for name, f in part['operations'].items():
    cells = [f.get('failed', ''), '', '']
    if 'ms' in f:
      cells = [
        between(f['ms'], '.3f'),
        between(f['GB_per_s'], ',.0f'),
        between(f.get('ratio'), '.3f'),
      ]
    size = gigabytes(f.get('memory', {}).get('temp'))
    yield f'| {" | ".join([name, *cells, size])} |'
  yield ''
  yield ASCENT_NOTE


TABLES = {'checks': check_lines, 'operations': ascent_lines, 'steps': step_lines}


def between(values: Mapping[str, float] | None, form: str) -> str:
  """A median with its quartiles."""
  if values is None:
    return ''
  low, median, high = (format(values[k], form) for k in ('q25', 'median', 'q75'))
  return f'{median} ({low}–{high})'


def gigabytes(size: int | None) -> str:
  """Bytes, in GB."""
  return '' if size is None else f'{size / 1e9:.3f}'


def strict(tree: Any) -> Any:
  """What JSON can say: NaN and infinity as strings."""
  if isinstance(tree, Mapping):
    return {str(k): strict(v) for k, v in tree.items()}
  if isinstance(tree, list | tuple):
    return [strict(v) for v in tree]
  if isinstance(tree, float) and not math.isfinite(tree):
    return str(tree)
  return tree
