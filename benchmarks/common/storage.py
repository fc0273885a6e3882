"""Finished runs on disk: each is written once, whole, and never computed again."""

from collections.abc import Callable
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import numpy as np

from benchmarks.bad_minimum.settings import Settings


def folder_for(parent: Path, name: str, settings: Settings) -> Path:
  """The folder of the runs with these settings; other settings have another one.

  A run does not depend on the grid of radii that it is on, nor does the folder: when
  the grid grows, only what is new is run.

  Args:
    parent: where the folders are; is made, and hidden from git.
    name: begins the folder's name.
    settings: those of the experiment.

  Returns:
    The folder, which exists.
  """
  fixed = {key: value for key, value in settings._asdict().items() if key != 'rhos'}
  text = json.dumps(fixed, sort_keys=True)
  folder = parent / f'{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}'
  folder.mkdir(parents=True, exist_ok=True)
  (parent / '.gitignore').write_text('*\n')
  (folder / 'settings.json').write_text(json.dumps(fixed, indent=2) + '\n')
  return folder


def run_once(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
  """What is stored at ``path``; if nothing is, what ``compute`` returns, stored there.

  The file appears complete or not at all, so that a run which is killed leaves nothing
  that could be taken for a result.
  """
  if not path.exists():
    text = json.dumps(compute())
    _write_whole(path, lambda part: part.write_text(text + '\n'))
  return json.loads(path.read_text())


def save_params(path: Path, model: nnx.Module) -> None:
  """Stores a model's parameters, whole or not at all."""
  leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]

  def write(part):
    with part.open('wb') as file:
      np.savez(file, *leaves)

  _write_whole(path, write)


def load_params(path: Path, model: nnx.Module) -> nnx.Module:
  """The model with the stored parameters; changes it."""
  state = nnx.state(model, nnx.Param)
  with np.load(path) as file:
    leaves = [jax.numpy.asarray(file[name]) for name in file.files]
  nnx.update(model, jax.tree.unflatten(jax.tree.structure(state), leaves))
  return model


def _write_whole(path: Path, write: Callable[[Path], Any]) -> None:
  part = path.with_name(f'{path.name}.{os.getpid()}.part')
  write(part)
  part.replace(path)
