"""The setting of every test: eight devices, and no silent promotion.

Promotion of dtypes and ranks hides most mistakes that give a wrong number without
an error, so both raise here.

Most of the time goes into compiling programs that run once, so the CPU's are compiled
in a hurry: without LLVM's optimizations and, where JAX still has them, without the slow
fusion emitters. Tracing, differentiation and the partitioning over devices stay as they
are. Whoever sets ``XLA_FLAGS``, if only to nothing, has programs compiled as users do.
"""

import os

import jax
import pytest

WITHOUT_EMITTERS = '--xla_cpu_use_fusion_emitters=false'
# A worker of pytest-xdist inherits what is set below.
IN_A_HURRY = os.environ.get('XLA_FLAGS', WITHOUT_EMITTERS) == WITHOUT_EMITTERS
# XLA ends the process on a flag that it does not know, as newer ones do not know this
# one: they always use the emitters.
if IN_A_HURRY and jax.__version_info__ < (0, 11):
  os.environ['XLA_FLAGS'] = WITHOUT_EMITTERS

jax.config.update('jax_num_cpu_devices', 8)


@pytest.fixture(autouse=True, scope='session')
def hasty_compiler():
  """A GPU's programs are compiled as ever: its run is about what users get."""
  if IN_A_HURRY and jax.default_backend() == 'cpu':
    jax.config.update('jax_disable_most_optimizations', True)
    # For the processes that tests start, whose numbers are compared.
    os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'


@pytest.fixture
def compile_in_a_hurry():
  """In a hurry wherever it runs, for steps that are taken only a few times."""
  yield from _in_a_hurry(True)


@pytest.fixture
def compile_as_users_do():
  """For what is said of the programs themselves."""
  yield from _in_a_hurry(False)


def _in_a_hurry(hurry):
  before = jax.config.read('jax_disable_most_optimizations')
  jax.config.update('jax_disable_most_optimizations', hurry)
  yield
  jax.config.update('jax_disable_most_optimizations', before)


@pytest.fixture(autouse=True)
def the_hurry_goes_on():
  """Else a test would make all that come after it in its process slow, unseen."""
  before = jax.config.read('jax_disable_most_optimizations')
  yield
  assert jax.config.read('jax_disable_most_optimizations') == before


@pytest.fixture(autouse=True, scope='module')
def forget_programs():
  """Those of all tests would fill six gigabytes per process."""
  yield
  if jax.__version_info__ >= (0, 8):  # JAX 0.7.0 ended some processes here.
    jax.clear_caches()


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
