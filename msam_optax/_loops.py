"""The passes of a function that takes gradients: in a row, or as turns of one loop."""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp

from msam_optax import _devices
from msam_optax import _losses
from msam_optax import _microbatches
from msam_optax import _numerics
from msam_optax import _passes
from msam_optax import spaces

# ``(*args, **kwargs) -> (Output, grads)``, the latter a tuple of gradients.
Passes = Callable[..., tuple[_losses.Output, tuple[Any, ...]]]


def clean_pass(loss_fn: Callable[..., Any], argnums: Any, **options: Any) -> Passes:
  """The pass at the parameters, with a tuple of one gradient."""
  one_pass = _losses.differentiated(loss_fn, argnums, **options)

  def clean(*args, **kwargs):
    output, grads = one_pass(*args, **kwargs)
    return output, (grads,)

  return clean


def in_a_row(
  clean: Passes,
  setting: _passes.Setting,
  *,
  ascent: Passes | None = None,
  space: spaces.Space,
  argnums: Any,
  axis_name: Any,
) -> Passes:
  """The clean pass, and a pass at each probe.

  Args:
    clean: the pass at the parameters.
    setting: what the method is.
    ascent: the pass that is made there instead, on a part of the batch; or None.
    space: what the metric gets.
    argnums: the position of the parameters, or positions.
    axis_name: the mapped axis over which the clean gradient is averaged, or None.

  Returns:
    A function with the arguments of ``clean``, and its output; its gradients are the
    clean one and one for each probe, and the output has the marks of the latter.
  """

  def passes(*args, **kwargs):
    output, (grads,) = (ascent or clean)(*args, **kwargs)
    average, outputs = _mean(axis_name, output.weight), []
    begin = _passes.start(average(grads), select(args, argnums), setting)

    def evaluate(probe):
      at_probe, (grads,) = clean(*_replace(args, argnums, probe), **kwargs)
      outputs.append(at_probe)
      return None, grads

    probes = _passes.at_probes(
      begin,
      evaluate,
      setting,
      metric_state=_passes.init_metric(setting, begin.params),
      space=space,
      average=average,
      marked=False,
    )
    if ascent is not None:
      output = _of_whole(output, outputs[-1])
    return output._replace(marks=probes.marks), (begin.grads, *probes.grads)

  return passes


def in_one_loop(
  clean: Passes,
  setting: _passes.Setting,
  *,
  space: spaces.Space,
  argnums: Any,
  axis_name: Any,
  wide: bool,
) -> Passes:
  """All passes as turns of one loop, which starts from a gradient of zero.

  A gradient of zero is no perturbation, so the first turn is the clean pass. The loop
  carries the last gradients, as many as there are passes, the newest last.

  Args:
    clean: the pass at the parameters.
    setting: what the method is.
    space: what the metric gets.
    argnums: the position of the parameters, or positions.
    axis_name: the mapped axis over which all gradients are averaged, or None.
    wide: whether the gradients are float32 or wider, whatever the parameters are.

  Returns:
    A function like that of :func:`in_a_row`; the gradients are marked already.
  """
  scales = (0.0, *setting.combination.scales)

  def passes(*args, **kwargs):
    params = select(args, argnums)

    def turn(last, at):
      i, scale = at
      outputs = []

      def evaluate(probe):
        output, (grads,) = clean(*_replace(args, argnums, probe), **kwargs)
        outputs.append(output)
        return None, grads

      average = lambda grads: _mean(axis_name, outputs[-1].weight)(grads)
      begin = _passes.start(_clean_among(last, i), params, setting)
      probes = _passes.at_probes(
        begin,
        evaluate,
        setting,
        metric_state=_passes.init_metric(setting, begin.params),
        space=space,
        scales=(scale,),
        average=average,
      )
      new = jax.tree.map(lambda x, g: x.astype(g.dtype), probes.grads[0], begin.grads)
      return (*last[1:], average(new)), outputs[-1]

    zeros = _microbatches.zeros_like(params, () if axis_name is None else axis_name)
    zeros = _losses.map_gradients(_numerics.widen, zeros) if wide else zeros
    zeros = _passes.start(zeros, params, setting).grads
    turns = jnp.arange(len(scales)), jnp.asarray(scales)
    grads, outputs = jax.lax.scan(turn, (zeros,) * len(scales), turns)
    return jax.tree.map(lambda x: x[0], outputs), grads

  return passes


def select(args: Sequence[Any], argnums: Any) -> Any:
  """The parameters among the arguments: one, or a tuple of several."""
  if isinstance(argnums, Sequence):
    return tuple(args[i] for i in argnums)
  return args[argnums]


def _replace(args, argnums, params):
  """The arguments with other parameters."""
  if not isinstance(argnums, Sequence):
    argnums, params = (argnums,), (params,)
  new = list(args)
  for i, p in zip(argnums, params, strict=True):
    new[i] = p
  return new


def _of_whole(part, whole):
  """The output of a part of the batch, with the weight of the whole."""
  if part.weight is None:
    return part
  total = part.value / _numerics.divisor(part.weight) * whole.weight
  # A part of weight zero has no gradient, and so the probe is where the params are.
  value = jnp.where(part.weight == 0, whole.value, total)
  return _losses.Output(value, whole.weight, part.aux)


def _clean_among(last, i):
  """The clean gradient in turn ``i``, where it is the ``i``-th last."""
  if len(last) == 2:
    return last[-1]
  turns_ago = jnp.maximum(i - 1, 0)
  return jax.tree.map(functools.partial(jax.lax.select_n, turns_ago), *last[:0:-1])


def _mean(axis_name, weight):
  def mean(grads):
    _devices.check_varying(grads, axis_name)
    return spaces.mean(grads, axis_name, weight)

  return mean
