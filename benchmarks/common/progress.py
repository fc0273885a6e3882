"""The progress bar of long benchmarks."""

from rich.progress import BarColumn
from rich.progress import MofNCompleteColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.progress import TimeElapsedColumn


def progress_bar() -> Progress:
  """A bar with what runs now, how many of how many, and the time so far."""
  return Progress(
    TextColumn('{task.description:<36}'),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    transient=True,
  )
