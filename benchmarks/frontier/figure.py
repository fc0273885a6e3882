"""The picture of the frontier: quality, cost, and how hard a method is to tune."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import lines
import matplotlib.pyplot as plt

from benchmarks.common import style
from benchmarks.frontier import report

# By gradients per step, up to this many.
COLOURS = {1.0: '#1b9e77', 1.5: '#1b6ca8', 2.0: '#d95f02', 4.0: '#7b3294'}
NAMES = ('one gradient per step', 'up to 1.5', 'two', 'three or four')
COMPARED = ('Adam', 'SAM')


def draw(results: Mapping[str, Any], path: Path) -> None:
  """One line of three panels for each task."""
  style.use()
  tasks = results['best']
  fig, axes = plt.subplots(
    len(tasks),
    3,
    figsize=(17, 6.2 * len(tasks)),
    width_ratios=(1.15, 1.15, 1),
    layout='constrained',
    squeeze=False,
  )
  for line, (task, budgets) in zip(axes, tasks.items(), strict=True):
    _draw_bars(line[0], results, task, budgets[report.STEPS], report.STEPS)
    _draw_bars(line[1], results, task, budgets[report.EVALUATIONS], report.EVALUATIONS)
    _draw_ranges(line[2], results, task, budgets[report.STEPS])
  handles = [
    lines.Line2D([], [], marker='o', color=colour, label=name)
    for colour, name in zip(COLOURS.values(), NAMES, strict=True)
  ]
  fig.legend(handles=handles, loc='outside upper left', ncols=4, fontsize=13)
  fig.savefig(path)
  plt.close(fig)


def _draw_bars(ax, results, task, summaries, budget):
  """Test accuracy with its spread, sorted; the cost of a step beside each name."""
  names = sorted(summaries, key=lambda name: summaries[name]['test']['mean'])
  for i, name in enumerate(names):
    test = summaries[name]['test']
    ax.errorbar(
      100 * test['mean'],
      i,
      xerr=100 * test['sd'],
      fmt='o',
      color=_colour(results, name),
      markersize=7,
      elinewidth=1.6,
    )
  ax.set_yticks(range(len(names)), [_label(results, name) for name in names])
  for tick, name in zip(ax.get_yticklabels(), names, strict=True):
    tick.set_fontweight('bold' if 'Monge SAM' in name else 'normal')
  for name in COMPARED:
    mean = 100 * summaries[name]['test']['mean']
    ax.axvline(mean, color=_colour(results, name), linewidth=1.4, linestyle=':')
  ax.set_xlabel('test accuracy, % (mean ± sd)')
  ax.set_title(f'{task}, {budget}', loc='left')


def _draw_ranges(ax, results, task, summaries):
  """The interval of the radius in which a method is within a point of its best."""
  names = [name for name in summaries if results['methods'][name]['knob'] in 'ρτ']
  names = [name for name in names if results['methods'][name]['knob']]
  names.sort(key=lambda name: report.factor(summaries[name]))
  for i, name in enumerate(names):
    low, high = summaries[name]['range']
    ax.plot([low, high], [i, i], color=_colour(results, name), linewidth=5, alpha=0.75)
    ax.plot(summaries[name]['knob'], i, 'o', color='#212529', markersize=5)
    for end, is_open, marker in zip(
      (low, high), summaries[name]['open'], '<>', strict=True
    ):
      if is_open:
        ax.plot(end, i, marker, color=_colour(results, name), markersize=8)
  labels = [f'{name}  ×{report.factor(summaries[name]):.0f}' for name in names]
  ax.set_yticks(range(len(names)), labels)
  ax.set_xscale('log')
  ax.set_xlabel('radius ρ, or allowed rise τ')
  ax.set_title(f'{task}: within one point of its best', loc='left')


def _label(results, name):
  return f'{name}  ({results["methods"][name]["gradients"]:g})'


def _colour(results, name):
  gradients = results['methods'][name]['gradients']
  return next(colour for most, colour in COLOURS.items() if gradients <= most)
