"""The GPU benchmark, in a tiny setting: what it notices, and what it survives."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.common import environment
from benchmarks.common import timing as gpu_timing
from benchmarks.common.networks import Problem
from benchmarks.common.steps import HAND
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import ascent as gpu_ascent
from benchmarks.gpu import checks as gpu_checks
from benchmarks.gpu import models as gpu_models
from benchmarks.gpu import steps as gpu_steps
from benchmarks.gpu import truth as gpu_truth
import msam_optax

pytestmark = pytest.mark.standard_promotion
PARTS = list(gpu.parts(gpu.SMOKE))
NEVER_OVER = lambda: 1000.0
NO_MEMORY = 'RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2 bytes.'


def read(folder):
  return json.loads((folder / 'gpu.json').read_text())


def run(folder, *args):
  return gpu.main(['--smoke', '--out', str(folder), *args])


def only_part(monkeypatch, part):
  monkeypatch.setattr(gpu, 'parts', lambda settings: {'part': part})


def toy():
  def loss(params, batch):
    return jnp.mean(jnp.tanh(batch @ params['w'] + params['b']) ** 2)

  params = {'w': jnp.ones((4, 3)), 'b': jnp.arange(3.0)}
  return Problem(loss, params, jnp.linspace(-2.0, 1.0, 20).reshape(5, 4))


def weigh_toy(left, reserve):
  return gpu_steps.weigh(
    toy, names=None, rounds=3, repeats=2, reserve=reserve, left=left, say=gpu.say
  )


@pytest.mark.slow
@pytest.mark.usefixtures('compile_in_a_hurry')
def test_smoke_run_writes_all_parts(tmp_path, capsys):
  assert run(tmp_path, '--budget', '3600') == 0
  results, table = read(tmp_path), (tmp_path / 'gpu.md').read_text()
  assert results['environment']['jax'] == jax.__version__
  assert list(results['parts']) == PARTS
  assert results['skipped'] == []
  correctness, ascent, *networks = results['parts'].values()
  assert len(correctness['checks']) > 300
  assert all(check['passed'] for check in correctness['checks'])
  for name, figures in ascent['operations'].items():
    assert figures['GB_per_s']['median'] > 0
    assert f'| {name} |' in table
  for network in networks:
    assert set(network['steps']) == set(gpu.SMOKE['steps']['names'])
    for figures in network['steps'].values():
      assert figures['ms']['q25'] <= figures['ms']['median'] <= figures['ms']['q75']
      assert figures['memory']['temp'] > 0
  assert table in capsys.readouterr().out


@pytest.mark.cpu
def test_without_a_gpu_it_says_so(tmp_path, capsys):
  assert gpu.main(['--out', str(tmp_path)]) == 2
  assert 'There is no GPU here' in capsys.readouterr().out
  assert not [*tmp_path.iterdir()]


def test_no_budget_skips_every_part_and_says_so(tmp_path, capsys):
  assert run(tmp_path, '--budget', '0') == 0
  results, printed = read(tmp_path), capsys.readouterr().out
  assert results['skipped'] == PARTS
  for name in PARTS:
    assert results['parts'][name]['failed'] == 'skipped'
    assert f'skipped: {name}' in printed


@pytest.mark.slow
def test_wrong_formula_is_reported_and_the_rest_goes_on(tmp_path, capsys, monkeypatch):
  right = msam_optax.monge
  monkeypatch.setattr(msam_optax, 'monge', lambda a, base: right(1.01 * a, base))
  suite, name = gpu_checks.suite, 'ascent, monge over euclidean, float32'
  monkeypatch.setattr(
    gpu_checks, 'suite', lambda many: [c for c in suite(many) if c[0] == name]
  )
  parts = gpu.parts(gpu.SMOKE)
  chosen = {'correctness': parts['correctness'], 'ascent': parts['ascent']}
  monkeypatch.setattr(gpu, 'parts', lambda settings: chosen)
  # The ascent's benchmark calls it without arguments.
  monkeypatch.setattr(gpu_ascent, 'ascend', lambda w, g: w)

  assert run(tmp_path) == 1

  parts, printed = read(tmp_path)['parts'], capsys.readouterr().out
  wrong = [c for c in parts['correctness']['checks'] if not c['passed']]
  # Where α²‖g‖² is far below 1 the factor does not show.
  assert {c['name'] for c in wrong} >= {f'{name}: slope at {s}' for s in ('1', '1e+30')}
  slope = next(c for c in wrong if c['name'].endswith('slope at 1e+30'))
  np.testing.assert_allclose(slope['error'], 1 - 1 / 1.01, rtol=1e-3)
  assert f'FAILED {name}: slope at 1e+30: off by 0.0099, allowed 5e-06' in printed
  assert 'ms' in parts['ascent']['operations'][gpu_ascent.COPY]


@pytest.mark.slow
@pytest.mark.parametrize('name', gpu_checks.cases())
def test_ascent_that_is_slightly_too_long_is_noticed(name):
  case = gpu_checks.cases()[name]

  def ascend(*args):
    ascent, state = case.metric.ascend(*args)
    longer = jax.tree.map(lambda x: 1.0001 * x, ascent.direction)
    return msam_optax.Ascent(longer, ascent.slope), state

  wrong = case._replace(metric=case.metric._replace(ascend=ascend))
  found = [*gpu_checks.check_ascent(wrong, 'float32')]
  assert {c.name for c in found if not c.passed} >= {
    f'direction at {scale:g}' for scale in gpu_checks.SCALES
  }
  assert all(c.passed for c in found if 'slope' in c.name)


def test_wrong_gradient_at_the_probe_is_noticed():
  case = gpu_checks.cases()['monge over euclidean']
  found = [*gpu_checks.check_gradient(case._replace(alpha=0.71), 'float32', None)]
  failed = {c.name for c in found if not c.passed}
  doors = ('transformation', 'drop-in', 'drop-in, compile_once')
  assert failed >= {f'{door} at loss scale 1' for door in doors}


def test_what_raises_or_is_nan_has_failed(monkeypatch):
  def raises():
    raise ValueError('no such kernel')

  nan = lambda: [gpu_checks.Check('value', float('nan'), 1.0)]
  monkeypatch.setattr(
    gpu_checks, 'suite', lambda many: [('bad', raises), ('worse', nan)]
  )
  first, second = gpu_checks.run_checks()
  assert 'no such kernel' in first.message
  assert (first.name, second.name) == ('bad: raised', 'worse: value')
  assert not first.passed
  assert not second.passed


# The truth that the device is compared with.


@pytest.mark.parametrize('name', gpu_checks.cases())
def test_truth_is_a_dense_solve(name):
  case = gpu_checks.cases()[name]
  g, w = (
    {k: x[:7] for k, x in gpu_checks.random_tree(seed).items()} for seed in (1, 2)
  )
  flat = lambda tree: np.concatenate([np.ravel(tree[k]) for k in g])
  inverse = {k: case.inverse(g[k], w[k]) * np.ones_like(g[k]) for k in g}
  G = np.diag(1 / flat(inverse)) + case.alpha**2 * np.outer(flat(g), flat(g))
  u = np.linalg.solve(G, flat(g))

  direction, slope = gpu_truth.ascent(case.inverse, case.alpha, g, w)

  np.testing.assert_allclose(flat(direction), u / np.sqrt(flat(g) @ u), rtol=1e-10)
  np.testing.assert_allclose(slope, np.sqrt(flat(g) @ u), rtol=1e-10)


def test_gradient_of_the_truth_is_its_slope():
  w, data = gpu_checks.random_tree(3), gpu_checks.batch()
  away, h = gpu_checks.random_tree(4), 1e-6
  there, back = (
    gpu_truth.loss_and_grad({k: w[k] + sign * h * away[k] for k in w}, data, 3.0)[0]
    for sign in (1, -1)
  )
  _, g = gpu_truth.loss_and_grad(w, data, 3.0)
  rise = sum(np.sum(g[k] * away[k]) for k in w)
  np.testing.assert_allclose((there - back) / (2 * h), rise, rtol=1e-7)


# What it survives.


@pytest.mark.slow
def test_a_step_without_memory_is_a_result(tmp_path, capsys, monkeypatch):
  def too_large(loss):
    raise jax.errors.JaxRuntimeError(NO_MEMORY)

  known = gpu_steps.steps()
  monkeypatch.setattr(
    gpu_steps, 'steps', lambda names: known | {'too large': too_large}
  )
  only_part(monkeypatch, lambda left: weigh_toy(NEVER_OVER, reserve=0.0))

  assert run(tmp_path) == 0

  steps = read(tmp_path)['parts']['part']['steps']
  assert steps.pop('too large')['failed'] == 'out of memory'
  assert steps.keys() == known.keys()
  for figures in steps.values():
    assert len(figures['ms']['rounds']) == 3
    assert figures['memory']['total'] >= figures['memory']['temp']
  np.testing.assert_allclose(steps[HAND]['ratio']['median'], 1.0)
  assert '| too large | out of memory |' in capsys.readouterr().out


def test_what_fails_when_run_is_timed_no_more():
  calls = []

  def fails():
    calls.append('fails')
    if len(calls) > 2:
      raise jax.errors.JaxRuntimeError(NO_MEMORY)

  loops = {'fails': fails, 'works': lambda: None}
  timing = gpu_timing.time_in_turns(loops, rounds=4, left=NEVER_OVER)
  assert list(loops) == ['works']  # the other holds arrays no more
  assert timing.failures['fails']['failed'] == 'out of memory'
  assert list(timing.seconds) == ['works']
  assert len(timing.seconds['works']) == 4
  assert len(calls) == 3


def test_what_was_compiled_before_the_memory_was_full_is_kept(monkeypatch):
  def full(*args):
    raise jax.errors.JaxRuntimeError(NO_MEMORY)

  monkeypatch.setattr(gpu_steps, 'make_loop', full)
  *_, result = weigh_toy(NEVER_OVER, reserve=0.0)
  for figures in result['steps'].values():
    assert figures['failed'] == 'out of memory'
    assert figures['memory']['total'] > 0


def test_times_are_those_of_one_step_beside_the_one_by_hand():
  times = gpu_steps.step_times({HAND: [1.0, 2.0], 'other': [3.0, 4.0]}, repeats=2)
  assert times['other']['ms']['rounds'] == [1500.0, 2000.0]
  assert times['other']['ratio']['median'] == 2.5
  assert 'ratio' not in gpu_steps.step_times({'other': [3.0]}, repeats=1)['other']


def test_rounds_end_when_the_time_is_over():
  timing = gpu_timing.time_in_turns(
    {'works': lambda: None}, rounds=100, left=lambda: -1.0
  )
  assert len(timing.seconds['works']) == gpu_timing.LEAST


def test_steps_are_skipped_when_the_time_is_short(monkeypatch):
  seconds = iter([100.0, *[5.0] * 100])
  *_, result = weigh_toy(left=lambda: next(seconds), reserve=10.0)
  first, *others = result['steps'].values()
  assert 'ms' in first
  assert all(figures['failed'] == 'skipped' for figures in others)


def test_an_error_keeps_what_there_was_and_is_reported(tmp_path, capsys, monkeypatch):
  def part(left):
    yield {'steps': {}, 'parameters': 3, 'items': 1}
    raise TypeError('cannot')

  only_part(monkeypatch, part)
  assert run(tmp_path) == 1
  result = read(tmp_path)['parts']['part']
  assert (result['parameters'], result['failed']) == (3, 'error')
  assert 'FAILED part: error: TypeError: cannot' in capsys.readouterr().out


def test_results_of_a_run_that_is_cut_off_are_there(tmp_path, monkeypatch):
  def part(left):
    yield {'steps': {}, 'parameters': 3, 'items': 1}
    raise KeyboardInterrupt

  only_part(monkeypatch, part)
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path)
  assert read(tmp_path)['parts']['part']['parameters'] == 3


def test_it_begins_without_what_only_others_need():
  program = (
    'import sys\n'
    'for name in ("flax", "rich", "matplotlib", "sklearn", "matfree"):\n'
    '  sys.modules[name] = None\n'
    'import benchmarks.gpu.__main__\n'
  )
  subprocess.run([sys.executable, '-c', program], check=True, timeout=120)


def test_a_package_that_is_not_installed_has_no_version():
  assert environment.version('no-such-package-at-all') == 'not installed'
  assert environment.version('jax') == jax.__version__


def test_every_operation_of_a_program_takes_place():
  w, g = jnp.arange(6.0), jnp.ones(6)
  for name, operation in gpu_ascent.OPERATIONS.items():
    found, same = jax.jit(gpu_ascent.many_times(operation.run, 3))((w, g))
    expected = w
    for factor in (1.0, 1.01, 1.02):
      expected = operation.run(expected, factor * g)
    np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=name)
    np.testing.assert_array_equal(same, g)


@pytest.mark.slow
def test_both_ascents_are_the_same():
  shapes = gpu_ascent.transformer_shapes(4, 1, 8)

  @jax.jit
  def both(key):
    w, g = gpu_ascent.random_trees(key, shapes)
    return gpu_ascent.ascend(w, g), gpu_ascent.by_hand(w, g)

  ours, by_hand = both(jax.random.key(0))
  assert jax.tree.map(jnp.shape, ours) == shapes
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), ours, by_hand
  )


@pytest.mark.parametrize('make', ['transformer', 'resnet'])
def test_networks_have_the_size_that_they_are_said_to_have(make):
  shapes = jax.eval_shape(lambda: getattr(gpu_models, make)(**gpu.FULL[make]).params)
  count = sum(w.size for w in jax.tree.leaves(shapes))
  assert {'transformer': 118_081_536, 'resnet': 11_689_512}[make] == count


@pytest.mark.parametrize('make', ['transformer', 'resnet'])
def test_bfloat16_is_in_the_arithmetic_alone(make):
  losses = []

  def shapes():
    loss, *arguments = gpu.network(make, 'bfloat16', gpu.SMOKE[make])
    losses.append(loss)
    return arguments

  params, batch = jax.eval_shape(shapes)
  (loss,) = losses
  results = jax.eval_shape(jax.value_and_grad(loss), params, batch)
  assert {x.dtype for x in jax.tree.leaves(results)} == {jnp.dtype('float32')}
  text = str(jax.make_jaxpr(jax.grad(loss))(params, batch))
  products = re.findall(r'(\w+)\[[\d,]*\] = (?:dot_general|conv_general_dilated)', text)
  # Flax may sum attention's products in float32.
  assert len(products) > 5
  assert products.count('bf16') > 0.8 * len(products)
