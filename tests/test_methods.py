"""The arguments of the methods: all are seen, each has its effect, wrong ones raise."""

import inspect
import json
import pathlib
import pydoc
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax
from msam_optax import Options
from tests.methods import METHODS
from tests.methods import public_methods

ROOT = pathlib.Path(__file__).parents[1]
PUBLIC = public_methods()
# Those that are a metric and a combination already.
NAMED = {name: make for name, make in PUBLIC.items() if name != 'sharpness_aware'}
SHARED = tuple(Options.__annotations__)


# What each number does, by the formulas of the registry.

A = np.array([[2.0, 0.3], [0.3, 1.0]])
POINT = np.array([[0.6, -0.8]])


def gradient(w):
  """Of the loss ``⟨w, A w⟩/2 + Σ w⁴/4`` over the rows of ``w``."""
  return w @ A + w**3


def by_hand(name, memory=None, **changed):
  """The update at ``POINT`` by the row of a method, with other numbers."""
  memory = {} if memory is None else memory
  row, w = METHODS[name], POINT.ravel()
  at = lambda w: gradient(w.reshape(POINT.shape)).ravel()
  numbers = defaults(name) | changed
  rho, is_weight, g = numbers.pop('rho'), np.full(w.size, True), at(w)
  in_update = set(numbers) & set(inspect.signature(row.update).parameters)
  of_update = {number: numbers.pop(number) for number in in_update}
  if row.remembers:
    numbers['memory'] = memory.setdefault('delta', {})
    of_update['memory'] = memory.setdefault('update', {})
  delta = row.delta(w, g, rho, is_weight, **numbers)
  probes = [at(w + scale * delta) for scale in row.scales]
  return row.update(g, *probes, **of_update).reshape(POINT.shape)


def defaults(name):
  """The numbers of a method, as its signature has them."""
  parameters = inspect.signature(NAMED[name]).parameters
  is_number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool)
  return {n: p.default for n, p in parameters.items() if is_number(p.default)}


def assert_close(name, got, expected):
  # A small difference of long gradients is all that LookSAM remembers.
  tolerance = 3e-4 if name == 'look_sam' else 3e-5
  np.testing.assert_allclose(got, expected, rtol=tolerance)


NUMBERS = [
  (name, number)
  for name in NAMED
  for number, value in defaults(name).items()
  if isinstance(value, float)
]


def make_step(tx):
  def grad_fn(w):
    return jnp.dot(w, jnp.asarray(A, w.dtype)) + w**3

  @jax.jit
  def step(state):
    w = jnp.asarray(POINT, jnp.float32)
    return tx.update(grad_fn(w), state, w, grad_fn=grad_fn)

  return tx.init(jnp.asarray(POINT, jnp.float32)), step


@pytest.mark.parametrize(('name', 'number'), NUMBERS)
def test_a_number_is_a_schedule_under_inject_hyperparams(name, number):
  values, memory = jnp.array([0.7, 0.2, 0.5]), {}
  tx = optax.inject_hyperparams(NAMED[name])(**{number: lambda count: values[count]})
  state, step = make_step(tx)

  for value in values:
    update, state = step(state)
    expected = by_hand(name, memory, **{number: float(value)})
    assert_close(name, update, expected)
    np.testing.assert_allclose(state.hyperparams[number], value)


@pytest.mark.parametrize(('name', 'number'), NUMBERS)
def test_a_number_is_changed_in_the_state_under_inject_hyperparams(name, number):
  tx = optax.inject_hyperparams(NAMED[name])(**{number: 0.4})
  state, step = make_step(tx)
  memory = {}

  for value in (None, 0.7, 0.0):
    if value is not None:
      state.hyperparams[number] = jnp.asarray(value, jnp.float32)
    update, state = step(state)
    expected = by_hand(name, memory, **{number: 0.4 if value is None else value})
    assert_close(name, update, expected)

  # What is out of range can be seen, in the next step that uses it.
  state.hyperparams[number] = jnp.asarray(-0.5, jnp.float32)
  for _ in range(5):
    update, state = step(state)
    if np.all(np.isnan(update)):
      return
  pytest.fail(f'A negative {number} is not seen.')


@pytest.mark.parametrize('gamma', [1.0, 1.5])
def test_gamma_of_wsam_that_becomes_too_large(gamma):
  state, step = make_step(optax.inject_hyperparams(msam_optax.wsam)(gamma=0.5))
  state.hyperparams['gamma'] = jnp.asarray(gamma, jnp.float32)
  assert np.all(np.isnan(step(state)[0]))


# What is seen of them.


def test_options_are_the_keywords_of_sharpness_aware():
  parameters = inspect.signature(msam_optax.sharpness_aware).parameters
  assert (
    tuple(name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY) == SHARED
  )


@pytest.mark.parametrize('name', NAMED)
def test_signature_shows_all_keywords_with_their_defaults(name):
  shared = inspect.signature(msam_optax.sharpness_aware).parameters
  parameters = inspect.signature(NAMED[name]).parameters
  assert tuple(parameters)[-len(SHARED) :] == SHARED
  for keyword in SHARED:
    assert parameters[keyword].default == shared[keyword].default
    assert parameters[keyword].kind is inspect.Parameter.KEYWORD_ONLY
  assert 'options' not in parameters


@pytest.mark.parametrize('name', PUBLIC)
def test_help_shows_all_keywords_with_their_defaults(name):
  text = pydoc.render_doc(PUBLIC[name], renderer=pydoc.plaintext)
  # As one line, however many it has; some versions of Python say where Any is from.
  signature = ' '.join(text[: text.index('->')].split()).replace('typing.', '')
  for keyword in SHARED:
    p = inspect.signature(msam_optax.sharpness_aware).parameters[keyword]
    kind = getattr(p.annotation, '__name__', p.annotation)
    assert f'{keyword}: {kind} = {p.default}' in signature
    assert keyword in inspect.getdoc(PUBLIC[name])


@pytest.mark.parametrize('name', NAMED)
def test_keywords_reach_the_method(name):
  """Each raises what :func:`sharpness_aware` raises of it."""
  params = {'a': jnp.ones(2), 'b': jnp.ones(2)}
  with pytest.raises(ValueError, match='`mask` selects no leaf'):
    NAMED[name](mask={'a': False, 'b': False}).init(params)
  with pytest.raises(ValueError, match='`sync_ascent=True` averages'):
    NAMED[name](sync_ascent=True)
  with pytest.raises(TypeError, match='`axis_name` must be the name'):
    NAMED[name](axis_name=['batch'])
  with pytest.raises(TypeError, match='`perturbation_dtype` must be a floating dtype'):
    NAMED[name](perturbation_dtype=jnp.int32)
  specs = {'a': 'not a spec', 'b': None}
  with pytest.raises(TypeError, match='`param_specs` must hold PartitionSpecs'):
    NAMED[name](param_specs=specs).update(params, None, params, grad_fn=lambda p: p)


@pytest.mark.parametrize('name', PUBLIC)
def test_a_misspelt_keyword_is_refused_by_name(name):
  given = {'metric': msam_optax.euclidean()} if name == 'sharpness_aware' else {}
  message = rf"^{name}\(\) got an unexpected keyword argument 'msk'"
  with pytest.raises(TypeError, match=message):
    PUBLIC[name](rho=0.1, msk=None, **given)
  with pytest.raises(TypeError, match=rf'^{name}\(\) .*positional arguments'):
    PUBLIC[name](*[msam_optax.probe_gradient()] * 6)


TYPED = """
import jax.numpy as jnp
import optax

import msam_optax
from msam_optax import *

tx: optax.GradientTransformationExtraArgs = msam(0.1, 0.5, mask={'a': True})
sam(rho=optax.cosine_decay_schedule(0.1, 10), axis_name='batch', sync_ascent=True)
asam(0.1, eta=jnp.ones([]), weights=by_name('kernel'), param_specs=None)
fisher_sam(0.1, 1.0, perturbation_dtype='float32')
gsam(alpha=0.1, metric=monge(), perturbation_dtype=jnp.float32)
wsam(gamma=0.1)
cr_sam(gamma=0.1, beta=0.1)
sharpness_aware(monge(), 0.1, weighted(0.8), mask=None)
value_and_grad(lambda w: w, capped(), 0.1)

msam(msk=None)  # wrong: No parameter named "msk"
sam(alpha=1.0)  # wrong: No parameter named "alpha"
msam(sync_ascent='yes')  # wrong: cannot be assigned to parameter "sync_ascent"
msam('0.1')  # wrong: cannot be assigned to parameter "rho"
asam(eta='0.1')  # wrong: cannot be assigned to parameter "eta"
fisher_sam(mask=None, msk=None)  # wrong: No parameter named "msk"
gsam(alpha=None)  # wrong: cannot be assigned to parameter "alpha"
wsam(metric=probe_gradient())  # wrong: cannot be assigned to parameter "metric"
cr_sam(0.1, 0.1, 0.01, euclidean())  # wrong: Expected 3 positional arguments
sharpness_aware(sam(), 0.1)  # wrong: cannot be assigned to parameter "metric"
sharpness_aware(monge())  # wrong: Argument missing for parameter "rho"
value_and_grad(lambda w: w, monge(), 0.1, combination=monge())  # wrong: "combination"
"""


@pytest.mark.slow  # It installs itself when it is first used.
def test_pyright_sees_all_keywords(tmp_path):
  source = tmp_path / 'calls.py'
  source.write_text(TYPED)
  command = [sys.executable, '-m', 'pyright', '--outputjson', str(source)]
  command += ['--pythonpath', sys.executable]
  out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  found = {
    d['range']['start']['line']: d['message']
    for d in json.loads(out.stdout)['generalDiagnostics']
    if d['severity'] == 'error'
  }
  wrong = {
    i: line.split('# wrong: ')[1]
    for i, line in enumerate(TYPED.splitlines())
    if '# wrong: ' in line
  }
  assert set(found) == set(wrong), found
  for line, message in wrong.items():
    assert message in found[line]
