"""Builds `fashion_6000_2000.npz` from the files of Debian's `dataset-fashion-mnist`.

    apt-get download dataset-fashion-mnist
    dpkg -x dataset-fashion-mnist_*.deb fashion
    python benchmarks/data/fashion/build.py fashion/usr/share/datasets/fashion-mnist

The training images are 6,000 of the 60,000, drawn without replacement, and the test
images the first 2,000 of the 10,000. The arrays are those of the committed file, bit
for bit; the compressed file may differ in bytes.
"""

import argparse
import gzip
from pathlib import Path
from typing import Any

import numpy as np

TARGET = Path(__file__).parent / 'fashion_6000_2000.npz'
SEED = 1234


def images(path: Path) -> np.ndarray:
  """The images of an IDX file, ``[n, 28, 28]``, after its header of 16 bytes."""
  return np.frombuffer(gzip.decompress(path.read_bytes())[16:], np.uint8).reshape(
    -1, 28, 28
  )


def labels(path: Path) -> np.ndarray:
  """The labels of an IDX file, ``[n]``, after its header of 8 bytes."""
  return np.frombuffer(gzip.decompress(path.read_bytes())[8:], np.uint8)


def select(source: Path) -> dict[str, Any]:
  """The arrays of the subset: ``x, y`` to train with, ``xt, yt`` to test with."""
  rows = np.random.default_rng(SEED).permutation(60_000)[:6_000]
  return {
    'x': images(source / 'train-images-idx3-ubyte.gz')[rows],
    'y': labels(source / 'train-labels-idx1-ubyte.gz')[rows],
    'xt': images(source / 't10k-images-idx3-ubyte.gz')[:2_000],
    'yt': labels(source / 't10k-labels-idx1-ubyte.gz')[:2_000],
  }


def main() -> None:
  """Writes the file beside this script, or elsewhere."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('source', type=Path, help='where the four .gz files are')
  parser.add_argument('--out', type=Path, default=TARGET)
  args = parser.parse_args()
  np.savez_compressed(args.out, **select(args.source))
  print(f'Written: {args.out}')


if __name__ == '__main__':
  main()
