"""What a training step costs on TPUs, by the TPU compiler, which needs no TPU.

Run `python -m benchmarks.tpu_compile` (with `pip install '.[tpu-compile]'`, on Linux).
The step of a four-layer Flax transformer is compiled for slices of 16 and 256 v5e
chips: data-parallel, fully sharded, and in groups of chips, as pods are, that are fully
sharded each. Of every program the compiler says what memory it needs; its operations
and the messages that chips send each other are read from its text. A last table has
what else may be done to the step that is compiled worst.

Every program is stored as soon as it is compiled: after a kill the same command goes
on from there. All of them take about 80 minutes of one core. `--layers 8` has a deeper
model, in separate files.
"""

import functools
from importlib import metadata
import itertools
import math
import os
from pathlib import Path
import re
import time
from typing import Any
from typing import NamedTuple

# Several processes may load the compiler at once; no TPU is looked for.
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')

import jax
from jax.experimental import topologies
import numpy as np

from benchmarks.common import hlo
from benchmarks.common.command import make_parser
from benchmarks.common.command import publish
from benchmarks.common.environment import describe
from benchmarks.common.steps import DROP_IN
from benchmarks.common.storage import CLOCKS
from benchmarks.common.storage import folder_for
from benchmarks.common.storage import run_once
from benchmarks.common.terminal import progress
from benchmarks.tpu_compile import steps
from benchmarks.tpu_compile.model import Sizes
from benchmarks.tpu_compile.report import report

TOPOLOGIES = ('v5e:4x4', 'v5e:16x16')
SMALL = 4096  # Bytes: messages below are scalars, whatever the model's size.
NOT_DONATED = 'nothing donated'


class Cell(NamedTuple):
  """One program.

  Attributes:
    topology: a slice of TPUs, one of ``TOPOLOGIES``.
    layout: how parameters are sharded on it.
    method: a key of ``METHODS`` or ``ONE_GRADIENT``.
    remedy: a key of ``REMEDIES``, ``NOT_DONATED``, or nothing.
  """

  topology: str
  layout: str
  method: str
  remedy: str = ''


def cells(names: tuple[str, ...]) -> list[Cell]:
  """All programs of some topologies, the most telling first."""
  found = [
    Cell(topology, layout, method)
    for topology in names
    for layout in (steps.FULLY_SHARDED, steps.DATA_PARALLEL, steps.GROUPED)
    for method in steps.METHODS
    if (layout != steps.FULLY_SHARDED or method not in steps.OWN_ASCENTS)
    and (
      method not in steps.MICROBATCHES
      or (topology == 'v5e:4x4' and layout in steps.MICROBATCHES[method])
    )
  ]
  remedies = [(DROP_IN, remedy) for remedy in (*steps.REMEDIES, NOT_DONATED)]
  remedies += [('adam', remedy) for remedy in steps.CHANGE_THE_MODEL]
  found += [
    Cell('v5e:4x4', steps.FULLY_SHARDED, *remedy)
    for remedy in remedies
    if 'v5e:4x4' in names
  ]
  return sorted(found, key=lambda cell: cell.topology != 'v5e:4x4')


def weigh(cell: Cell, sizes: Sizes) -> dict[str, Any]:
  """Compiles a step and reads what it costs on each device.

  Returns:
    ``flops`` of matrix products; ``bytes`` accessed, by XLA's count, in which bodies of
    loops are made to count as often as they run; the compiler's ``temporaries``,
    ``arguments`` and ``code`` in bytes; ``compile_s``; and ``messages``: for each kind
    of collective how often and with how many bytes, how many ``scalar`` ones, and of
    all how many ``between groups``.
    Only ``needs_gb``, if the program does not fit into the memory of a chip.
  """
  mesh = mesh_of(cell.topology, cell.layout)
  step = steps.make_step(
    cell.method,
    cell.layout,
    mesh,
    sizes,
    remedy=cell.remedy if cell.remedy in steps.REMEDIES else '',
    donate=cell.remedy != NOT_DONATED,
  )
  lowered = step.run.lower(*step.args)
  began, busy = time.perf_counter(), time.process_time()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    needs = re.search(r'memory required .*?\(([\d.]+)G\)', str(error))
    if 'RESOURCE_EXHAUSTED' not in str(error) or not needs:
      raise
    return {'needs_gb': float(needs[1])}
  seconds, busy = time.perf_counter() - began, time.process_time() - busy
  program, memory = hlo.read(compiled.as_text()), compiled.memory_analysis()
  in_loops = hlo.boundary_bytes(program) / hlo.boundary_bytes(program, loops=False)
  return {
    'flops': hlo.matrix_flops(program),
    'bytes': compiled.cost_analysis()['bytes accessed'] * in_loops,
    'temporaries': memory.temp_size_in_bytes,
    'arguments': memory.argument_size_in_bytes,
    'code': memory.generated_code_size_in_bytes,
    'compile_s': seconds,
    'compile_cpu_s': busy,
    'messages': messages(hlo.collectives(program), mesh),
  }


def messages(
  collectives: list[hlo.Collective], mesh: jax.sharding.Mesh
) -> dict[str, dict[str, int]]:
  """How many messages per step of each kind, and scalar ones, and their bytes."""
  found: dict[str, dict[str, int]] = {}
  size = mesh.shape[steps.AXIS]
  if size < mesh.size and not all(message.groups for message in collectives):
    raise ValueError(
      'The program does not say between which chips a message is sent: this jaxlib is'
      ' too old to read what this libtpu compiles. Use a newer JAX.'
    )
  for message in collectives:
    kinds = ['scalar' if message.bytes < SMALL else message.kind]
    if any(len({device // size for device in group}) > 1 for group in message.groups):
      kinds.append('between groups')
    for kind in kinds:
      entry = found.setdefault(kind, {'count': 0, 'bytes': 0})
      entry['count'] += message.times
      entry['bytes'] += message.bytes * message.times
  return found


@functools.cache
def mesh_of(topology: str, layout: str) -> jax.sharding.Mesh:
  """A mesh of the devices of a topology that need not be present.

  Groups are as many as each has chips: 16 chips are four of four.
  """
  described = topologies.get_topology_desc(platform='tpu', topology_name=topology)
  devices = np.array(described.devices)
  if layout != steps.GROUPED:
    return jax.sharding.Mesh(devices, (steps.AXIS,))
  groups = math.isqrt(devices.size)
  return jax.sharding.Mesh(devices.reshape(groups, groups), (steps.GROUPS, steps.AXIS))


def main(argv: list[str] | None = None) -> None:
  """Compiles what is missing, prints the tables, and writes them."""
  parser = make_parser('tpu_compile', __doc__)
  parser.add_argument('--topologies', nargs='+', default=TOPOLOGIES, metavar='NAME')
  parser.add_argument('--layers', type=int, default=Sizes().layers)
  parser.add_argument('--only', nargs='*', help='methods; no remedies')
  args = parser.parse_args(argv)
  sizes = Sizes(layers=args.layers)
  wanted = [
    cell
    for cell in cells(tuple(args.topologies))
    if not args.only or (cell.method in args.only and not cell.remedy)
  ]
  other = f'_{sizes.layers}_layers' if sizes != Sizes() else ''
  results = run(wanted, sizes, args.out / 'tpu_compile_runs')
  publish(args.out / f'tpu_compile{other}', results, report(results))


def run(wanted: list[Cell], sizes: Sizes, parent: Path) -> dict[str, Any]:
  """All programs; those that are not stored are compiled."""
  told = {
    'environment': {**describe(), 'libtpu': metadata.version('libtpu')},
    'sizes': sizes._asdict(),
  }
  folder = folder_for(parent, f'{sizes.layers}-layers', told)
  programs = []
  with progress(len(wanted)) as tell:
    for cell in wanted:
      tell(f'{cell.topology} {cell.remedy or cell.method}')
      path = folder / f'{re.sub(r"[^0-9A-Za-z]+", "-", "-".join(cell))}.json'
      weighed = run_once(path, lambda cell=cell: weigh(cell, sizes))
      programs.append(cell._asdict() | weighed)
  for program, clock in itertools.product(programs, CLOCKS):
    del program[clock]
  return {**told, 'programs': programs}


if __name__ == '__main__':
  main()
