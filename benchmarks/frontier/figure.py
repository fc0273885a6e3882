"""The picture of the frontier: quality, cost, and how hard a method is to tune."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.common import style
from benchmarks.frontier import report

HIGHLIGHTED = {
  'Adam': '#6c757d',
  'SAM': '#d95f02',
  'Monge SAM': '#1b6ca8',
  'Monge SAM, rise τ': '#0b3c5d',
  'Momentum-SAM': '#1b9e77',
  'lagged Monge': '#7570b3',
  'LookSAM': '#e7298a',
}
OTHER = '#adb5bd'


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
    line[1].sharex(line[0])
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
      color=_colour(name),
      markersize=7,
      elinewidth=1.6,
    )
  ax.set_yticks(range(len(names)), [_label(results, name) for name in names])
  for tick, name in zip(ax.get_yticklabels(), names, strict=True):
    tick.set_color(_colour(name) if name in HIGHLIGHTED else '#343a40')
  for name in ('Adam', 'SAM'):
    mean = 100 * summaries[name]['test']['mean']
    ax.axvline(mean, color=_colour(name), linewidth=1.2, linestyle=':', zorder=0)
  ax.set_xlabel('test accuracy, % (mean ± sd)')
  ax.set_title(f'{task}, {budget}', loc='left')


def _draw_ranges(ax, results, task, summaries):
  """The interval of the radius in which a method is within a point of its best."""
  names = [name for name in summaries if results['methods'][name]['knob'] in 'ρτ']
  names = [name for name in names if results['methods'][name]['knob']]
  names.sort(key=lambda name: report.factor(summaries[name]))
  for i, name in enumerate(names):
    low, high = summaries[name]['range']
    ax.plot([low, high], [i, i], color=_colour(name), linewidth=5, alpha=0.75)
    ax.plot(summaries[name]['knob'], i, 'o', color='#212529', markersize=5)
    for end, is_open, marker in zip(
      (low, high), summaries[name]['open'], '<>', strict=True
    ):
      if is_open:
        ax.plot(end, i, marker, color=_colour(name), markersize=8)
  labels = [f'{name}  ×{report.factor(summaries[name]):.0f}' for name in names]
  ax.set_yticks(range(len(names)), labels)
  ax.set_xscale('log')
  ax.set_xlabel('radius ρ, or allowed rise τ')
  ax.set_title(f'{task}: within one point of its best', loc='left')


def _label(results, name):
  return f'{name}  ({results["methods"][name]["gradients"]:g})'


def _colour(name):
  return HIGHLIGHTED.get(name, OTHER)
