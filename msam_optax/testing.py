"""The contracts of metrics, combinations and methods, as assertions.

For the tests of a metric or a combination of your own::

  from msam_optax import testing

  def test_my_metric():
    testing.assert_metric(my_metric(), grads, params)

Each function raises an ``AssertionError`` that begins with the sentence of the contract
that does not hold; what was found, where in the tree, and both numbers follow.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from msam_optax import _combination_contract
from msam_optax import _contracts
from msam_optax import _method_contract
from msam_optax import _metric_contract
from msam_optax import combinations
from msam_optax import metrics


def assert_metric(
  metric: metrics.Metric,
  grads: Any,
  params: Any,
  *,
  matrix: Any = None,
  scale_invariant: bool = False,
  sharded: bool = True,
  magnitudes: Sequence[float] = (1e-20, 1e20),
  rtol: float = 0.0,
  **extra_args: Any,
) -> None:
  """Raises unless a metric keeps the contract of :class:`Metric`.

  The sentences of the contract:

  * ``init`` and ``ascend`` accept what they are given: ``space``, ``rho``, ``grad_fn``
    and extra arguments that they do not know.
  * The direction is like the gradients: structure and shapes, no narrower dtypes
    (those given, float32, bfloat16, and float64 if that is enabled); the slope is a
    scalar, float32 or wider.
  * The slope is ``⟨g, direction⟩``, finite, and positive where ``g`` is not zero.
  * The direction is of length one under the metric, and ``G⁻¹g/√(gᵀG⁻¹g)``: as far as
    ``matrix`` says what ``G`` is.
  * Both are zero where the gradient is.
  * All of that at gradients from 1e-20 to 1e+20.
  * Where leaves are masked out, it is the metric of the sub-tree, and so is its state.
  * Sums over leaves are those of ``space``: right for leaves sharded over devices.
  * The state keeps its structure, shapes, dtypes and weak types, and a gradient that is
    not finite does not stay in it.
  * It is pure: the same again, under ``jit``, ``vmap`` and ``scan``.

  Args:
    metric: the metric.
    grads: pytree of real floating-point arrays, not all zero, of ordinary size.
    params: pytree like ``grads``.
    matrix: the matrix ``G``, in the order of the leaves, each flattened: an array, or a
      function ``(flat gradient, flat params) -> G`` of float64 arrays. Under a mask it
      gets zeros for the gradients left out. None: it is not compared.
    scale_invariant: whether the direction must not depend on the gradient's length.
    sharded: whether it must be right for sharded leaves. False for a metric that needs
      whole leaves, as that of a dense matrix does.
    magnitudes: the largest entry of the gradients that it must be right for.
    rtol: relative tolerance, where that of the dtype (1e-5 in float32) is smaller.
    **extra_args: more arguments for ``ascend``.

  Returns:
    None.

  Raises:
    AssertionError: if the contract is broken.
    ValueError: if ``grads`` are not like ``params``, zero, or not finite, or if their
      dtype has no numbers of one of the ``magnitudes``.

  Examples:
    >>> import jax.numpy as jnp, numpy as np
    >>> import msam_optax
    >>> from msam_optax import testing
    >>> w, g = jnp.array([1.0, 2.0]), jnp.array([0.6, 0.8])
    >>> testing.assert_metric(
    ...     msam_optax.monge(0.5), g, w,
    ...     matrix=lambda g, w: np.eye(2) + 0.5**2 * np.outer(g, g))

    A slope of which the root was forgotten:

    >>> def ascend(grads, state, params, *, space, **extra_args):
    ...   unit, norm = space.normalize(grads)
    ...   return msam_optax.Ascent(unit, norm**2), state
    >>> broken = msam_optax.Metric(lambda params: (), ascend)
    >>> try:
    ...   testing.assert_metric(broken, 3 * g, w)
    ... except AssertionError as error:
    ...   print(error)
    The slope of a metric is ⟨g, direction⟩ (gradients as given).
    The slope is 9, and ⟨g, direction⟩ is 3.
  """
  _contracts.check_example(grads, params)
  check = functools.partial(
    _metric_contract.check_ascent,
    metric,
    matrix=matrix,
    rtol=rtol,
    extra_args=extra_args,
  )
  call = functools.partial(_metric_contract.ascend, metric, extra_args=extra_args)
  state, ascent = check(grads, params, 'gradients as given')
  with _contracts.promise('A metric is pure: the same arguments give the same again.'):
    chex.assert_trees_all_equal(call(grads, state, params)[0], ascent)
  for name in _contracts.dtypes():
    check(
      _contracts.cast(grads, name),
      _contracts.cast(params, name),
      f'gradients and params in {name}',
    )

  for size in magnitudes:
    where = f'gradients up to {size:.0e}'
    _, at_size = check(_contracts.of_magnitude(size, grads), params, where)
    if scale_invariant:
      with _contracts.promise(
        f'The direction does not depend on the scale of g ({where}).'
      ):
        _contracts.assert_close(at_size.direction, ascent.direction, rtol)

  zeros = jax.tree.map(jnp.zeros_like, grads)
  with _contracts.promise('Direction and slope are zero where the gradient is.'):
    at_zero, _ = call(zeros, state, params)
    chex.assert_trees_all_equal(at_zero, jax.tree.map(jnp.zeros_like, at_zero))

  if len(jax.tree.leaves(grads)) > 1:
    for path, _ in jax.tree_util.tree_leaves_with_path(grads):
      _metric_contract.check_masked(check, call, metric, grads, params, path, rtol)
  if sharded:
    _metric_contract.check_sharded(metric, grads, params, ascent, rtol, extra_args)

  with _contracts.promise('A gradient that is not finite does not stay in the state.'):
    _, marked = call(_contracts.with_entry(grads, jnp.nan), state, params)
    after, later = call(grads, marked, params)
    chex.assert_tree_all_finite((after, later))
    # A direction that was normalized hides that the memory is lost.
    _contracts.expect(after.slope > 0, f'After it the slope is {after.slope:.6g}.')
  _metric_contract.check_compiled(call, grads, params, state, rtol)


def assert_combination(
  combination: combinations.Combination,
  grads: Sequence[Any],
  params: Any,
  *,
  magnitudes: Sequence[float] = (1e-20, 1e20),
  rtol: float = 0.0,
) -> None:
  """Raises unless a combination keeps the contract of :class:`Combination`.

  The sentences of the contract:

  * The update is like the gradients: structure and shapes, no narrower dtypes (those
    given, float32, bfloat16, and float64 if that is enabled).
  * ``due``, if there is one, is a bool scalar, and ``combine`` accepts ``(g,)`` alone.
  * The update is finite for gradients from 1e-20 to 1e+20, and for zero.
  * A gradient that is not finite is not hidden, nor does it stay in the state.
  * With replicas, each with its own gradients, all get the update that one device
    gets of the mean gradients, and the same state and ``due``; if their gradients are
    the same, those of one device.
  * Leaves that have no gradient, each an ``optax.MaskedNode``, are left out.
  * The state keeps its structure, shapes, dtypes and weak types.
  * It is pure: the same again, under ``jit`` and ``scan``.

  Args:
    combination: the combination.
    grads: ``(g, g₁, …)``, one more than the combination has ``scales``: pytrees of real
      floating-point arrays, not all zero, of ordinary size.
    params: pytree like ``g``.
    magnitudes: the largest entry of the gradients that it must be right for.
    rtol: relative tolerance, where that of the dtype (1e-5 in float32) is smaller.

  Returns:
    None.

  Raises:
    AssertionError: if the contract is broken.
    ValueError: if the gradients are too few or many, not like ``params``, zero, or not
      finite, or if their dtype has no numbers of one of the ``magnitudes``.

  Examples:
    >>> import jax.numpy as jnp
    >>> import msam_optax
    >>> from msam_optax import testing
    >>> w, g, g_probe = jnp.zeros(2), jnp.array([1.0, 2.0]), jnp.array([3.0, 0.0])
    >>> testing.assert_combination(msam_optax.surrogate_gap(0.6), (g, g_probe), w)

    One that forgets the mean over replicas:

    >>> forgetful = msam_optax.Combination(
    ...     lambda params: (), lambda grads, state, space: (grads[1], state))
    >>> try:
    ...   testing.assert_combination(forgetful, (g, g_probe), w)
    ... except AssertionError as error:
    ...   print(str(error).splitlines()[0])
    All replicas get the same update, state and `due`: means are `space.mean`'s.
  """
  with _contracts.promise('It is a Combination, with finite `scales`.'):
    combinations.check_combination(combination)
  grads = tuple(grads)
  if len(grads) != 1 + len(combination.scales):
    raise ValueError(
      f'This combination has the scales {tuple(combination.scales)}: give'
      f' {1 + len(combination.scales)} gradients, the first at the params, got'
      f' {len(grads)}.'
    )
  for g in grads:
    _contracts.check_example(g, params)
  sets = {'all gradients': grads}
  if combination.due is not None:
    sets['`(g,)` alone'] = grads[:1]
  for name, given in sets.items():
    _combination_contract.check_combined(
      combination, given, params, name, magnitudes, rtol
    )


def assert_method(
  tx: optax.GradientTransformationExtraArgs,
  params: Any,
  loss_fn: Callable[[Any], Any],
  *,
  rtol: float = 1e-4,
) -> None:
  """Raises unless a transformation keeps the contract of a two-pass method.

  The sentences of the contract:

  * The updates are like the gradients that come in: structure, shapes, dtypes (those
    given, float32, bfloat16, and float64 if that is enabled).
  * The state keeps its structure, shapes, dtypes and weak types; a count in it grows.
  * ``update`` accepts ``grad_fn`` or ``value_and_grad_fn``, with the same result, and
    extra arguments that it does not know.
  * It is pure: the same again, and under ``jit`` with donated arguments, ``vmap`` and
    ``scan``; from a copy of the state in host memory as well.
  * It can stand before Adam in ``optax.chain``, and ``optax.tree.map_params`` goes
    through its state.
  * The update depends on the gradient at the probe.
  * A zero gradient is not perturbed.
  * A gradient that is not finite, at the params or at the probe, gives an update that
    is not finite in the same leaf, and ``finite`` in the state is False; the next step
    is as good as any.

  Args:
    tx: the method, such as ``msam(0.05)``.
    params: pytree of real floating-point arrays.
    loss_fn: ``params -> scalar``; its gradient at ``params`` is not zero.
    rtol: relative tolerance of comparisons between compiled programs.

  Returns:
    None.

  Raises:
    AssertionError: if the contract is broken.
    ValueError: if the gradient of ``loss_fn`` is zero or not finite.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> import msam_optax
    >>> from msam_optax import testing
    >>> loss_fn = lambda w: jnp.sum(w**4)
    >>> testing.assert_method(msam_optax.msam(0.05), jnp.array([0.3, 0.4]), loss_fn)

    Behind it, a transformation that hides what is not finite:

    >>> tx = optax.chain(msam_optax.msam(0.05), optax.zero_nans())
    >>> try:
    ...   testing.assert_method(tx, jnp.array([0.3, 0.4]), loss_fn)
    ... except AssertionError as error:
    ...   print(error)
    A gradient that is not finite gives an update that is not finite in the same leaf.
    With nan in the gradient at the params the update at the root is [0. 0.].
  """
  grads = jax.grad(loss_fn)(params)
  _contracts.check_example(grads, params)
  with _contracts.promise('`init` accepts the params.'):
    state = tx.init(params)

  def half_square(p):
    return jax.tree.map(lambda x: 0.5 * x, p)

  _method_contract.check_update_types(tx, params, grads, 'params as given', half_square)
  for name in _contracts.dtypes():
    where = f'params in {name}'
    cast = _contracts.cast(params, name)
    _method_contract.check_update_types(
      tx, cast, _contracts.cast(grads, name), where, half_square
    )

  def update(params, state, **kwargs):
    kwargs = kwargs or {'grad_fn': jax.grad(loss_fn)}
    return tx.update(jax.grad(loss_fn)(params), state, params, **kwargs)

  _method_contract.check_arguments(update, params, state, loss_fn, rtol)
  _method_contract.check_transformed(tx, update, params, state, rtol)
  _method_contract.check_chained(tx, params, state, loss_fn)
  _method_contract.check_probe_gradient(tx, params, grads, state)


def assert_invariant(
  metric: metrics.Metric,
  change: Callable[[Any], Any],
  loss_fn: Callable[[Any], Any],
  params: Any,
  *,
  metric_of_change: metrics.Metric | None = None,
  rtol: float | None = None,
) -> None:
  """Raises unless a metric does not depend on the coordinates.

  The sentence of the contract: with ``w = change(v)`` the ascent of ``ℓ(change(v))`` in
  ``v`` is that of ``ℓ(w)`` in ``w``: the slopes are the same, and ``J · direction`` in
  ``v`` is the direction in ``w``, ``J`` being the Jacobian of the change. For a linear
  change the probes are then the same points, and for others to first order in ``ρ``.

  Args:
    metric: the metric, in the coordinates ``w``.
    change: ``v -> w``, differentiable: a rotation, a scaling, a chart.
    loss_fn: ``w -> scalar``, ``ℓ``.
    params: ``v``, pytree of real floating-point arrays.
    metric_of_change: the metric in the coordinates ``v``; by default the same formula.
    rtol: relative tolerance; by default that of the dtype, 1e-4 in float32 and 1e-8 in
      float64.

  Returns:
    None.

  Raises:
    AssertionError: if the metric depends on the coordinates.

  Examples:
    >>> import jax.numpy as jnp
    >>> import msam_optax
    >>> from msam_optax import testing
    >>> loss_fn = lambda w: (1 - w[0] * w[1]) ** 2
    >>> v, turn = jnp.array([0.5, 1.0]), jnp.array([[0.6, -0.8], [0.8, 0.6]])
    >>> testing.assert_invariant(msam_optax.monge(), lambda v: turn @ v, loss_fn, v)

    A scaling, which ASAM's metric allows and Monge's does not:

    >>> scale = lambda v: v * jnp.array([2.0, 0.5])
    >>> relative = msam_optax.adaptive(0.0, weights=True)
    >>> testing.assert_invariant(relative, scale, loss_fn, v)
    >>> try:
    ...   testing.assert_invariant(msam_optax.monge(), scale, loss_fn, v)
    ... except AssertionError as error:
    ...   print(str(error).splitlines()[0])
    The direction does not depend on the coordinates.
  """
  metric_of_change = metric if metric_of_change is None else metric_of_change
  w = change(params)
  if rtol is None:
    rtol = 10.0 * max(_contracts.precision(x) for x in jax.tree.leaves((w, params)))

  def ascend(metric, loss_fn, w):
    grads = jax.grad(loss_fn)(w)
    return _metric_contract.ascend(metric, grads, metric.init(w), w, extra_args={})[0]

  with _contracts.promise('The metric can be called in both coordinates.'):
    direct = ascend(metric, loss_fn, w)
    changed = ascend(metric_of_change, lambda v: loss_fn(change(v)), params)
    _, mapped = jax.jvp(change, (params,), (changed.direction,))
  with _contracts.promise('The direction does not depend on the coordinates.'):
    _contracts.assert_close(mapped, direct.direction, rtol)
  with _contracts.promise('The slope does not depend on the coordinates.'):
    _contracts.assert_close(changed.slope, direct.slope, rtol)
