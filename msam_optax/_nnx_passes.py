"""The passes of a loss of NNX models: what they return, and what they change."""

from collections.abc import Callable
import itertools
import operator
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from msam_optax import _forwarding
from msam_optax import _masks
from msam_optax import _nnx_arguments
from msam_optax import _nnx_losses
from msam_optax import combinations
from msam_optax import gradients
from msam_optax import metrics


def in_two_copies(
  start: _nnx_arguments.Start,
  metric: metrics.Metric,
  rho: Any,
  combination: combinations.Combination,
  *,
  mask: Any,
  **options: Any,
) -> tuple[Any, Any]:
  """The clean pass with the arguments themselves, and one at each probe with copies.

  Args:
    start: what the loss function is called with. The clean pass changes it.
    metric: a metric without state.
    rho: ``ρ``, scalar >= 0.
    combination: a combination without state.
    mask: which leaves of ``start.params`` are perturbed.
    **options: of :func:`gradients.without_state`.

  Returns:
    What ``nnx.value_and_grad`` returns, with the update as gradients.
  """
  mask = _without_others(mask, start)
  update = gradients.without_state(metric, rho, combination, mask=mask, **options)
  differentiate = _differentiated(start)
  value, grads = differentiate(*start.inputs)

  def grad_fn(params):
    probe = _nnx_arguments.by_path(params, start.argnums)
    return differentiate(*_nnx_arguments.merge(start, probe))[1]

  return value, update(grads, start.params, grad_fn)


def in_one_loop(
  start: _nnx_arguments.Start,
  metric: metrics.Metric,
  rho: Any,
  combination: combinations.Combination,
  *,
  mask: Any,
  **options: Any,
) -> tuple[Any, Any]:
  """Like :func:`in_two_copies`, with all passes as turns of one loop.

  Every turn returns the variables that it changes, and the arguments get those of the
  clean one.
  """
  changes = _changes(start)

  def pure(params):
    inputs = _nnx_arguments.merge(start, _nnx_arguments.by_path(params, start.argnums))
    output = start.loss_fn(*inputs)
    value, aux = output if start.has_aux else (output, None)
    after = _flat(inputs)
    changed = [_cast(after[path], dtypes) for path, dtypes in changes.items()]
    return value, (aux, changed)

  value_and_grad_of = gradients.value_and_grad(
    pure,
    metric,
    rho,
    combination,
    has_aux=True,
    compile_once=True,
    mask=_without_others(mask, start),
    **options,
  )
  (value, (aux, changed)), grads = value_and_grad_of(start.params)
  new = nnx.from_flat_state(list(zip(changes, changed, strict=True)))
  nnx.update(start.inputs, new)
  return (value, aux) if start.has_aux else value, grads


def of_params(start: _nnx_arguments.Start) -> Callable[[Any], tuple[jax.Array, Any]]:
  """The loss and its gradients as a function of parameters, always from that start.

  Args:
    start: what the loss function is called with.

  Returns:
    ``params -> (loss, grads)``, where ``grads`` has the structure of ``params``.
  """

  def value_and_grad_fn(params):
    probe = _nnx_arguments.by_path(params, start.argnums)
    _check_not_overwritten(probe, start)
    value, grads = _differentiated(start)(*_nnx_arguments.merge(start, probe))
    grads = _nnx_arguments.by_path(grads, start.argnums)
    if missing := [path for path in probe if path not in grads]:
      raise ValueError(
        'The gradients that `loss_fn` has are of other variables than those that are'
        f' trained: they have none at {_nnx_arguments.names(missing[0])}. Where only'
        ' some are trained, give the same `argnums=nnx.DiffState(position, filter)`'
        ' here and to nnx.value_and_grad, and the same filter as `wrt` of'
        ' nnx.Optimizer.'
      )
    grads = _nnx_arguments.fill(params, grads, start.argnums)
    return value[0] if start.has_aux else value, grads

  return value_and_grad_fn


def _check_not_overwritten(paths, start):
  """Raises if the clean pass has overwritten weights, at which its gradient is.

  The arrays alone do not tell: what a pass hands back, as `nnx.scan` does, is another
  array as well. So it goes by the layers that are known to overwrite.
  """
  layers = tuple(
    getattr(nnx, name) for name in ('SpectralNorm', 'WeightNorm') if hasattr(nnx, name)
  )
  found = [type(x) for _, x in nnx.iter_graph(start.inputs) if isinstance(x, layers)]
  if not found:
    return
  now = _flat(start.inputs)
  for path in now.keys() & paths.keys():
    before, after = (jax.tree.leaves(x[path]) for x in (start.state, now))
    if not all(map(_is_same, before, after)):
      raise ValueError(
        f'The forward pass has overwritten the weights at {_nnx_arguments.names(path)}'
        f' (nnx.{found[0].__name__}), and `update` would perturb those, while the first'
        ' gradient is at the weights before. Take the gradient with'
        ' `flax_nnx.value_and_grad(loss_fn, metric, rho)`, and leave the method out of'
        ' the chain.'
      )


def _is_same(x, y):
  # An array of NumPy is copied at the start, since it may change in place.
  numpy = isinstance(x, np.ndarray) and isinstance(y, np.ndarray)
  return x is y or (numpy and np.array_equal(x, y))


def _differentiated(start):
  return nnx.value_and_grad(start.loss_fn, argnums=start.argnums, has_aux=start.has_aux)


def _without_others(mask, start):
  """A mask that leaves out what has gradients in tree mode and is no parameter."""

  def trained(node):
    if _nnx_arguments.is_variable(node) or not _nnx_arguments.is_node(node):
      return True
    return jax.tree.map(
      lambda x: jax.tree.map(lambda _: isinstance(x, nnx.Param), x),
      node,
      is_leaf=_nnx_arguments.is_variable,
    )

  has_param = _masks.resolve_mask(
    jax.tree.map(trained, start.params, is_leaf=_nnx_arguments.is_node), start.params
  )
  if all(jax.tree.leaves(has_param)):
    return mask
  return jax.tree.map(operator.and_, _masks.resolve_mask(mask, start.params), has_param)


def _changes(start):
  """The dtypes in which a pass leaves the variables that it changes, by their paths.

  For that a pass is traced in the dtypes of the parameters; the probe may have others.
  What is in containers is left out: what a function does to its copy of a tuple or dict
  is not seen by its caller. A function that needs the numbers in them still has them.
  """
  outside = _in_containers(start.inputs)
  variables = {path: x for path, x in start.state.items() if path not in outside}

  def one_pass(before):
    inputs = _nnx_arguments.merge(start, dict(zip(variables, before, strict=True)))
    graph = nnx.graphdef(inputs)
    output = start.loss_fn(*inputs)
    if start.has_aux:
      _nnx_losses.check_arrays(output[1])
    if nnx.graphdef(inputs) != graph:
      raise ValueError(
        'With `compile_once=True` the loss function may change the values of variables,'
        ' and nothing else about its arguments: no new variables (`sow`, `nnx.pop`), no'
        ' other attributes (`model.eval()`, counters that are plain numbers). Do that'
        ' outside of it, or leave `compile_once` out.'
      )
    after = _flat(inputs)
    return [jax.tree.leaves(after[path]) for path in variables]

  before = [jax.tree.leaves(x) for x in variables.values()]
  program, after = jax.make_jaxpr(one_pass, return_shape=True)(before)
  number, source = itertools.count(), iter(_forwarding.sources(program.jaxpr))
  unchanged = [
    [next(number) for _ in old] == [next(source) for _ in new]
    for old, new in zip(before, after, strict=True)
  ]
  return {
    path: [x.dtype for x in new]
    for path, new, same in zip(variables, after, unchanged, strict=True)
    if not same
  }


def _flat(inputs):
  return dict(nnx.to_flat_state(nnx.state(inputs)))


def _in_containers(inputs):
  """The paths of arrays that are in tuples and dicts, and in no model."""
  is_node = _nnx_arguments.is_node
  bare = jax.tree.map(lambda x: None if is_node(x) else x, inputs, is_leaf=is_node)
  return _flat(bare).keys()


def _cast(variable, dtypes):
  leaves, structure = jax.tree.flatten(variable)
  return structure.unflatten(
    x if jnp.result_type(x) == dtype else jnp.asarray(x, dtype)
    for x, dtype in zip(leaves, dtypes, strict=True)
  )
