"""Several processes equal one device, and go on after all of them were killed."""

import jax
import numpy as np
import pytest

from tests.devices.processes import launch
from tests.devices.processes import training
from tests.devices.processes.problem import SHARDS
from tests.devices.processes.problem import train_by_hand
from tests.methods import KINDS

# How each set-up cuts a batch, and whether all go up the same gradient: under `jit`
# the batch is one, wherever its rows lie.
BY_HAND = {
  'data_parallel': {'shards': 1, 'sync_ascent': False},
  'fully_sharded': {'shards': 1, 'sync_ascent': False},
  'mapped': {'shards': SHARDS, 'sync_ascent': False},
  'mapped_synced': {'shards': SHARDS, 'sync_ascent': True},
}
COUNTS = [pytest.param(count, marks=pytest.mark.slow) for count in (2,)]


@pytest.fixture(scope='module', params=COUNTS, ids='{} processes'.format)
def trained(request, tmp_path_factory):
  """The number of processes, where they trained, and all params and states after it."""
  count, directory = request.param, tmp_path_factory.mktemp('processes')
  launch.launch('train', count, directory)
  with np.load(directory / 'train.npz') as arrays:
    return count, directory, dict(arrays)


def test_processes_equal_one_device(trained):
  """Every method, set-up and interface: the params, and the slope in the state.

  One test, since several workers would each train anew.
  """
  _, _, arrays = trained
  for method, interface, setup in training.RUNS:
    name = f'{method}-{interface}-{setup}'
    params, slope = train_by_hand(method, **BY_HAND[setup])
    for path, expected in jax.tree_util.tree_leaves_with_path(params):
      key = jax.tree_util.keystr(path, simple=True, separator='/')
      np.testing.assert_allclose(
        arrays[f'{name}/0/{key}'], expected, rtol=1e-6, atol=1e-6, err_msg=name
      )
    if interface == 'chain':
      np.testing.assert_allclose(
        arrays[f'{name}/1/0/slope'], slope, rtol=1e-6, err_msg=name
      )


@pytest.mark.slow
def test_the_setups_can_be_told_apart():
  """What the shards do differs by far more than the tolerance of the comparison."""
  for method in KINDS:
    whole, own, synced = (
      train_by_hand(method, **BY_HAND[setup])[0]['out']['kernel']
      for setup in ('data_parallel', 'mapped', 'mapped_synced')
    )
    assert np.abs(own - whole).max() > 1e-3
    np.testing.assert_allclose(synced, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
  'trained', COUNTS[:1], indirect=True, ids='{} processes'.format
)
def test_killed_processes_resume_bit_for_bit(trained):
  """Params and optimizer states, sharded or not, of every method and set-up."""
  count, directory, uninterrupted = trained
  saved = [directory / f'saved-{rank}' for rank in range(count)]
  launch.launch(
    'half', count, directory, until=lambda: all(mark.exists() for mark in saved)
  )
  assert not (directory / 'half.npz').exists()
  launch.launch('resume', count, directory)
  with np.load(directory / 'resume.npz') as resumed:
    assert set(resumed) == set(uninterrupted)
    for name, expected in uninterrupted.items():
      np.testing.assert_array_equal(resumed[name], expected, err_msg=name, strict=True)
  assert uninterrupted['msam-chain-fully_sharded/1/0/count'] == training.STEPS


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others(tmp_path):
  with pytest.raises(RuntimeError, match='told to fail'):
    launch.launch('fail', 2, tmp_path)


@pytest.mark.slow
def test_a_port_that_was_taken_is_exchanged(tmp_path, monkeypatch):
  with launch.socket.socket() as other:
    other.bind(('127.0.0.1', 0))
    other.listen()
    ports = iter([other.getsockname()[1], launch.free_port()])
    monkeypatch.setattr(launch, 'free_port', lambda: next(ports))
    launch.launch('meet', 2, tmp_path)
  assert not list(ports)
