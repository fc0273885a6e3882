"""The tables of `benchmarks.cost`, on the terminal and in Markdown."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.common.steps import HAND
from benchmarks.common.steps import OPAQUE

HEAD = ('step', 'FLOPs', 'bytes', '/ opaque', 'temps', 'state kB', 'compile')
NOTE = (
  'Ratios to the two gradients written by hand; "/ opaque" is bytes accessed as a ratio'
  ' to optax.contrib.sam in opaque mode; state is what the optimizer carries beyond'
  ' Adam alone. contrib.sam is plain SAM, and in transparent mode a step of training is'
  ' two calls: its FLOPs, bytes and time are the sum of both. Parameters and optimizer'
  ' state are donated. The compile time is of one run; the time of a step is the median'
  ' of interleaved rounds.'
)


def table_rows(figures: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
  """The table: a heading, then a line a step, in ratios to the one by hand."""
  timed = 'step_ms' in figures[HAND]
  rows = [[*HEAD, *(['time'] if timed else [])]]
  for name, f in figures.items():
    ratio = lambda figure, to=HAND, f=f: f[figure] / figures[to][figure]
    row = [
      name,
      f'{ratio("flops"):.4f}',
      f'{ratio("bytes"):.4f}',
      f'{ratio("bytes", OPAQUE):.4f}',
      f'{ratio("temporaries"):.4f}',
      f'{f["state_beyond_adam"] / 1000:,.2f}',
      f'{ratio("compile_s"):.2f}',
    ]
    rows.append([*row, *([f'{ratio("step_ms"):.2f}'] if timed else [])])
  return rows


def markdown(results: Mapping[str, Any]) -> str:
  """The tables of all networks, for the README."""
  parts = []
  for name, problem in results['problems'].items():
    head, *rows = table_rows(problem['figures'])
    lines = [head, ['---'] + ['---:'] * (len(head) - 1), *rows]
    parts.append(f'**{name}** ({_caption(problem)})\n')
    parts.extend(f'| {" | ".join(line)} |' for line in lines)
    parts.append('')
  return '\n'.join([*parts, NOTE, ''])


def show(results: Mapping[str, Any], console: Console) -> None:
  """Prints the tables and what the bars come to."""
  for name, problem in results['problems'].items():
    head, *rows = table_rows(problem['figures'])
    console.print(f'[bold]{name}[/] ({_caption(problem)})', highlight=False)
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for i, column in enumerate(head):
      table.add_column(column, justify='right' if i else 'left', no_wrap=True)
    for row in rows:
      table.add_row(*row)
    console.print(table)
    for bar in problem['bars']:
      verdict = '[green]holds[/]' if bar['holds'] else '[red]exceeded[/]'
      of = (
        f'{bar["figure"]} / {bar["reference"]}' if bar['reference'] else bar['figure']
      )
      console.print(
        f'  {bar["step"]}: {of} {bar["measured"]:.6g} <= {bar["bound"]:g} {verdict}',
        highlight=False,
      )
    console.print()
  console.print(NOTE, highlight=False, markup=False)


def _caption(problem: Mapping[str, Any]) -> str:
  hand = problem['figures'][HAND]
  milliseconds = f', {hand["step_ms"]:.0f} ms a step' if 'step_ms' in hand else ''
  return (
    f'{problem["parameters"]:,} parameters; by hand {hand["flops"] / 1e6:,.0f} MFLOP,'
    f' {hand["bytes"] / 1e6:,.0f} MB accessed, {hand["temporaries"] / 1e6:.1f} MB'
    f' temporaries, {hand["compile_s"]:.1f} s to compile{milliseconds}'
  )
