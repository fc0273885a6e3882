"""The public names: documented, importable without extras, and none forgotten."""

import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import msam_optax
from msam_optax import flax_linen
from msam_optax import flax_nnx
from msam_optax import landscape
from msam_optax import sharpness
from msam_optax import testing

FUNCTIONS = (
  {
    name: getattr(msam_optax, name)
    for name in msam_optax.__all__
    if inspect.isfunction(getattr(msam_optax, name))
  }
  | {
    f'flax_nnx.{name}': getattr(flax_nnx, name)
    for name in (
      'value_and_grad',
      'grad_fn',
      'value_and_grad_fn',
      'eval_model',
      'reestimate_batch_stats',
    )
  }
  | {
    f'flax_linen.{name}': getattr(flax_linen, name)
    for name in ('scale_by_both_passes', 'reestimate_batch_stats')
  }
)
FUNCTIONS |= {
  f'{module.__name__}.{name}': function
  for module in (sharpness, landscape, testing)
  for name, function in vars(module).items()
  if inspect.isfunction(function)
  and function.__module__ == module.__name__
  and not name.startswith('_')
}
TUPLES = {
  name: getattr(msam_optax, name)
  for name in msam_optax.__all__
  if inspect.isclass(getattr(msam_optax, name))
  and issubclass(getattr(msam_optax, name), tuple)
} | {'sharpness.Rise': sharpness.Rise, 'landscape.Slice': landscape.Slice}
README = pathlib.Path(__file__).parent.parent / 'README.md'


@pytest.mark.parametrize('name', FUNCTIONS)
def test_docstring_is_complete(name):
  doc = inspect.getdoc(FUNCTIONS[name])
  first = doc.splitlines()[0]
  assert first.endswith('.')
  assert {'Returns:', 'Examples:'} <= set(doc.splitlines())
  assert '>>>' in doc
  described = doc[: doc.index('Returns:')]
  _, _, options = described.partition('**options: ')
  for parameter in inspect.signature(FUNCTIONS[name]).parameters:
    # What all methods have is described once, and named in each.
    if options and parameter in msam_optax.Options.__annotations__:
      assert f'``{parameter}``' in options
    else:
      assert re.search(rf'^ +\*{{0,2}}{parameter}: ', described, re.M), parameter


def test_shared_options_are_described_once():
  doc = inspect.getdoc(msam_optax.sharpness_aware) or ''
  for option in msam_optax.Options.__annotations__:
    assert re.search(rf'^ +{option}: ', doc, re.M), option


@pytest.mark.parametrize('name', TUPLES)
def test_every_field_is_described(name):
  doc = inspect.getdoc(TUPLES[name])
  described = doc[doc.index('Attributes:') :]
  for field in TUPLES[name]._fields:
    assert f'{field}: ' in described


def test_monge_is_named_where_abbreviations_could_mislead():
  """MSAM also names Momentum-SAM in the literature."""
  for what in (msam_optax, msam_optax.msam):
    assert 'Monge' in inspect.getdoc(what).splitlines()[0]
  assert 'Monge' in README.read_text().splitlines()[2]


def test_all_is_what_is_public():
  public = {
    name
    for name, value in vars(msam_optax).items()
    if not name.startswith('_') and not inspect.ismodule(value)
  }
  assert public == set(msam_optax.__all__)
  assert issubclass(flax_linen.TrainState, object)


def test_import_is_light():
  """Neither Flax nor a plotting library nor tests, and no device is touched."""
  check = (
    'import sys, msam_optax, jax._src.xla_bridge as b;'
    ' heavy = ("flax", "matplotlib", "sklearn", "pytest", "msam_optax.testing");'
    ' print([m for m in heavy if m in sys.modules], b.backends_are_initialized());'
    ' from msam_optax import testing;'
    ' print([m for m in heavy[:4] if m in sys.modules], b.backends_are_initialized())'
  )
  out = subprocess.run(
    [sys.executable, '-c', check], capture_output=True, text=True, check=True
  )
  assert out.stdout.splitlines() == ['[] False', '[] False']
