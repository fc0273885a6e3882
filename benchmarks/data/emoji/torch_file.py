"""Reads the tensors of a legacy PyTorch file into NumPy, without PyTorch.

Such a file, as `torch.save` wrote it before version 1.6, is five pickles (a magic
number, a version, facts of the machine, the tensors, the keys of the storages) and
after them each storage's length and bytes. A pickle can call anything; this reader
knows the four names that a dictionary of tensors needs, and refuses all others.
"""

from collections import OrderedDict
from pathlib import Path
import pickle
from typing import Any
from typing import BinaryIO
from typing import NamedTuple

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {'FloatStorage': np.dtype('<f4'), 'LongStorage': np.dtype('<i8')}


class Tensor(NamedTuple):
  """Where a tensor is stored: ``offset`` and ``stride`` are counted in elements."""

  storage: tuple[Any, ...]
  offset: int
  size: tuple[int, ...]
  stride: tuple[int, ...]


def read(path: Path) -> dict[str, np.ndarray]:
  """The tensors of the file by name.

  Args:
    path: of a dictionary of float32 and int64 tensors, saved in the legacy format.

  Returns:
    Arrays; the layout is the file's, so not all of them are contiguous.

  Raises:
    pickle.UnpicklingError: if the file asks for anything but tensors.
    ValueError: if the file is of another format.
  """
  with path.open('rb') as file:
    if _Unpickler(file).load() != MAGIC:
      raise ValueError(f'{path} is not a file of torch.save in its legacy format.')
    _version, _machine = _Unpickler(file).load(), _Unpickler(file).load()
    tensors, keys = _Unpickler(file).load(), _Unpickler(file).load()
    dtypes = {tensor.storage[2]: tensor.storage[1] for tensor in tensors.values()}
    storages = {key: _storage(file, dtypes[key]) for key in keys}
  return {name: _view(tensor, storages) for name, tensor in tensors.items()}


class _Unpickler(pickle.Unpickler):
  """Knows tensors and nothing else."""

  def find_class(self, module: str, name: str) -> Any:
    match module, name:
      case 'collections', 'OrderedDict':
        return OrderedDict
      case 'torch._utils', '_rebuild_tensor_v2':
        return lambda storage, offset, size, stride, *_: Tensor(
          storage, offset, size, stride
        )
      case 'torch', name if name in STORAGES:
        return STORAGES[name]
    raise pickle.UnpicklingError(f'{module}.{name} is no part of a tensor.')

  def persistent_load(self, pid: tuple[Any, ...]) -> tuple[Any, ...]:
    return pid


def _storage(file: BinaryIO, dtype: np.dtype) -> np.ndarray:
  length = int.from_bytes(file.read(8), 'little')
  return np.frombuffer(file.read(length * dtype.itemsize), dtype)


def _view(tensor: Tensor, storages: dict[str, np.ndarray]) -> np.ndarray:
  storage = storages[tensor.storage[2]][tensor.offset :]
  strides = [storage.itemsize * stride for stride in tensor.stride]
  return np.lib.stride_tricks.as_strided(storage, tensor.size, strides, writeable=False)
