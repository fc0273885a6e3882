"""How the figures look: one colour a method, the same in all of them."""

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt

COLOURS = {
  'Adam': '#6c757d',
  'SAM': '#d95f02',
  'Monge SAM': '#1b6ca8',
  'SAM, matched': '#e6ab02',
  'GD': '#343a40',
  'Fisher SAM': '#1b9e77',
  'ASAM': '#7570b3',
  'Monge over ASAM': '#e7298a',
}

RC = {
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
  """Makes the style that of all figures to come."""
  plt.rcParams.update(RC)
