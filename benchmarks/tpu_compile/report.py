"""The tables of `benchmarks.tpu_compile`, on the terminal and in Markdown."""

from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

from benchmarks.common.steps import DROP_IN
from benchmarks.common.tables import Document
from benchmarks.common.tables import Table

COST = ('step', 'TFLOP', 'GB accessed', 'temporaries MB', 'code MB', 'compile')
SENT = ('step', 'gathered MB', 'summed MB', 'permuted MB', 'scalars')
BETWEEN = 'between groups MB'
NOTE = (
  'On each chip, in one step; (×) is the ratio to Adam with the same layout. TFLOP:'
  ' matrix products. GB accessed: XLA’s count. In both, bodies of loops count as often'
  ' as they run. Temporaries and code: the compiler’s own figures. Compile: processor'
  ' time, as a ratio only. Gathered (all-gather, all-to-all), summed (all-reduce,'
  ' reduce-scatter) and permuted (collective-permute: the parts of products that are'
  ' gathered or summed piece by piece): MB of the arrays gathered, summed or sent, and'
  ' the number of messages. Scalars: messages of less than 4 kB. In groups: 16 chips'
  ' are four groups of four, 256 are 16 of 16; the parameters are sharded over the'
  ' chips of a group and the same in all, and each group may have its own ascent.'
)
_KINDS = (
  ('all-gather', 'all-to-all'),
  ('all-reduce', 'reduce-scatter'),
  ('collective-permute',),
)


def report(results: Mapping[str, Any]) -> Document:
  """What each layout costs and sends, and what remedies do."""
  return [_caption(results), NOTE, *tables(results)]


def tables(results: Mapping[str, Any]) -> Iterator[Table]:
  """Costs and messages of each layout."""
  programs = results['programs']
  for topology, layout in dict.fromkeys((p['topology'], p['layout']) for p in programs):
    here = [p for p in programs if (p['topology'], p['layout']) == (topology, layout)]
    adam = next((p for p in here if p['method'] == 'adam'), here[0])
    plain = [p for p in here if not p['remedy']]
    title = f'{topology}, {layout}'
    yield Table(title, COST, [_cost(p, adam) for p in plain])
    fit = [p for p in plain if 'messages' in p]
    between = any('between groups' in p['messages'] for p in fit)
    head = [*SENT, BETWEEN] if between else SENT
    yield Table(f'{title}: messages', head, [_sent(p, between) for p in fit])
    if any(p['remedy'] for p in here):
      rows = [p for p in here if p['method'] in ('adam', DROP_IN)]
      rows.sort(key=lambda p: (p['remedy'], p['method']))
      yield Table(f'{title}: remedies', COST, [_cost(p, adam) for p in rows])


def _cost(program: Mapping[str, Any], adam: Mapping[str, Any]) -> list[str]:
  name = ' + '.join(filter(None, (program['method'], program['remedy'])))
  if 'needs_gb' in program:
    return [name, '', '', f'does not fit: {program["needs_gb"]:.1f} GB', '', '']
  ratio = lambda key: f'(×{program[key] / adam[key]:.2f})'
  scaled = lambda key, unit, digits: f'{program[key] / unit:,.{digits}f} {ratio(key)}'
  return [
    name,
    scaled('flops', 1e12, 3),
    scaled('bytes', 1e9, 1),
    scaled('temporaries', 1e6, 0),
    scaled('code', 1e6, 0),
    ratio('compile_cpu_s').strip('()'),
  ]


def _sent(program: Mapping[str, Any], between: bool) -> list[str]:
  found = program['messages']
  row = [program['method']]
  for kinds in _KINDS:
    entries = [found[kind] for kind in kinds if kind in found]
    count = sum(entry['count'] for entry in entries)
    megabytes = sum(entry['bytes'] for entry in entries) / 1e6
    row.append(f'{megabytes:,.0f} in {count:,}' if count else '')
  row.append(str(found.get('scalar', {'count': 0})['count']))
  if between:
    row.append(f'{found.get("between groups", {"bytes": 0})["bytes"] / 1e6:,.0f}')
  return row


def _caption(results: Mapping[str, Any]) -> str:
  sizes, versions = results['sizes'], results['environment']
  return (
    f'A decoder-only transformer of {sizes["layers"]} layers, width {sizes["width"]:,},'
    f' {sizes["vocabulary"]:,} tokens; {sizes["batch"]} sequences of'
    f' {sizes["length"]:,} a chip; float32, an unmodified Flax NNX model,'
    f' without sharding annotations. JAX {versions["jax"]}, libtpu'
    f' {versions["libtpu"]}.'
  )
