"""A two-tower contrastive model on frozen features, tuned by one of four methods."""

import functools
import itertools
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from msam_optax import msam
from msam_optax import sam

NEIGHBOURS = 8
LAST = 20
METHODS = ('SGD', 'Adam', 'SAM', 'Monge SAM')


class Settings(NamedTuple):
  """All that is the same for every method.

  Attributes:
    batch: pairs per step.
    steps: of fine-tuning.
    pretrain_steps: of pretraining, with Adam.
    pretrain_rate: its learning rate.
    hidden: width of the hidden layer of either head.
    width: of the common space.
  """

  batch: int = 128
  steps: int = 300
  pretrain_steps: int = 300
  pretrain_rate: float = 1e-3
  hidden: int = 128
  width: int = 64


class Data(NamedTuple):
  """``text [N, 128]`` and ``images [2, N, 256]`` of :class:`alignment_data.Emoji`."""

  text: jax.Array
  images: jax.Array


class Run(NamedTuple):
  """What one training run came to; scalars, but for the params.

  Attributes:
    params: after the last step.
    loss: mean of the training loss over the last ``LAST`` batches, each before its
      step; not finite if any loss of the run was not.
    factor: mean over all steps of ``√(1 + n²)``, ``n`` the gradient norm.
    shrink: mean over all steps of ``1/√(1 + n²)``.
  """

  params: Any
  loss: jax.Array
  factor: jax.Array
  shrink: jax.Array


class Scores(NamedTuple):
  """Of concepts never trained on.

  Attributes:
    knn: mutual-kNN alignment of names and pictures.
    loss: contrastive loss with all the concepts in one batch.
    recall: recall@1, mean of name to picture and picture to name.
  """

  knn: jax.Array
  loss: jax.Array
  recall: jax.Array


def diverged(loss: float, batch: int) -> bool:
  """The rule, fixed before any run: training loss above 85 % of ln(batch), or NaN.

  ln(batch) is the loss of a model that has lost all information about which name
  belongs to which picture, whatever its parameters: SAM's failures in the paper end
  there (4.852 = ln 128). A model that is still slightly better than chance has failed
  as well, hence 85 % of it; what training comes to otherwise is far below.
  """
  return not loss <= 0.85 * math.log(batch)


def optimizer(
  method: str, learning_rate: Any, rho: Any
) -> optax.GradientTransformationExtraArgs:
  """The method at a learning rate and a radius, both of which may be traced."""
  if method == 'Adam':
    return optax.with_extra_args_support(optax.adam(learning_rate))
  sgd = optax.with_extra_args_support(optax.sgd(learning_rate))
  if method == 'SGD':
    return sgd
  return optax.chain({'SAM': sam, 'Monge SAM': msam}[method](rho), sgd)


def init(key: jax.Array, data: Data, settings: Settings) -> Any:
  """Two heads of one hidden layer each, and the logarithm of CLIP's temperature."""

  def head(key, inputs):
    keys = jax.random.split(key)
    widths = (inputs, settings.hidden, settings.width)
    draw = jax.nn.initializers.lecun_normal()
    return [
      {'w': draw(k, shape), 'b': jnp.zeros(shape[1])}
      for k, shape in zip(keys, itertools.pairwise(widths), strict=True)
    ]

  text_key, image_key = jax.random.split(key)
  return {
    'text': head(text_key, data.text.shape[-1]),
    'image': head(image_key, data.images.shape[-1]),
    'log_scale': jnp.log(1 / 0.07),
  }


def embed(head: Any, x: jax.Array) -> jax.Array:
  """Features to the unit sphere of the common space."""
  hidden, out = head
  return unit(jax.nn.gelu(x @ hidden['w'] + hidden['b']) @ out['w'] + out['b'])


def logits(params: Any, text: jax.Array, image: jax.Array) -> jax.Array:
  """Scaled cosines of every name (row) with every picture; scale at most 100."""
  scale = jnp.exp(jnp.minimum(params['log_scale'], math.log(100)))
  return scale * embed(params['text'], text) @ embed(params['image'], image).T


def contrastive(logits: jax.Array) -> jax.Array:
  """CLIP's loss: cross entropy of the right pair, both ways."""
  right = jnp.arange(len(logits))
  entropy = optax.losses.softmax_cross_entropy_with_integer_labels
  return (entropy(logits, right).mean() + entropy(logits.T, right).mean()) / 2


@functools.partial(jax.jit, static_argnames='method')
@functools.partial(jax.vmap, in_axes=(None, None, 0, 0, None, None))
def train(method, data, params, batches, learning_rate, rho) -> Run:
  """Trains the params of several seeds, each on its own batches, in one scan."""
  tx = optimizer(method, learning_rate, rho)

  def step(carry, batch):
    params, state = carry
    concepts, styles = batch
    text, image = data.text[concepts], data.images[styles, concepts]
    grad_fn = jax.value_and_grad(lambda p: contrastive(logits(p, text, image)))
    loss, grads = grad_fn(params)
    updates, state = tx.update(grads, state, params, grad_fn=lambda p: grad_fn(p)[1])
    norm = optax.tree.norm(grads)
    return (optax.apply_updates(params, updates), state), (loss, norm)

  (params, _), (losses, norms) = jax.lax.scan(step, (params, tx.init(params)), batches)
  factor = jnp.hypot(1.0, norms)
  last = jnp.where(jnp.isfinite(losses).all(), losses[-LAST:].mean(), jnp.nan)
  return Run(params, last, factor.mean(), (1 / factor).mean())


@functools.partial(jax.jit, static_argnames='styles')
@functools.partial(jax.vmap, in_axes=(None, 0, 0, None))
def evaluate(data, params, concepts, styles) -> Scores:
  """Scores on the concepts, mean over the styles."""

  def score(style):
    text = embed(params['text'], data.text[concepts])
    image = embed(params['image'], data.images[style, concepts])
    table = logits(params, data.text[concepts], data.images[style, concepts])
    right = jnp.arange(len(concepts))
    hits = [jnp.mean(jnp.argmax(t, axis=1) == right) for t in (table, table.T)]
    return Scores(
      mutual_knn(text, image, NEIGHBOURS), contrastive(table), (hits[0] + hits[1]) / 2
    )

  scores = [score(style) for style in styles]
  return jax.tree.map(lambda *values: sum(values) / len(values), *scores)


def mutual_knn(
  text_features: jax.Array, image_features: jax.Array, k: int = 8
) -> jax.Array:
  """Mean share of the k nearest neighbours that two spaces have in common.

  Row ``i`` of both arrays is the same thing, say a name and its picture. Near is what
  has a large cosine similarity, and a point is not its own neighbour. Of points at the
  same distance the one with the lower index counts as nearer. Unrelated spaces have
  about ``k/(N − 1)``, the same neighbours everywhere are 1.

  Args:
    text_features: ``[N, D]``.
    image_features: ``[N, E]``; ``E`` need not be ``D``.
    k: number of neighbours, 1 <= k < N.

  Returns:
    A scalar between 0 and 1.

  Raises:
    ValueError: if the arrays are not of as many points, or ``k`` is out of range.

  References:
    Huh et al., `The Platonic Representation Hypothesis
    <https://arxiv.org/abs/2405.07987>`_, 2024
  """
  points = len(text_features)
  if len(image_features) != points:
    raise ValueError(
      'The same points are needed in both spaces, got'
      f' {points} and {len(image_features)}.'
    )
  if not 1 <= k < points:
    raise ValueError(f'`k` must be in [1, {points - 1}], got {k}.')
  common = _neighbours(text_features, k) & _neighbours(image_features, k)
  return jnp.sum(common) / (points * k)


def unit(x: jax.Array, eps: float = 1e-12) -> jax.Array:
  """Rows of length one; a zero row stays zero and has a finite gradient."""
  return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + eps)


def _neighbours(x, k):
  """``[N, N]`` bools: whether column j is among the k nearest of row i."""
  x = unit(x)
  similarity = jnp.where(jnp.eye(len(x), dtype=bool), -jnp.inf, x @ x.T)
  _, nearest = jax.lax.top_k(similarity, k)
  rows = jnp.arange(len(x))[:, None]
  return jnp.zeros(similarity.shape, bool).at[rows, nearest].set(True)
