"""Every notebook runs, and is the same as the text that it is paired with."""

import os
import pathlib

import jax
import jupytext
import nbclient
import pytest

NOTEBOOKS = pathlib.Path(__file__).parent.parent / 'notebooks'
PATHS = sorted(NOTEBOOKS.glob('*.ipynb'))
# It trains for long: compiled as users do it takes a third of the time.
LONG = 'finetuning'


def sources(notebook):
  return [(cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)
def test_notebook_equals_its_text(path):
  text = jupytext.read(path.with_suffix('.py'))
  assert sources(jupytext.read(path)) == sources(text)


@pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)
def test_notebook_is_short_and_has_outputs(path):
  code = [cell for cell in jupytext.read(path).cells if cell.cell_type == 'code']
  assert len(code) <= 15
  assert any('image/png' in str(cell.outputs) for cell in code)
  assert not any(out.output_type == 'error' for cell in code for out in cell.outputs)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:::zmq', 'ignore:::jupyter_client')
@pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)
def test_notebook_runs(path):
  if path.stem == 'distributed' and not hasattr(jax.lax, 'pcast'):
    pytest.skip('it uses `jax.lax.pcast`, which newer versions have')
  notebook = jupytext.read(path.with_suffix('.py'))
  env = {**os.environ}
  if path.stem == LONG:
    env.pop('JAX_DISABLE_MOST_OPTIMIZATIONS', None)
  client = nbclient.NotebookClient(notebook, timeout=300, kernel_name='python3')
  client.execute(env=env)


def test_every_text_has_its_notebook():
  assert {p.stem for p in NOTEBOOKS.glob('*.py')} == {p.stem for p in PATHS}
  assert PATHS
