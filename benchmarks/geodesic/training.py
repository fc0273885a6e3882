"""Whether the bound on the rise helps: the digits of the demo, at large radii.

Monge SAM, and the geodesic in one step and in two, which cost 3 and 4 gradients per
training step to its 2. So Monge SAM is also trained for 1.5 and 2 times as many epochs:
with as many gradients as they have.
"""

from collections.abc import Callable
from collections.abc import Iterable
from typing import Any
from typing import NamedTuple

import optax

from benchmarks.common import grid
from benchmarks.common.tables import Document
from benchmarks.common.tables import Table
from benchmarks.demo.training import Settings
from benchmarks.demo.training import split_digits
from benchmarks.demo.training import train
from msam_optax import geodesic
from msam_optax import msam
from msam_optax import sharpness_aware

RHOS = (0.5, 0.8, 1.25, 2.0, 3.2)
SEEDS = (0, 1, 2, 3, 4)
NOTE = (
  'Test accuracy in %, mean ± standard deviation over the seeds, and in brackets the'
  ' mean rise ℓ(w+δ) − ℓ(w) over all steps of training, bounded by ρ/α, α = 1.'
  ' The second column is relative to the first line.'
)


class Method(NamedTuple):
  """What is trained.

  Attributes:
    name: for the table.
    make: ``rho -> transformation``.
    gradients: per step.
    longer: how many times as many epochs.
  """

  name: str
  make: Callable[[Any], optax.GradientTransformationExtraArgs]
  gradients: int
  longer: float = 1.0


def _one_step(rho: Any) -> optax.GradientTransformationExtraArgs:
  return sharpness_aware(geodesic(1), rho)


def _two_steps(rho: Any) -> optax.GradientTransformationExtraArgs:
  return sharpness_aware(geodesic(2), rho)


METHODS = (
  Method('straight', msam, 2),
  Method('geodesic, one step', _one_step, 3),
  Method('straight, 1.5 times the steps', msam, 2, 1.5),
  Method('geodesic, two steps', _two_steps, 4),
  Method('straight, 2 times the steps', msam, 2, 2.0),
)


def experiment(
  settings: Settings,
  methods: Iterable[Method],
  rhos: Iterable[float],
  seeds: Iterable[int],
) -> list[dict[str, Any]]:
  """A row for each method and radius, with its runs and their summary."""
  sizes = {name: getattr(settings, name) for name in ('train', 'validation', 'wrong')}
  splits = {seed: split_digits(seed, **sizes) for seed in seeds}
  rows = []
  for method in methods:
    tx = optax.chain(
      optax.inject_hyperparams(method.make)(rho=0.0),
      optax.adam(settings.learning_rate),
    )
    longer = settings._replace(epochs=round(method.longer * settings.epochs))
    for rho in rhos:
      runs = [train(longer, tx, rho, s, split)._asdict() for s, split in splits.items()]
      cell = grid.Cell(method.name, rho, rho)
      rows.append(grid.summarize(cell, runs))
  return rows


def report(rows: list[dict[str, Any]]) -> Document:
  """A line for each method, a column for each radius."""
  rhos = list(dict.fromkeys(row['rho'] for row in rows))
  text = lambda row: f'{grid.percent(row["test"])} ({row["rise"]["mean"]:.2f})'
  lines = [
    [
      method.name,
      f'{method.longer * method.gradients / METHODS[0].gradients:g}',
      *(text(row) for row in rows if row['method'] == method.name),
    ]
    for method in METHODS
    if any(row['method'] == method.name for row in rows)
  ]
  head = ['probe', 'gradients in all', *(f'ρ = {rho:g}' for rho in rhos)]
  return [Table('Training on the digits of the demo', head, lines), NOTE]
