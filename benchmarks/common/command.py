"""The command line of a benchmark, and what it leaves behind.

Results go to `benchmarks/out`, which git ignores; `--out benchmarks/results` replaces
those that are committed.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.storage import write_json
from benchmarks.common.storage import write_text
from benchmarks.common.tables import Document
from benchmarks.common.tables import markdown

OUT = Path(__file__).parents[1] / 'out'


def make_parser(name: str, about: str | None) -> argparse.ArgumentParser:
  """The parser of `python -m benchmarks.NAME`, with the option `--out`."""
  parser = argparse.ArgumentParser(
    prog=f'python -m benchmarks.{name}',
    description=about,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--out', type=Path, default=OUT, help='where results go')
  return parser


def publish(stem: Path, results: Mapping[str, Any], document: Document) -> None:
  """Writes numbers and tables beside the pictures, prints the tables, names the files.

  Args:
    stem: path of the files without their suffix.
    results: the numbers, written as JSON.
    document: the tables, written as Markdown.
  """
  from benchmarks.common.terminal import show  # Rich is not needed to begin.

  write_json(stem.with_suffix('.json'), results)
  write_text(stem.with_suffix('.md'), markdown(document))
  show(document)
  for path in sorted(stem.parent.glob(f'{stem.name}*.*')):
    print(f'Written: {path}')
