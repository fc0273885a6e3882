"""The setting of every test: eight devices, and no silent promotion.

Promotion of dtypes and ranks hides most mistakes that give a wrong number without
an error, so both raise here.
"""

import jax
import pytest

jax.config.update('jax_num_cpu_devices', 8)


@pytest.fixture(autouse=True, scope='session')
def precise_products():
  """A GPU would multiply with 10 bits, a TPU with 8, and the tests compare 20."""
  if jax.default_backend() != 'cpu':
    jax.config.update('jax_default_matmul_precision', 'highest')


@pytest.fixture(autouse=True)
def default_device(request):
  """What carries the mark ``cpu`` needs the CPU: its eight devices, or its compiler."""
  if request.node.get_closest_marker('cpu') and jax.default_backend() != 'cpu':
    pytest.skip('for the CPU: set JAX_PLATFORMS=cpu to run it')


@pytest.fixture(autouse=True)
def strict_promotion(request):
  """Dtypes and ranks are promoted only where the code says so.

  Optax's own optimizers promote (Adam raises a float to its integer count), so what
  runs them carries the mark ``standard_promotion``.
  """
  if request.node.get_closest_marker('standard_promotion'):
    yield
    return
  jax.config.update('jax_numpy_dtype_promotion', 'strict')
  jax.config.update('jax_numpy_rank_promotion', 'raise')
  yield
  jax.config.update('jax_numpy_dtype_promotion', 'standard')
  jax.config.update('jax_numpy_rank_promotion', 'allow')


@pytest.fixture
def x64():
  """Double precision, for comparisons with a dense solve or a closed form."""
  jax.config.update('jax_enable_x64', True)
  yield
  jax.config.update('jax_enable_x64', False)
