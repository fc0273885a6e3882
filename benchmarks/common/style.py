"""How the figures look: one colour and one marker per method, the same in all."""

from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter
from matplotlib.ticker import NullLocator

COLOURS = {
  'Adam': '#6c757d',
  'SAM': '#d95f02',
  'Monge SAM': '#1b6ca8',
  'SAM, matched': '#e6ab02',
  'LE-SAM': '#7b3294',
  'GD': '#343a40',
  'Fisher SAM': '#1b9e77',
  'ASAM': '#7570b3',
  'Monge over ASAM': '#e7298a',
}
CONTROL = {'linestyle': '--', 'linewidth': 1.6, 'markerfacecolor': 'white'}
LOOKS: dict[str, dict[str, Any]] = {
  'SAM': {'marker': 'o', 'label': 'SAM'},
  'Monge SAM': {'marker': 's', 'label': 'Monge SAM'},
  'SAM, matched': {
    'marker': '^',
    'label': 'SAM at Monge SAM’s mean radius',
    **CONTROL,
  },
}
RING = {'markersize': 13, 'markerfacecolor': 'none', 'markeredgewidth': 1.4}

RC: dict[Any, Any] = {
  'figure.dpi': 100,
  'savefig.dpi': 120,
  'savefig.bbox': 'tight',
  'font.size': 11,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'axes.axisbelow': True,
  'grid.color': '#e6e6e6',
  'grid.linewidth': 0.8,
  'legend.frameon': False,
  'lines.linewidth': 2.0,
  'lines.markersize': 5.5,
}


def use() -> None:
  """Applies the style to all figures that follow."""
  plt.rcParams.update(RC)


def draw_rho_axis(ax, rhos: Sequence[float]) -> None:
  """A logarithmic axis of radii with these ticks."""
  ax.set_xscale('log')
  ax.set_xticks(rhos)
  ax.xaxis.set_major_formatter(FuncFormatter(lambda rho, _: f'{rho:g}'))
  ax.xaxis.set_minor_locator(NullLocator())
  ax.set_xlabel('radius ρ')


def draw_band(ax, x, low, high, colour: str) -> None:
  """A light band along a line."""
  ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def draw_level(ax, mean: float, error: float, label: str, colour: str) -> None:
  """A level line with its band, for a method without a radius."""
  ax.axhline(mean, color=colour, linewidth=1.8, label=label, zorder=1)
  ax.axhspan(mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
