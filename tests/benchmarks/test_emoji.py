"""The emoji features: the committed file, and the pure parts of what builds it."""

from collections import OrderedDict
import itertools
import json
import math
import os
import pickle
import struct
import sys
import types
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.alignment import data as alignment_data
from benchmarks.data.emoji import build as build_emoji
from benchmarks.data.emoji import efficientnet_lite0
from benchmarks.data.emoji import minilm
from benchmarks.data.emoji import pictures as emoji_pictures
from benchmarks.data.emoji import torch_file

pytestmark = pytest.mark.standard_promotion


@pytest.fixture(scope='module')
def file():
  with np.load(alignment_data.FEATURES) as file:
    return dict(file)


def test_the_file_has_the_documented_arrays(file):
  assert {name: (x.dtype.str, x.shape) for name, x in file.items()} == {
    'images': ('|i1', (2, 1857, 256)),
    'image_scale': ('<f4', (256,)),
    'text': ('|i1', (1857, 128)),
    'text_scale': ('<f4', (128,)),
    'names': (file['names'].dtype.str, (1857,)),
    'group': ('<i8', (1857,)),
  }
  assert file['names'].dtype.kind == 'U'
  assert set(file['group']) == set(range(9))
  assert alignment_data.FEATURES.stat().st_size < 3e6


def test_the_file_has_no_duplicates_and_no_skin_tones(file):
  assert len(set(file['names'])) == 1857
  assert not any('skin tone' in name for name in file['names'])
  for features in (*file['images'], file['text']):
    assert len(np.unique(features, axis=0)) == 1857


def test_scales_are_finite_and_use_the_range(file):
  for name in ('image', 'text'):
    values = file['images' if name == 'image' else 'text']
    assert np.isfinite(file[f'{name}_scale']).all()
    assert (file[f'{name}_scale'] > 0).all()
    columns = values.reshape(-1, values.shape[-1]).astype(int)
    np.testing.assert_array_equal(np.abs(columns).max(axis=0), 127)


def test_components_are_centred_uncorrelated_and_in_order(file):
  """What makes them principal, up to the rounding."""
  for values, scale in (('images', 'image_scale'), ('text', 'text_scale')):
    x = (file[values] * file[scale].astype(float)).reshape(-1, len(file[scale]))
    sd = x.std(axis=0)
    assert np.abs(x.mean(axis=0) / sd).max() < 0.01
    assert (np.diff(sd) < 0.01 * sd[0]).all()
    correlation = np.corrcoef(x.T) - np.eye(len(sd))
    assert np.abs(correlation).max() < 0.01


def test_the_two_drawings_of_a_concept_are_alike(file):
  """A shift by one row would bring it to chance, 1 in 1857."""
  x = file['images'] * file['image_scale']
  x -= x.mean(axis=1, keepdims=True)
  x /= np.linalg.norm(x, axis=2, keepdims=True)
  nearest = (x[0] @ x[1].T).argmax(axis=1)
  assert (nearest == np.arange(1857)).mean() > 0.2


def test_like_names_are_near(file):
  x = file['text'] * file['text_scale']
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  row = {name: x[i] for i, name in enumerate(file['names'])}

  def cosine(a, b):
    return row[a] @ row[b]

  for a, b, other in (
    ('angry face', 'enraged face', 'banana'),
    ('dog', 'poodle', 'bar chart'),
    ('sailboat', 'ferry', 'red heart'),
    ('flag: Sweden', 'flag: Denmark', 'pretzel'),
  ):
    assert cosine(a, b) > cosine(a, other) + 0.2


def test_concepts_are_in_order_and_without_skin_tones(tmp_path):
  def entry(name, group, order, skintone=''):
    row = {'emoji': name[0], 'hexcode': f'{ord(name[0]):X}', 'annotation': name}
    return {**row, 'group': group, 'order': order, 'skintone': skintone}

  rows = [
    entry('Peru', 'flags', 9),
    entry('smile', 'smileys-emotion', 1),
    entry('dark smile', 'smileys-emotion', 2, 'dark'),
    entry('dark', 'component', 3),
    entry('logo', 'extras-openmoji', ''),
  ]
  (tmp_path / 'data').mkdir()
  (tmp_path / 'data' / 'openmoji.json').write_text(json.dumps(rows))
  assert emoji_pictures.concepts(tmp_path) == [
    ('s', '73', 'smile', 0),
    ('P', '50', 'Peru', 8),
  ]


def write_legacy(path, tensors, monkeypatch):
  """A PyTorch file of the legacy format, under the names that PyTorch would write."""
  torch, utils = types.ModuleType('torch'), types.ModuleType('torch._utils')
  torch.FloatStorage = type('FloatStorage', (), {'__module__': 'torch'})

  def _rebuild_tensor_v2():
    pass

  _rebuild_tensor_v2.__module__ = 'torch._utils'
  _rebuild_tensor_v2.__qualname__ = '_rebuild_tensor_v2'
  utils._rebuild_tensor_v2 = _rebuild_tensor_v2
  monkeypatch.setitem(sys.modules, 'torch', torch)
  monkeypatch.setitem(sys.modules, 'torch._utils', utils)

  class Tensor(NamedTuple):
    storage: Any
    offset: int
    size: tuple
    stride: tuple

    def __reduce__(self):
      return _rebuild_tensor_v2, (*self, False, OrderedDict())

  class Storage(NamedTuple):
    key: str
    values: list

  class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
      if isinstance(obj, Storage):
        return 'storage', torch.FloatStorage, obj.key, 'cpu', len(obj.values), None
      return None

  storages = [Storage('7', list(range(6))), Storage('3', [0.5, -0.5])]
  made = OrderedDict(
    (name, Tensor(storages[i], *where)) for name, (i, *where) in tensors.items()
  )
  with path.open('wb') as file:
    for part in (torch_file.MAGIC, 1001, {'little_endian': True}, made, ['7', '3']):
      Pickler(file, protocol=2).dump(part)
    for storage in storages:
      length = len(storage.values)
      file.write(struct.pack(f'<q{length}f', length, *storage.values))


def test_a_legacy_file_is_read_with_its_strides(tmp_path, monkeypatch):
  path = tmp_path / 'model.pth'
  tensors = {
    'plain': (0, 0, (2, 3), (3, 1)),
    'transposed': (0, 0, (3, 2), (1, 3)),
    'part': (0, 2, (2,), (2,)),
    'other': (1, 0, (2,), (1,)),
  }
  write_legacy(path, tensors, monkeypatch)
  monkeypatch.undo()
  got = torch_file.read(path)
  assert list(got) == list(tensors)
  np.testing.assert_array_equal(got['plain'], [[0, 1, 2], [3, 4, 5]])
  np.testing.assert_array_equal(got['transposed'], [[0, 3], [1, 4], [2, 5]])
  np.testing.assert_array_equal(got['part'], [2, 4])
  np.testing.assert_array_equal(got['other'], [0.5, -0.5])
  assert got['plain'].dtype == np.float32


def test_a_file_that_calls_something_is_refused(tmp_path):
  class Evil:
    def __reduce__(self):
      return os.mkdir, (str(tmp_path / 'made'),)

  path = tmp_path / 'evil.pth'
  path.write_bytes(pickle.dumps(Evil()))
  with pytest.raises(pickle.UnpicklingError, match=r'mkdir is no part of a tensor'):
    torch_file.read(path)
  assert not (tmp_path / 'made').exists()


def test_another_format_is_refused(tmp_path):
  path = tmp_path / 'model.pth'
  path.write_bytes(pickle.dumps(1))
  with pytest.raises(ValueError, match=r'not a file of torch\.save in its legacy'):
    torch_file.read(path)


def relu6(x):
  return np.clip(x, 0, 6)


def layer(rng, *shape):
  return efficientnet_lite0.Layer(rng.normal(size=shape), rng.normal(size=shape[0]))


@pytest.mark.parametrize(
  ('size', 'kernel', 'stride', 'padding'),
  [(6, 3, 2, (0, 1)), (5, 3, 2, (1, 1)), (6, 5, 2, (1, 2)), (5, 5, 1, (2, 2))],
)
def test_a_block_equals_its_definition(size, kernel, stride, padding):
  """TensorFlow's SAME pads an odd row at the end."""
  rng = np.random.default_rng(size + kernel)
  x = rng.normal(size=(2, size, size, 3)).astype(np.float32)
  layers = [layer(rng, 6, 3, 1, 1), layer(rng, 6, 1, kernel, kernel)]
  layers += [layer(rng, 3, 6, 1, 1)]
  expand, middle, project = layers
  wide = relu6(np.einsum('nhwi,oi->nhwo', x, expand.kernel[:, :, 0, 0]) + expand.bias)
  wide = np.pad(wide, ((0, 0), padding, padding, (0, 0)))
  out = -(-size // stride)
  want = np.zeros((2, out, out, 6))
  for n, i, j, c in itertools.product(range(2), range(out), range(out), range(6)):
    i_at, j_at = stride * i, stride * j
    window = wide[n, i_at : i_at + kernel, j_at : j_at + kernel, c]
    want[n, i, j, c] = np.sum(window * middle.kernel[c, 0]) + middle.bias[c]
  want = np.einsum('nhwi,oi->nhwo', relu6(want), project.kernel[:, :, 0, 0])
  want += project.bias
  if stride == 1:
    want += x
  layers = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), layers)
  got = efficientnet_lite0.block(jnp.asarray(x), layers, stride)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('size', [6, 7])
def test_depthwise_equals_xla(size, stride):
  rng = np.random.default_rng(stride)
  x = jnp.asarray(rng.normal(size=(2, size, size, 4)), jnp.float32)
  kernel = jnp.asarray(rng.normal(size=(4, 1, 3, 3)), jnp.float32)
  got = efficientnet_lite0.depthwise(
    x, efficientnet_lite0.Layer(kernel, jnp.zeros(4)), stride
  )
  want = jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    'SAME',
    dimension_numbers=('NHWC', 'OIHW', 'NHWC'),
    feature_group_count=4,
  )
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_batch_norm_is_folded():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 4, 4, 3)).astype(np.float32)
  norm = {
    'bn.weight': rng.normal(size=5),
    'bn.bias': rng.normal(size=5),
    'bn.running_mean': rng.normal(size=5),
    'bn.running_var': rng.uniform(0.1, 2, size=5),
  }
  kernel = rng.normal(size=(5, 3, 1, 1))
  tensors = {'c.weight': kernel, **norm}
  tensors = {name: value.astype(np.float32) for name, value in tensors.items()}
  folded = efficientnet_lite0.fold(tensors, 'c', 'bn')
  got = efficientnet_lite0.convolve(jnp.asarray(x), folded)
  y = np.einsum('nhwi,oi->nhwo', x, kernel[:, :, 0, 0])
  y = (y - norm['bn.running_mean']) / np.sqrt(norm['bn.running_var'] + 1e-3)
  want = y * norm['bn.weight'] + norm['bn.bias']
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def tiny_minilm(rng, width=24, inner=8, vocabulary=11):
  shapes = {
    'embeddings.word_embeddings.weight': (vocabulary, width),
    'embeddings.position_embeddings.weight': (9, width),
    'embeddings.token_type_embeddings.weight': (2, width),
  }
  norms, linears = ['embeddings.LayerNorm'], {}
  for i in range(minilm.LAYERS):
    at = f'encoder.layer.{i}'
    for part in ('query', 'key', 'value'):
      linears[f'{at}.attention.self.{part}'] = (width, width)
    linears[f'{at}.attention.output.dense'] = (width, width)
    linears[f'{at}.intermediate.dense'] = (inner, width)
    linears[f'{at}.output.dense'] = (width, inner)
    norms += [f'{at}.attention.output.LayerNorm', f'{at}.output.LayerNorm']
  for name in norms:
    shapes[f'{name}.weight'] = shapes[f'{name}.bias'] = (width,)
  for name, shape in linears.items():
    shapes[f'{name}.weight'], shapes[f'{name}.bias'] = shape, shape[:1]
  return {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}


def sentence_by_hand(t, ids):
  """One sentence without padding, head by head."""

  def norm(at, x):
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-12)
    return x * t[f'{at}.weight'] + t[f'{at}.bias']

  def linear(at, x):
    return x @ t[f'{at}.weight'].T.astype(float) + t[f'{at}.bias']

  def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2

  x = t['embeddings.word_embeddings.weight'][ids].astype(float)
  x += t['embeddings.position_embeddings.weight'][: len(ids)]
  x = norm('embeddings.LayerNorm', x + t['embeddings.token_type_embeddings.weight'][0])
  for i in range(minilm.LAYERS):
    at = f'encoder.layer.{i}'
    q, k, v = (
      np.split(linear(f'{at}.attention.self.{part}', x), minilm.HEADS, axis=1)
      for part in ('query', 'key', 'value')
    )
    heads = []
    for q_head, k_head, v_head in zip(q, k, v, strict=True):
      weights = np.exp(q_head @ k_head.T / math.sqrt(q_head.shape[1]))
      heads.append(weights / weights.sum(axis=1, keepdims=True) @ v_head)
    y = linear(f'{at}.attention.output.dense', np.concatenate(heads, axis=1))
    x = norm(f'{at}.attention.output.LayerNorm', x + y)
    y = linear(f'{at}.output.dense', gelu(linear(f'{at}.intermediate.dense', x)))
    x = norm(f'{at}.output.LayerNorm', x + y)
  return x.mean(axis=0) / np.linalg.norm(x.mean(axis=0))


def test_minilm_equals_its_definition_whatever_the_padding():
  tensors = tiny_minilm(np.random.default_rng(0))
  ids = np.array([[1, 5, 2, 0, 0], [1, 7, 3, 10, 2]])
  mask = np.array([[True, True, True, False, False], [True] * 5])
  got = minilm.features(jax.tree.map(jnp.asarray, tensors), ids, mask)
  want = [sentence_by_hand(tensors, ids[0, :3]), sentence_by_hand(tensors, ids[1])]
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_principal_components_are_those_of_the_svd():
  x = np.random.default_rng(0).normal(size=(40, 6)) @ np.diag([5, 4, 3, 2, 1, 0.5])
  got = build_emoji.principal(x.astype(np.float32), 3)
  u, size, axes = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
  want = u[:, :3] * size[:3]
  sign = np.sign([axis[np.abs(axis).argmax()] for axis in axes[:3]])
  np.testing.assert_allclose(got, want * sign, atol=1e-5)


def test_rounding_errs_by_half_a_scale_at_most():
  x = np.random.default_rng(0).normal(size=(50, 4)) * [1, 10, 0.1, 3]
  rounded, scale = build_emoji.quantise(x)
  assert (rounded.dtype, scale.dtype) == (np.int8, np.float32)
  np.testing.assert_array_equal(np.abs(rounded.astype(int)).max(axis=0), 127)
  assert (np.abs(rounded * scale - x) <= 0.5001 * scale).all()
