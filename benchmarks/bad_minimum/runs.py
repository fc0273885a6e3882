"""The runs of `benchmarks.bad_minimum`: which there are, and making those missing."""

from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
import statistics
import time
from typing import Any
from typing import NamedTuple

from benchmarks.bad_minimum import methods
from benchmarks.bad_minimum.data import split_fashion
from benchmarks.bad_minimum.report import summarize
from benchmarks.bad_minimum.settings import Settings
from benchmarks.bad_minimum.training import fine_tune
from benchmarks.bad_minimum.training import new_model
from benchmarks.bad_minimum.training import train_start
from benchmarks.common import storage as store


class Cell(NamedTuple):
  """One line of the table.

  Attributes:
    method: a key of ``optimizers``.
    rho: its place on the grid; None for SGD.
    given: the ``rho`` given to the method; differs from ``rho`` where matched.
  """

  method: str
  rho: float | None
  given: float | None


def experiment(
  settings: Settings, folder: Path, report: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
  """Makes the starts and fine-tunes from them, as far as that is not yet stored.

  Args:
    settings: those of the experiment.
    folder: where runs are stored.
    report: called with what is done, before each start and each run.

  Returns:
    ``starts`` and ``fresh``, one a seed: the bad start, and the same net trained in
    the same way without wrong labels; and ``rows``, one a cell with its runs. All have
    ``seconds`` by the clock and ``cpu_seconds`` of all threads, compiling included.
  """
  txs = methods.optimizers(settings.learning_rate, settings.alpha)
  parts = {
    seed: split_fashion(seed, train=settings.train, wrong=settings.wrong)
    for seed in settings.seeds
  }

  def make_start(seed, bad):
    name = f'{"start" if bad else "fresh"}-seed{seed}'
    report(name)

    @_timed
    def compute():
      model, look = train_start(settings, seed, parts[seed], bad=bad)
      store.save_params(folder / f'{name}.npz', model)
      return look

    return store.run_once(folder / f'{name}.json', compute)

  def run(cell, seed):
    at = '' if cell.rho is None else f'-rho{cell.rho:g}'
    name = f'{cell.method}{at}-seed{seed}'.replace(', ', '-').replace(' ', '-')
    report(name)

    @_timed
    def compute():
      path = folder / f'start-seed{seed}.npz'
      model = store.load_params(path, new_model(settings, seed))
      tx = txs[cell.method]
      return fine_tune(settings, tx, cell.given, seed, parts[seed], model)

    return store.run_once(folder / f'{name}.json', compute)

  def fill(cells):
    return [
      summarize(cell._asdict(), [run(cell, seed) for seed in settings.seeds])
      for cell in cells
    ]

  starts = [make_start(seed, True) for seed in settings.seeds]
  fresh = [make_start(seed, False) for seed in settings.seeds]
  rows = fill(grid(settings.rhos))
  rows += fill(list(matched(rows)))
  return {'starts': starts, 'fresh': fresh, 'rows': rows}


def grid(rhos: tuple[float, ...]) -> list[Cell]:
  """All cells but the matched ones, which wait for Monge SAM's."""
  two_pass = (methods.SAM, methods.MONGE, methods.LE_SAM)
  cells = [Cell(method, rho, rho) for method in two_pass for rho in rhos]
  return [Cell(methods.SGD, None, None), *cells]


def matched(rows: list[dict[str, Any]]) -> Iterator[Cell]:
  """SAM with ``ρ · mean(1/√(1 + α²n²))``, the mean taken over Monge SAM's runs."""
  for row in rows:
    if row['method'] == methods.MONGE:
      shrink = statistics.mean(row['shrink']['runs'])
      yield Cell(methods.MATCHED, row['rho'], row['rho'] * shrink)


def _timed(compute: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
  """Adds to the result of ``compute`` how long it took."""

  def timed():
    wall, cpu = time.perf_counter(), time.process_time()
    result = compute()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {**result, 'seconds': wall, 'cpu_seconds': cpu}

  return timed
