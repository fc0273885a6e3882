"""Two networks of a size that keeps a GPU busy: a transformer and a ResNet-18.

The transformer's layers are one `jax.lax.scan`, as large ones are trained, so that
XLA compiles one of them; parameters are made in one jitted call for the same reason.
"""

from collections.abc import Sequence

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from benchmarks.common.networks import Block
from benchmarks.common.networks import Problem


class Ends(nnx.Module):
  """What a decoder has before and after its blocks."""

  def __init__(self, vocabulary: int, length: int, width: int, *, rngs: nnx.Rngs):
    self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
    self.position = nnx.Embed(length, width, rngs=rngs)
    self.norm = nnx.LayerNorm(width, rngs=rngs)
    self.head = nnx.Linear(width, vocabulary, rngs=rngs)


class Residual(nnx.Module):
  """A basic block of ResNet-18 with GroupNorm."""

  def __init__(self, n: int, m: int, stride: int, groups: int, *, rngs: nnx.Rngs):
    conv = lambda n, m, k, stride: nnx.Conv(
      n, m, (k, k), strides=stride, use_bias=False, rngs=rngs
    )
    norm = lambda: nnx.GroupNorm(m, num_groups=groups, rngs=rngs)
    self.conv_1, self.norm_1 = conv(n, m, 3, stride), norm()
    self.conv_2, self.norm_2 = conv(m, m, 3, 1), norm()
    same = n == m and stride == 1
    self.shortcut = None if same else nnx.Sequential(conv(n, m, 1, stride), norm())

  def __call__(self, x: jax.Array) -> jax.Array:
    y = nnx.relu(self.norm_1(self.conv_1(x)))
    y = self.norm_2(self.conv_2(y))
    return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
  """ResNet with GroupNorm for BatchNorm: a step has no state but its parameters."""

  def __init__(
    self,
    width: int,
    stages: Sequence[int],
    classes: int,
    groups: int,
    *,
    rngs: nnx.Rngs,
  ):
    self.stem = nnx.Conv(3, width, (7, 7), strides=2, use_bias=False, rngs=rngs)
    self.norm = nnx.GroupNorm(width, num_groups=groups, rngs=rngs)
    blocks, n = [], width
    for i, count in enumerate(stages):
      m = width * 2**i
      for j in range(count):
        blocks.append(Residual(n, m, 2 if i and not j else 1, groups, rngs=rngs))
        n = m
    self.body = nnx.Sequential(*blocks)
    self.head = nnx.Linear(n, classes, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = nnx.relu(self.norm(self.stem(x)))
    x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding='SAME')
    return self.head(self.body(x).mean(axis=(1, 2)))


def transformer(
  *, vocabulary: int, length: int, width: int, layers: int, heads: int, batch: int
) -> Problem:
  """A decoder-only transformer on random tokens, float32."""
  make_ends = lambda key: Ends(vocabulary, length, width, rngs=nnx.Rngs(key))
  make_block = lambda key: Block(width, heads, rngs=nnx.Rngs(key))
  ends, block = _graph(make_ends), _graph(make_block)

  @jax.jit
  def init(key):
    keys = jax.random.split(key, layers)
    return {
      'blocks': jax.vmap(lambda key: _params(make_block(key)))(keys),
      'ends': _params(make_ends(key)),
    }

  def loss(params, data):
    x, y = data
    model = nnx.merge(ends, params['ends'])
    dtype = jax.tree.leaves(params)[0].dtype
    # nnx.Embed returns the dtype that it was made in, and the layers keep the wider.
    x = (model.embed(x) + model.position(jnp.arange(length))[None]).astype(dtype)
    layer = lambda x, params: (nnx.merge(block, params)(x), None)
    x, _ = jax.lax.scan(layer, x, params['blocks'])
    return _cross_entropy(model.head(model.norm(x)), y)

  tokens = jax.random.randint(jax.random.key(1), (batch, length + 1), 0, vocabulary)
  return Problem(loss, init(jax.random.key(0)), (tokens[:, :-1], tokens[:, 1:]))


def resnet(
  *,
  size: int,
  width: int,
  stages: Sequence[int],
  classes: int,
  groups: int,
  batch: int,
) -> Problem:
  """A ResNet on random images, float32; ``stages=(2, 2, 2, 2)`` is ResNet-18."""
  make = lambda key: ResNet(width, stages, classes, groups, rngs=nnx.Rngs(key))
  graph = _graph(make)

  def loss(params, data):
    x, y = data
    return _cross_entropy(nnx.merge(graph, params)(x), y)

  params = jax.jit(lambda key: _params(make(key)))(jax.random.key(0))
  images = jax.random.normal(jax.random.key(1), (batch, size, size, 3))
  labels = jax.random.randint(jax.random.key(2), (batch,), 0, classes)
  return Problem(loss, params, (images, labels))


def in_bfloat16(problem: Problem) -> Problem:
  """The same with bfloat16 arithmetic: parameters and loss stay float32.

  Parameters and images are rounded in the loss, so gradients, the probe and the
  optimizer's state are float32, as in mixed-precision training.
  """

  def narrow(x):
    return x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x

  def loss(params, batch):
    return problem.loss(*jax.tree.map(narrow, (params, batch)))

  return problem._replace(loss=loss)


def _params(model):
  return nnx.state(model, nnx.Param)


def _graph(make):
  return nnx.graphdef(nnx.eval_shape(make, jax.random.key(0)))


def _cross_entropy(logits, labels):
  losses = optax.losses.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), labels
  )
  return losses.mean()
