"""What is saved comes back, and a run that was killed goes on as if it had not been."""

import pathlib
import signal
import subprocess
import sys

import chex
from flax import serialization
import pytest

from tests.contracts import resumable
from tests.contracts.resumable import TRANSFORMATIONS
from tests.methods import cases

pytestmark = pytest.mark.standard_promotion

# A plain run takes Monge SAM with all that it can keep in its state.
MONGE = ('msam', 'rho_schedule', 'alpha_schedule', 'inject_hyperparams')

ROOT = pathlib.Path(__file__).parents[2]


def through_orbax(tree, like, directory):
  resumable.save(directory / 'checkpoint', tree)
  return resumable.restore(directory / 'checkpoint', like)


def through_bytes(tree, like, directory):
  path = directory / 'checkpoint.msgpack'
  path.write_bytes(serialization.to_bytes(tree))
  return serialization.from_bytes(like, path.read_bytes())


def through_state_dict(tree, like, directory):
  del directory
  return serialization.from_state_dict(like, serialization.to_state_dict(tree))


ROUTES = {
  'orbax': through_orbax,
  'flax_bytes': through_bytes,
  'flax_state_dict': through_state_dict,
}


def run(action, directory, names):
  command = [sys.executable, '-m', resumable.__name__, action, str(directory), *names]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def assert_identical(tree, expected):
  """Structure, shapes, dtypes, and every bit."""
  chex.assert_trees_all_equal_structs(tree, expected)
  chex.assert_trees_all_equal(tree, expected, strict=True)


@pytest.fixture(
  scope='module',
  params=cases(TRANSFORMATIONS, plain=lambda name: name in MONGE),
)
def trained(request):
  """Params and state before the first step and after some, once per transformation."""
  first = resumable.init(request.param)
  return first, resumable.train(request.param, first, 0, 2)


@pytest.mark.parametrize('route', ROUTES)
def test_round_trip(trained, route, tmp_path):
  first, last = trained
  assert_identical(ROUTES[route](last, first, tmp_path), last)


# One without a state of its own, one for each place that a state has, and schedules.
KILLED = ('msam', 'look_sam', 'sparse_sam', 'alpha_schedule', 'inject_hyperparams')


@pytest.fixture(scope='module')
def resumed(tmp_path_factory):
  """Where one process has ended what another, which was killed, had begun.

  All of them in two processes, whose start takes longer than their training.
  """
  directory = tmp_path_factory.mktemp('killed')
  killed = run('kill', directory, KILLED)
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  resumed = run('resume', directory, KILLED)
  assert resumed.returncode == 0, resumed.stderr
  return directory


@pytest.mark.slow
@pytest.mark.parametrize('name', KILLED)
def test_killed_run_resumes_bit_for_bit(name, resumed):
  uninterrupted = resumable.train(name, resumable.init(name), 0, resumable.STEPS)
  result = resumable.restore(resumed / name / 'end', uninterrupted)
  assert_identical(result, uninterrupted)
