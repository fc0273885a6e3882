"""What a benchmark prints: its tables, and a bar while it runs."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib

from rich import box
from rich.console import Console
from rich.progress import BarColumn
from rich.progress import MofNCompleteColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.progress import TimeElapsedColumn
from rich.table import Table

from benchmarks.common.tables import Document


def show(document: Document) -> None:
  """Prints paragraphs and tables, with a gap wherever the first column changes."""
  console, wide = Console(), Console(width=1000)  # tables are never cut
  for part in document:
    if isinstance(part, str):
      console.print(part, highlight=False, markup=False)
      continue
    console.print(f'\n{part.title}' if part.title else '', style='bold', markup=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, column in enumerate(part.head):
      table.add_column(column, justify='right' if i else 'left', no_wrap=True)
    repeated = len({row[0] for row in part.rows}) < len(part.rows)
    for row, following in zip(part.rows, [*part.rows[1:], ['']], strict=True):
      table.add_row(*row, end_section=repeated and row[0] != following[0])
    wide.print(table)


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
  """A bar of ``total`` pieces of work.

  Yields:
    A function to call with the name of each piece when it begins.
  """
  columns = (
    TextColumn('{task.description:<36}'),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
  )
  with Progress(*columns, transient=True) as bar:
    task = bar.add_task('', total=total, completed=-1)
    yield lambda text: bar.update(task, description=text, advance=1)
