"""Programs are read right: their loops, messages and products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.common import hlo

pytestmark = pytest.mark.standard_promotion

# A loop of eight turns, whose counter goes up by two, round a product and a sum over
# devices; an asynchronous gather in two parts; and a sum of two scalars.
TEXT = """
HloModule step, entry_computation_layout={(f32[4,8]{1,0:T(8,128)})->f32[4,8]{1,0}}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%fused (p: f32[4,8], q: f32[8,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0:T(8,128)S(1)} parameter(0)
  %q = f32[8,8]{1,0} parameter(1)
  ROOT %c = f32[4,8]{1,0} convolution(%p, %q), dim_labels=bf_io->bf
}

%body (t: (f32[4,8], s32[])) -> (f32[4,8], s32[]) {
  %t = (f32[4,8]{1,0}, s32[]) parameter(0)
  %x.1 = f32[4,8]{1,0} get-tuple-element(%t), index=0
  %i = s32[] get-tuple-element(%t), index=1
  %w = f32[8,8]{1,0} constant({...})
  %f = f32[4,8]{1,0} fusion(%x.1, %w), kind=kOutput, calls=%fused
  %r = f32[4,8]{1,0} all-reduce(%f), channel_id=3, to_apply=%add
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  ROOT %out = (f32[4,8]{1,0}, s32[]) tuple(%r, %next)
}

%cond (t.1: (f32[4,8], s32[])) -> pred[] {
  %t.1 = (f32[4,8]{1,0}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=1
  %n = s32[] constant(16)
  ROOT %less = pred[] compare(%i.1, %n), direction=LT
}

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0:T(8,128)} parameter(0)
  %zero = s32[] constant(0)
  %start = (f32[4,8]{1,0}, s32[]) tuple(%a, /*index=1*/%zero)
  %loop = (f32[4,8]{1,0}, s32[]) while(%start), condition=%cond, body=%body
  %y.1 = f32[4,8]{1,0} get-tuple-element(%loop), index=0
  %g = (f32[4,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%y.1), channel_id=1
  %g.1 = f32[16,8]{1,0} all-gather-done(%g)
  %h = f32[] constant(1)
  %s = (f32[], f32[]) all-reduce(%h, %h), channel_id=2, to_apply=%add
  ROOT %z = f32[4,8]{1,0} slice(%g.1), slice={[0:4], [0:8]}
}
"""


def test_what_is_in_a_loop_counts_as_often_as_it_runs():
  program = hlo.read(TEXT)
  assert hlo.matrix_flops(program) == 8 * (2 * 4 * 8 * 8)
  assert hlo.matrix_flops(program, loops=False) == 2 * 4 * 8 * 8


def sent(program):
  """Kind, bytes and executions of every message."""
  return [message[:3] for message in hlo.collectives(program)]


def test_messages_and_their_bytes():
  assert sorted(sent(hlo.read(TEXT))) == [
    ('all-gather', 16 * 8 * 4, 1),
    ('all-reduce', 2 * 4, 1),
    ('all-reduce', 4 * 8 * 4, 8),
  ]


def test_a_chain_of_fusions_is_one_message_and_equal_channels_are_not():
  """All that ``shard_map`` sends may have the same channel."""
  ops = [
    f'  %g{i} = f32[16]{{0}} all-gather(%a), channel_id={channel}{rest}'
    for i, (channel, rest) in enumerate(
      [
        (1, ''),
        (1, ''),
        (2, ', frontend_attributes={chain_id="0"}'),
        (2, ', frontend_attributes={chain_id="0"}'),
      ]
    )
  ]
  head = 'ENTRY %main (a: f32[4]) -> f32[4] {\n  %a = f32[4]{0} parameter(0)\n'
  program = hlo.read(head + '\n'.join(ops) + '\n}')
  assert sent(program) == 3 * [('all-gather', 64, 1)]


def test_gathers_that_are_started_together_count_all_that_they_gather():
  text = """
ENTRY %main (a: f32[4], b: f32[8]) -> f32[16] {
  %a = f32[4]{0} parameter(0)
  %b = f32[8]{0} parameter(1)
  ROOT %g = ((f32[4], f32[8]), (f32[16], f32[32])) all-gather-start(%a, %b)
}
"""
  assert sent(hlo.read(text)) == [('all-gather', (16 + 32) * 4, 1)]


def test_both_branches_of_a_conditional_count():
  text = """
%branch (p: f32[4,8]) -> f32[4,4] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %d = f32[4,4]{1,0} dot(%p, %p), lhs_contracting_dims={1}
}

ENTRY %main (a: f32[4,8], c: pred[]) -> f32[4,4] {
  %a = f32[4,8]{1,0} parameter(0)
  %c = pred[] parameter(1)
  ROOT %r = f32[4,4]{1,0} conditional(%c, %a, %a), %s
}
"""
  old = 'true_computation=%branch, false_computation=%branch'
  for attributes in (old, 'branch_computations={%branch, %branch}'):
    program = hlo.read(text.replace('%s', attributes))
    assert hlo.matrix_flops(program) == 2 * (2 * 4 * 4 * 8)


def test_a_branch_is_left_out_beside_one_that_has_nothing_to_do():
  text = """
%nothing (p: f32[4,8]) -> f32[4,8] {
  ROOT %p = f32[4,8]{1,0} parameter(0)
}

%rare (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  %d = f32[4,4]{1,0} dot(%p, %p), lhs_contracting_dims={1}
  ROOT %e = f32[4,8]{1,0} dot(%d, %p), lhs_contracting_dims={1}
}

ENTRY %main (a: f32[4,8], c: pred[]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %c = pred[] parameter(1)
  ROOT %r = f32[4,8]{1,0} conditional(%c, %a, %a), branch_computations={%rare, %nothing}
}
"""
  assert hlo.matrix_flops(hlo.read(text)) == 0


def test_bytes_at_the_boundaries_of_fusions():
  array, weights, gathered = 4 * 8 * 4, 8 * 8 * 4, 16 * 8 * 4
  inside = (2 * array + weights) + 2 * array + 3 * 4 + (4 + 4 + 1)
  outside = (2 * array + gathered) + 4 * 4 + (gathered + array)
  program = hlo.read(TEXT)
  # The condition is looked at as often as the loop is entered: not in these figures.
  assert hlo.boundary_bytes(program) == 8 * (inside - 9) + outside
  assert hlo.boundary_bytes(program, loops=False) == inside - 9 + outside


def test_a_loop_that_does_not_count_is_refused():
  text = TEXT.replace('direction=LT', 'direction=NE')
  with pytest.raises(ValueError, match="'body' does not count up to a constant"):
    hlo.read(text)


@pytest.mark.parametrize(
  ('n', 'k', 'stride', 'pad', 'lhs_dilate', 'rhs_dilate'),
  [
    (9, 3, 1, (0, 0), 1, 1),
    (9, 3, 2, (1, 1), 1, 1),
    (5, 3, 1, (2, 2), 2, 1),
    (16, 16, 15, (0, 0), 16, 1),
    (11, 3, 1, (3, 1), 1, 2),
  ],
)
def test_convolutions_count_only_what_meets_an_input(
  n, k, stride, pad, lhs_dilate, rhs_dilate
):
  """Against the convolution itself: of ones it is the number of what is added up."""
  out = jax.lax.conv_general_dilated(
    jnp.ones((1, 1, n)),
    jnp.ones((1, 1, k)),
    (stride,),
    [pad],
    (lhs_dilate,),
    (rhs_dilate,),
  )
  got = hlo._meetings(
    n,
    k,
    out.shape[-1],
    pad=f'{pad[0]}_{pad[1]}',
    stride=stride,
    lhs_dilate=lhs_dilate,
    rhs_dilate=rhs_dilate,
  )
  assert got == np.sum(out)


def test_products_of_a_compiled_program_are_those_that_jax_has():
  """On the CPU, where products of this size stay ``dot``s."""

  def f(x, w):
    return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ w), x)

  compiled = jax.jit(f).lower(jnp.ones((16, 32)), jnp.ones((32, 32))).compile()
  assert hlo.matrix_flops(hlo.read(compiled.as_text())) == 5 * 2 * 16 * 32 * 32


@pytest.mark.parametrize(
  ('written', 'groups'),
  [
    ('replica_groups={{0,2},{1,3}}, to_apply=%add', ((0, 2), (1, 3))),
    ('replica_groups=[2,2]<=[4], dimensions={0}', ((0, 1), (2, 3))),
    ('replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}', ((0, 2), (1, 3))),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={0}", ((0, 1), (2, 3))),
    (
      "replica_groups=mesh['a'=2,'b'=2] {'a'}, use_global_device_ids=true",
      ((0, 2), (1, 3)),
    ),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
    ('source_target_pairs={{0,1},{1,0}}', ((0, 1), (1, 0))),
  ],
)
def test_groups_of_devices_in_every_notation(written, groups):
  text = TEXT.replace('channel_id=3, to_apply=%add', f'channel_id=3, {written}')
  found = {c.kind: c for c in hlo.collectives(hlo.read(text)) if c.groups}
  assert found['all-reduce'].groups == groups


def test_groups_in_a_notation_that_is_not_known_are_refused():
  text = TEXT.replace('channel_id=3, ', 'channel_id=3, replica_groups=<new>, ')
  with pytest.raises(ValueError, match='replica_groups=<new>'):
    hlo.collectives(hlo.read(text))
