"""The results of `benchmarks.gpu` as JSON and as Markdown tables."""

from collections.abc import Iterator
from collections.abc import Mapping
import math
from pathlib import Path
from typing import Any

from benchmarks.common.storage import write_json
from benchmarks.common.storage import write_text
from benchmarks.common.tables import markdown
from benchmarks.common.tables import Table

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
  ' and parameters, write the probe. ratio: to the speed of the copy of as many arrays,'
  ' round by round. All overwrite their arrays, many times in one program.'
)


def write(results: Mapping[str, Any], folder: Path) -> str:
  """Writes `gpu.json` and `gpu.md`, neither of which is ever half there.

  Returns:
    What is in `gpu.md`.
  """
  text = markdown([*report(results)])
  write_json(folder / 'gpu.json', strict(results))
  write_text(folder / 'gpu.md', text)
  return text


def report(results: Mapping[str, Any]) -> Iterator[str | Table]:
  """Where it was measured, and a table for every part."""
  yield ', '.join(f'{k} {v}' for k, v in results['environment'].items())
  for name, part in results['parts'].items():
    yield f'**{name}**'
    if 'failed' in part:
      yield f'{part["failed"]}: {part["message"].splitlines()[0]}'
    for key, tables in TABLES.items():
      if key in part:
        yield from tables(part)


def check_tables(part: Mapping[str, Any]) -> Iterator[str | Table]:
  """The worst of every kind of comparison, and each that failed."""
  worst: dict[str, Mapping[str, Any]] = {}
  share = lambda check: check['error'] / check['tolerance'] if check['tolerance'] else 0
  for check in part['checks']:
    kind = check['name'].split(':')[0]
    if check['passed'] and share(check) >= share(worst.get(kind, check)):
      worst[kind] = check
  failed = [check for check in part['checks'] if not check['passed']]
  yield f'{len(part["checks"]) - len(failed)} of {len(part["checks"])} hold.'
  if failed:
    yield '\n'.join(f'- **FAILED** {failure(check)}' for check in failed)
  numbers = lambda check: [f'{check[key]:.1e}' for key in ('error', 'tolerance')]
  rows = [[check['name'], *numbers(check)] for check in worst.values()]
  yield Table('', ['worst of', 'error', 'allowed'], rows)


def failure(check: Mapping[str, Any]) -> str:
  """Which check failed, and by how much."""
  if check['message']:
    return f'{check["name"]}: {check["message"].splitlines()[0]}'
  return f'{check["name"]}: off by {check["error"]:.3g}, allowed {check["tolerance"]:g}'


def step_tables(part: Mapping[str, Any]) -> Iterator[str | Table]:
  """The steps of a network."""
  yield f'{part["parameters"]:,} parameters, {part["items"]:,} labels per step'
  rows = []
  for name, f in part['steps'].items():
    cells = [f.get('failed', ''), '', '']
    if 'ms' in f:
      rate = part['items'] / f['ms']['median'] * 1000
      cells = [between(f['ms'], '.2f'), between(f.get('ratio'), '.3f'), f'{rate:,.0f}']
    sizes = [gigabytes(f.get('memory', {}).get(k)) for k in ('temp', 'total')]
    seconds = f'{f["compile_s"]:.1f}' if 'compile_s' in f else ''
    rows.append([name, *cells, *sizes, seconds])
  head = ['step', 'ms', 'ratio', 'labels/s', 'temporaries GB', 'total GB', 'compile s']
  yield Table('', head, rows)
  if peak := part.get('memory_stats', {}).get('peak_bytes_in_use'):
    yield f'Most memory in use by the process so far: {gigabytes(peak)} GB.'
  yield STEP_NOTE


def ascent_tables(part: Mapping[str, Any]) -> Iterator[str | Table]:
  """The ascent beside copies."""
  yield f'{part["bytes"] / 1e9:.3f} GB of float32 parameters in {part["leaves"]} arrays'
  rows = []
  for name, f in part['operations'].items():
    cells = [f.get('failed', ''), '', '']
    if 'ms' in f:
      cells = [
        between(f['ms'], '.3f'),
        between(f['GB_per_s'], ',.0f'),
        between(f.get('ratio'), '.3f'),
      ]
    rows.append([name, *cells, gigabytes(f.get('memory', {}).get('temp'))])
  head = ['operation', 'ms', 'GB/s', 'ratio to the copy', 'temporaries GB']
  yield Table('', head, rows)
  yield ASCENT_NOTE


TABLES = {'checks': check_tables, 'operations': ascent_tables, 'steps': step_tables}


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
