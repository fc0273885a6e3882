"""Figure 5: where a grid of starts ends, on `(1 − w₁w₂)²`.

Setting of the paper: 10×10 starts on [−3, 3]², 200 steps, learning rate 0.01, ρ = 1,
for SAM, Monge SAM, Fisher SAM (diagonal) and ASAM. Left open: η of Fisher SAM, here 1
(its metric is then the diagonal of Monge's, α = 1), and η of ASAM, here 0.01 (its
authors'), both coordinates weights. `sensitivity` has other values: what Fisher SAM
and ASAM do depends on them. Added: Monge over
ASAM's metric, and plain gradient descent as a control. A run ends at the saddle if it
ends within 0.25 of it, and at a flattest minimum if within 0.25 of ±(1, 1).

Ten starts lie on the line w₁ = −w₂. By symmetry no method leaves it, and all runs there
end at the saddle, those of gradient descent too: `off_line` counts the other runs at
the saddle. Likewise the ten on w₁ = w₂ can end at a flattest minimum by symmetry.
"""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures.figure_5_picture import draw_ends
from benchmarks.figures.landscapes import distances
from benchmarks.figures.landscapes import METHODS
from benchmarks.figures.landscapes import NEAR
from benchmarks.figures.landscapes import trajectories
from benchmarks.figures.landscapes import valley

SETTINGS = {
  'side': 10,
  'extent': 3.0,
  'rho': 1.0,
  'lr': 0.01,
  'steps': 200,
  'near': NEAR,
  'alpha': 1.0,
  'eta': {'Fisher SAM': 1.0, 'ASAM': 0.01, 'Monge over ASAM': 0.01},
}
SENSITIVITY = {
  'Fisher SAM': (0.01, 0.1, 1.0, 10.0),
  'ASAM': (0.0, 0.01, 0.1, 1.0),
  'Monge over ASAM': (0.0, 0.01, 0.1, 1.0),
}


def starts() -> np.ndarray:
  """``[100, 2]``: the grid."""
  axis = np.linspace(-SETTINGS['extent'], SETTINGS['extent'], SETTINGS['side'])
  return np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)


def measure(*, quick: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
  """Where each method's runs end, for other η too, and the paths for the picture."""
  rho = SETTINGS['rho']
  paths = {name: _run(method(rho)) for name, method in METHODS.items()}
  rows = [{'method': name, **count(path[:, -1])} for name, path in paths.items()]
  sensitivity = [
    {'method': name, 'eta': eta, **count(_run(METHODS[name](rho, eta=eta))[:, -1])}
    for name, etas in SENSITIVITY.items()
    for eta in (etas[:1] if quick else etas)
  ]
  ends = {name: path[:, -1].tolist() for name, path in paths.items()}
  return {
    'settings': SETTINGS,
    'rows': rows,
    'sensitivity': sensitivity,
    'ends': ends,
  }, paths


def count(ends: np.ndarray) -> dict[str, Any]:
  """How many runs end where, of ``[100, 2]`` ends in the order of the starts."""
  from_saddle, from_flattest = distances(ends)
  at_saddle, at_flattest = from_saddle < NEAR, from_flattest < NEAR
  on_line = np.isclose(starts().sum(axis=-1), 0)
  return {
    'saddle': int(at_saddle.sum()),
    'off_line': int(np.sum(at_saddle & ~on_line)),
    'flattest': int(at_flattest.sum()),
    'elsewhere': int(np.sum(~at_saddle & ~at_flattest)),
    'median_loss': float(np.median(valley(ends.T))),
  }


def findings(numbers: dict[str, Any]) -> list[str]:
  """What the numbers say."""
  first = ('SAM', 'Monge SAM')

  def tell(where, compared):
    return ', '.join(
      f'{row["method"]} {row[where]}'
      for row in numbers['rows']
      if (row['method'] in first) == compared
    )

  runs = len(numbers['ends'][first[0]])
  return [
    f'Of {runs} runs end at the saddle: {tell("saddle", True)};'
    f' near a flattest minimum: {tell("flattest", True)}',
    f'The others, at the saddle: {tell("saddle", False)};'
    f' near a flattest minimum: {tell("flattest", False)}',
    f'At the saddle for other η: {_ranges(numbers["sensitivity"])}',
  ]


def table(numbers: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
  """Columns and rows of what is printed."""
  names = ('saddle', 'off_line', 'flattest', 'elsewhere')
  rows = [
    [
      row['method'] if 'eta' not in row else f'{row["method"]}, η = {row["eta"]:g}',
      *(str(row[name]) for name in names),
      f'{row["median_loss"]:.4f}',
    ]
    for row in [*numbers['rows'], *numbers['sensitivity']]
  ]
  columns = ['method', 'at saddle', 'not by symmetry', 'at a flattest minimum']
  return [*columns, 'elsewhere', 'median loss'], rows


def draw(numbers: dict[str, Any], paths: dict[str, Any], file: Path) -> None:
  """Writes trajectories and marginals of the ends, and the shares."""
  draw_ends(numbers, paths, findings(numbers)[0], file)


def _ranges(sensitivity):
  """How many runs end at the saddle, from the least to the most over η."""

  def tell(name):
    rows = [row for row in sensitivity if row['method'] == name]
    etas, saddle = [[row[key] for row in rows] for key in ('eta', 'saddle')]
    return (
      f'{name} {min(saddle)} to {max(saddle)} (η from {min(etas):g} to {max(etas):g})'
    )

  return ', '.join(map(tell, SENSITIVITY))


def _run(method):
  lr, steps = SETTINGS['lr'], SETTINGS['steps']
  return trajectories(valley, method, starts(), lr=lr, steps=steps)
