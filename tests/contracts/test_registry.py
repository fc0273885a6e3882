"""The registries leave nothing out."""

import importlib.metadata
import inspect

import optax
import optax.contrib
import pytest

from tests.contracts.optimizers import EXCLUDED
from tests.contracts.optimizers import OPTIMIZERS
from tests.methods import METHODS
from tests.methods import public_methods

# The first parameter of an optimizer, or of what is wrapped around one.
SIGNATURES = {
  'base_optimizer',
  'fast_optimizer',
  'learning_rate',
  'max_learning_rate',
  'optimizer',
}


def public_functions(module):
  """The public functions of a module by name."""
  return {
    name: function
    for name, function in vars(module).items()
    if inspect.isfunction(function) and not name.startswith('_')
  }


def optax_optimizers():
  """The names of all public functions of Optax that look like optimizers."""
  functions = public_functions(optax) | public_functions(optax.contrib)
  return {
    name
    for name, function in functions.items()
    if next(iter(inspect.signature(function).parameters), None) in SIGNATURES
  }


def test_every_method_is_registered():
  assert set(public_methods()) <= set(METHODS)


def test_every_optimizer_is_registered_or_excluded():
  registered = {optimizer.factory for optimizer in OPTIMIZERS.values()}
  missing = optax_optimizers() - registered - set(EXCLUDED)
  # The registry is complete for one version of Optax; others may have more.
  assert not missing or importlib.metadata.version('optax') != '0.2.8'


@pytest.mark.parametrize('name', EXCLUDED)
def test_nothing_is_both_registered_and_excluded(name):
  assert name not in {optimizer.factory for optimizer in OPTIMIZERS.values()}
