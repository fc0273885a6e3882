"""A table with what its numbers say, on the terminal and in Markdown."""

from collections.abc import Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table


class Report(NamedTuple):
  """What is printed, or written: all of it is text.

  Attributes:
    caption: what was done.
    head: the names of the columns; the first is of words, the others are of numbers.
    lines: the rows of the table, cell by cell.
    note: what the columns are.
    findings: what the numbers say, in sentences.
  """

  caption: str
  head: Sequence[str]
  lines: Sequence[Sequence[str]]
  note: str
  findings: Sequence[str]


def show(report: Report, console: Console) -> None:
  """Prints it, with a gap in the table wherever the first column changes."""
  console.print(report.caption, highlight=False)
  table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
  for i, column in enumerate(report.head):
    table.add_column(column, justify='right' if i else 'left', no_wrap=True)
  for line, following in zip(report.lines, [*report.lines[1:], ['']], strict=True):
    table.add_row(*line, end_section=line[0] != following[0])
  console.print(table)
  console.print(report.note, highlight=False, markup=False)
  for sentence in report.findings:
    console.print(f'• {sentence}', highlight=False, markup=False)


def markdown(report: Report) -> str:
  """The same as Markdown."""
  rule = ['---'] + ['---:'] * (len(report.head) - 1)
  table = [f'| {" | ".join(line)} |' for line in (report.head, rule, *report.lines)]
  found = [f'* {sentence}' for sentence in report.findings]
  note = report.note.replace('*', r'\*')
  return '\n'.join([f'{report.caption}\n', *table, '', note, '', *found, ''])
