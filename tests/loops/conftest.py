"""Loops of a few steps take longer to compile than to run."""

import jax
import pytest


@pytest.fixture(autouse=True, scope='package')
def compile_fast():
  """Leaves out what makes compiled programs fast, in this folder only."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)
