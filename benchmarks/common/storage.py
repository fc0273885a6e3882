"""Results on disk: whole or not at all, and nothing that is there is computed again."""

from collections.abc import Callable
from collections.abc import Mapping
import hashlib
import json
import os
from pathlib import Path
import time
from typing import Any

WIDTH = 1000  # of a line of JSON: a row of a table has one
CLOCKS = ('seconds', 'cpu_seconds')


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
  """Lets ``write`` fill a file that appears at ``path`` complete or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f'{path.name}.{os.getpid()}.part')
  write(part)
  part.replace(path)


def write_text(path: Path, text: str) -> None:
  """Writes text, whole or not at all."""
  write_whole(path, lambda part: part.write_text(text, encoding='utf-8'))


def write_json(path: Path, value: Any) -> None:
  """Writes JSON, whole or not at all; what fits into a line has one."""
  write_text(path, _pretty(value) + '\n')


def _pretty(value: Any, indent: str = '') -> str:
  line = json.dumps(value)
  if len(indent) + len(line) <= WIDTH or not isinstance(value, Mapping | list | tuple):
    return line
  inner = indent + ' '
  if isinstance(value, Mapping):
    parts = [f'{json.dumps(str(k))}: {_pretty(v, inner)}' for k, v in value.items()]
  else:
    parts = [_pretty(item, inner) for item in value]
  opening, closing = '{}' if isinstance(value, Mapping) else '[]'
  return f'{opening}\n{inner}' + f',\n{inner}'.join(parts) + f'\n{indent}{closing}'


def folder_for(parent: Path, name: str, settings: Mapping[str, Any]) -> Path:
  """The folder of the runs with these settings; other settings have another one.

  Args:
    parent: where the folders are; is made, and hidden from git.
    name: begins the folder's name.
    settings: all that a run depends on besides its own place on the grid.

  Returns:
    The folder, which exists.
  """
  text = json.dumps(settings, sort_keys=True)
  folder = parent / f'{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}'
  folder.mkdir(parents=True, exist_ok=True)
  (parent / '.gitignore').write_text('*\n')
  write_text(folder / 'settings.json', json.dumps(settings, indent=2) + '\n')
  return folder


def run_once(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
  """What is stored at ``path``; if nothing is, what ``compute`` returns, stored there.

  Added to it are the ``CLOCKS``: seconds by the clock and of processor time.
  """
  if not path.exists():
    wall, cpu = time.perf_counter(), time.process_time()
    result = compute()
    took = (time.perf_counter() - wall, time.process_time() - cpu)
    text = json.dumps({**result, **dict(zip(CLOCKS, took, strict=True))})
    write_text(path, text + '\n')
  return json.loads(path.read_text())
