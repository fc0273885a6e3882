"""The passes of a function that takes gradients: in a row, or as turns of one loop."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msam_optax import _devices
from msam_optax import _losses
from msam_optax import _masks
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
  """All passes as turns of one loop, see :func:`in_turns`.

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

  def passes(*args, **kwargs):
    params = select(args, argnums)

    def evaluate(point):
      output, (grads,) = clean(*_replace(args, argnums, point), **kwargs)
      return output, grads

    zeros = _microbatches.zeros_like(params, () if axis_name is None else axis_name)
    zeros = _losses.map_gradients(_numerics.widen, zeros) if wide else zeros
    output, grads, probes = in_turns(
      evaluate,
      params,
      setting,
      zeros=zeros,
      average=lambda grads, output: _mean(axis_name, output.weight)(grads),
      metric_state=_passes.init_metric(setting, params),
      space=lambda _: space,
    )
    return output, (grads, *probes.grads)

  return passes


def from_params(
  evaluate: Callable[..., tuple[Any, Any]],
  params: Any,
  setting: _passes.Setting,
  *,
  average: Callable[[Any], Any],
  names: Any,
  value: Any,
  extra_args: Mapping[str, Any],
  **options: Any,
) -> tuple[Any, _passes.Start, Any, _passes.Probes]:
  """All passes of a transformation that is given no gradient, in one loop.

  Args:
    evaluate: of :func:`_evaluation.evaluation`.
    params: pytree of arrays, ``w``.
    setting: what the method is.
    average: ``grads -> grads``, what is done to the gradient of each pass.
    names: the mapped axis or axes over which that averages, or none.
    value: the loss at the params, if the caller has it.
    extra_args: what else the metric may know.
    **options: of :func:`in_turns`.

  Returns:
    The value at the params, or None; what the probes have started from; the gradient
    there as it came, zero where there is none; and the probes.
  """
  clean_value, grads = jax.eval_shape(evaluate, params)

  def zero(path, g):
    if _has_no_numbers(g):
      return np.zeros(g.shape, g.dtype)
    return _microbatches.zeros_like(jnp.asarray(leaves[path]), names).astype(g.dtype)

  leaves = dict(jax.tree_util.tree_leaves_with_path(params))
  zeros = jax.tree_util.tree_map_with_path(zero, grads)

  def one_pass(point):
    value, grads = evaluate(point, zeros, dtypes=setting.dtype is None)
    return value, _with_numbers(grads)

  known = value is None and clean_value is not None
  clean_value, clean, probes = in_turns(
    one_pass,
    params,
    setting,
    zeros=_with_numbers(zeros),
    average=lambda grads, value: average(grads),
    value=jnp.zeros([], _numerics.wide_dtype(clean_value)) if known else None,
    extra_args=extra_args if value is None else {**extra_args, 'value': value},
    **options,
  )
  begin = _passes.start(zeros, params, setting)
  like = jax.tree.map(
    lambda z, g: z if _has_no_numbers(z) else g.astype(jnp.result_type(z)),
    _masks.fill(zeros, begin.present, params),
    clean,
  )
  return clean_value, begin._replace(grads=clean), like, probes


def in_turns(
  evaluate: Callable[[Any], tuple[Any, Any]],
  params: Any,
  setting: _passes.Setting,
  *,
  zeros: Any,
  average: Callable[[Any, Any], Any],
  metric_state: Any,
  space: Callable[[Any], spaces.Space],
  count: Any = None,
  value: Any = None,
  extra_args: Mapping[str, Any] | None = None,
) -> tuple[Any, Any, _passes.Probes]:
  """The gradients of one step, each in a turn of one loop, which holds one copy.

  A gradient of zero is no perturbation, so the first turn is the clean pass. The loop
  carries the last gradients, as many as there are passes, the newest last.

  Args:
    evaluate: ``params -> (value, grads)``; the value may be any tree of arrays.
    params: pytree of arrays, ``w``.
    setting: what the method is.
    zeros: a gradient of zero, of the types that those of ``average`` have, with None
      where there is none.
    average: ``(grads, value) -> grads``, the mean of the gradients of one pass.
    metric_state: the metric's state before the step.
    space: what the metric gets, a function of the gradient that it gets.
    count: int32 scalar, the steps so far, if ``rho`` is a schedule.
    value: a zero of the type of the value, if it is a scalar that the metric may know.
    extra_args: what else the metric may know.

  Returns:
    The value at the params, the gradient there, and the probes: their gradients, and
    slope, radius and value of the first. Gradients are zero where there are none.
  """
  scales = (0.0, *setting.combination.scales)
  extra_args = {} if extra_args is None else extra_args

  def turn(carry, at):
    last, _, clean_value = carry
    i, scale = at
    first = i == 0
    begin = _passes.start(_clean_among(last, i), params, setting)
    known = {} if clean_value is None else {'value': clean_value}
    values = []

    def one_pass(point):
      value, grads = evaluate(point)
      values.append(value)
      return value, grads

    mean = lambda grads: average(grads, values[-1])
    probes = _passes.at_probes(
      begin,
      one_pass,
      setting,
      metric_state=metric_state,
      space=space(begin.grads),
      count=count,
      scales=(scale,),
      average=mean,
      unperturbed=first,
      extra_args={**known, **extra_args},
    )
    new = jax.tree.map(lambda x, g: x.astype(g.dtype), probes.grads[0], begin.grads)
    new = (*last[1:], mean(_masks.leave_out(new, begin.present)))
    if clean_value is not None:
      new_value = jnp.asarray(probes.value, clean_value.dtype)
      clean_value = jnp.where(first, new_value, clean_value)
    # Every turn begins with the state before the step, so the last one's is the next.
    carry = new, probes.metric_state, clean_value
    return carry, (probes.value, probes.slope, probes.radius)

  begin = _passes.start(zeros, params, setting)
  zeros = _masks.leave_out(begin.grads, begin.present)
  turns = jnp.arange(len(scales)), jnp.asarray(scales)
  carry = _settled(turn, ((zeros,) * len(scales), metric_state, value), turns)
  (grads, metric_state, _), recorded = jax.lax.scan(turn, carry, turns)
  grads = [_masks.fill(g, begin.present, params) for g in grads]
  (clean_value, _, _), (value, slope, radius) = (
    jax.tree.map(lambda x, i=i: x[i], recorded) for i in (0, 1)
  )
  probes = _passes.Probes(tuple(grads[1:]), slope, radius, value, metric_state)
  return clean_value, grads[0], probes


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


def _has_no_numbers(x):
  """Whether it is what JAX has as the gradient of integers."""
  return jnp.result_type(x) == jax.dtypes.float0


def _with_numbers(grads):
  """Gradients with None for those that have no numbers, which no loop carries."""
  return jax.tree.map(lambda g: None if _has_no_numbers(g) else g, grads)


def _settled(turn, carry, turns):
  """What a loop carries, as varying along manual axes as it is after a turn.

  A state that all devices share is one of each after its metric has seen the gradient
  of each.
  """
  gradients, *rest = carry
  if not jax.tree.leaves(rest):
    return carry
  _, *after = jax.eval_shape(turn, carry, jax.tree.map(lambda x: x[0], turns))[0]

  def settle(x, new):
    axes = _devices.varying_axes(new) - _devices.varying_axes(x)
    return _devices.as_varying(x, axes)

  return (gradients, *jax.tree.map(settle, rest, after))


def _mean(axis_name, weight):
  def mean(grads):
    _devices.check_varying(grads, axis_name)
    return spaces.mean(grads, axis_name, weight)

  return mean
