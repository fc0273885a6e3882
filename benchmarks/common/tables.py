"""Results as text: paragraphs and tables, in Markdown.

A document is a sequence of paragraphs and tables, in their order. It is made once and
both written (`markdown`) and printed (`benchmarks.common.terminal.show`).
"""

from collections.abc import Sequence
from typing import NamedTuple


class Table(NamedTuple):
  """A table of text.

  Attributes:
    title: what it shows; may be empty.
    head: the names of the columns; the first is of words, the others are of numbers.
    rows: cell by cell.
  """

  title: str
  head: Sequence[str]
  rows: Sequence[Sequence[str]]


Document = Sequence[str | Table]


def markdown(document: Document) -> str:
  """The whole document, for reading on the web."""
  return (
    '\n\n'.join(part if isinstance(part, str) else _table(part) for part in document)
    + '\n'
  )


def _table(table: Table) -> str:
  rule = ['---'] + ['---:'] * (len(table.head) - 1)
  lines = (table.head, rule, *table.rows)
  lines = [f'| {" | ".join(line)} |'.replace('\n', ' ') for line in lines]
  return '\n'.join(([f'**{table.title}**', ''] if table.title else []) + lines)
