"""The contracts of metrics, combinations and methods, as assertions.

For the tests of a metric or a combination of your own::

  from msam_optax import testing

  def test_my_metric():
    testing.assert_metric(my_metric(), grads, params)

Each function raises an ``AssertionError`` that begins with the sentence of the contract
that does not hold; what was found, where in the tree, and both numbers follow.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import functools
from typing import Any
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import optax

from msam_optax import _masks
from msam_optax import combinations
from msam_optax import metrics
from msam_optax import spaces

# The result of each dtype is compared to this relative precision.
_PRECISION = {'float64': 1e-9, 'float32': 1e-5, 'bfloat16': 2e-2}
_AXIS = 'of msam_optax.testing'


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
  * The direction is like the gradients (structure, shapes, dtypes: those given,
    float32, bfloat16, and float64 if that is enabled); the slope is a scalar, float32
    or wider.
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
  _check_example(grads, params)
  check = functools.partial(
    _check_ascent, metric, matrix=matrix, rtol=rtol, extra_args=extra_args
  )
  call = functools.partial(_ascend, metric, extra_args=extra_args)
  state, ascent = check(grads, params, 'gradients as given')
  with _promise('A metric is pure: the same arguments give the same again.'):
    chex.assert_trees_all_equal(call(grads, state, params)[0], ascent)
  for name in _dtypes():
    check(_cast(grads, name), _cast(params, name), f'gradients and params in {name}')

  for size in magnitudes:
    where = f'gradients up to {size:.0e}'
    _, at_size = check(_of_magnitude(size, grads), params, where)
    if scale_invariant:
      with _promise(f'The direction does not depend on the scale of g ({where}).'):
        _assert_close(at_size.direction, ascent.direction, rtol)

  zeros = jax.tree.map(jnp.zeros_like, grads)
  with _promise('Direction and slope are zero where the gradient is.'):
    at_zero, _ = call(zeros, state, params)
    chex.assert_trees_all_equal(at_zero, jax.tree.map(jnp.zeros_like, at_zero))

  if len(jax.tree.leaves(grads)) > 1:
    for path, _ in jax.tree_util.tree_leaves_with_path(grads):
      _check_masked(check, call, metric, grads, params, path, rtol)
  if sharded:
    _check_sharded(metric, grads, params, ascent, rtol, extra_args)

  with _promise('A gradient that is not finite does not stay in the state.'):
    _, marked = call(_with_entry(grads, jnp.nan), state, params)
    after, _ = call(grads, marked, params)
    chex.assert_tree_all_finite(after)
  _check_compiled(call, grads, params, state, rtol)


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
  * With replicas, each with gradients of its own, all get the same update, state and
    ``due``; if their gradients are the same, those of one device.
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
  with _promise('It is a Combination, with finite `scales`.'):
    combinations.check_combination(combination)
  grads = tuple(grads)
  if len(grads) != 1 + len(combination.scales):
    raise ValueError(
      f'This combination has the scales {tuple(combination.scales)}: give'
      f' {1 + len(combination.scales)} gradients, the first at the params, got'
      f' {len(grads)}.'
    )
  for g in grads:
    _check_example(g, params)
  sets = {'all gradients': grads}
  if combination.due is not None:
    sets['`(g,)` alone'] = grads[:1]
  for name, given in sets.items():
    _check_combined(combination, given, params, name, magnitudes, rtol)


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
  _check_example(grads, params)
  with _promise('`init` accepts the params.'):
    state = tx.init(params)

  def half_square(p):
    return jax.tree.map(lambda x: 0.5 * x, p)

  _check_update_types(tx, params, grads, 'params as given', half_square)
  for name in _dtypes():
    where = f'params in {name}'
    cast = _cast(params, name)
    _check_update_types(tx, cast, _cast(grads, name), where, half_square)

  def update(params, state, **kwargs):
    kwargs = kwargs or {'grad_fn': jax.grad(loss_fn)}
    return tx.update(jax.grad(loss_fn)(params), state, params, **kwargs)

  _check_arguments(update, params, state, loss_fn, rtol)
  _check_transformed(tx, update, params, state, rtol)
  _check_chained(tx, params, state, loss_fn)
  _check_probe_gradient(tx, params, grads, state)


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
    rtol = 10.0 * max(_precision(x) for x in jax.tree.leaves((w, params)))

  def ascend(metric, loss_fn, w):
    grads = jax.grad(loss_fn)(w)
    return _ascend(metric, grads, metric.init(w), w, extra_args={})[0]

  with _promise('The metric can be called in both coordinates.'):
    direct = ascend(metric, loss_fn, w)
    changed = ascend(metric_of_change, lambda v: loss_fn(change(v)), params)
    _, mapped = jax.jvp(change, (params,), (changed.direction,))
  with _promise('The direction does not depend on the coordinates.'):
    _assert_close(mapped, direct.direction, rtol)
  with _promise('The slope does not depend on the coordinates.'):
    _assert_close(changed.slope, direct.slope, rtol)


# Metrics.


def _ascend(metric, grads, state, params, *, extra_args, space=spaces.LOCAL):
  """The metric, with all that it must accept; the loss is linear."""
  return metric.ascend(
    grads,
    state,
    params,
    **{
      'rho': jnp.asarray(0.1, jnp.float32),
      'grad_fn': lambda params: grads,
      'value': jnp.asarray(1.0, jnp.float32),
      'argument_of_another': None,
      **extra_args,
      'space': space,
    },
  )


def _check_ascent(metric, grads, params, where, *, matrix, rtol, extra_args, kept=None):
  """All that holds for one gradient; returns the first state and the ascent."""
  with _promise(f'`init` and `ascend` accept what they are given ({where}).'):
    state = metric.init(params)
    result = _ascend(metric, grads, state, params, extra_args=extra_args)
  with _promise(f'`ascend` returns `(Ascent, state)` ({where}).'):
    is_pair = isinstance(result, tuple) and len(result) == 2
    _expect(
      is_pair and isinstance(result[0], metrics.Ascent), f'It returned {result!r}.'
    )
  ascent, new_state = result
  with _promise(f'The direction is like the gradients ({where}).'):
    chex.assert_trees_all_equal_shapes_and_dtypes(ascent.direction, grads)
  with _promise(f'The slope is a scalar, float32 or wider ({where}).'):
    chex.assert_shape(ascent.slope, ())
    chex.assert_type(ascent.slope, _wide(grads))
  with _promise(f'Direction and slope are finite ({where}).'):
    chex.assert_tree_all_finite(ascent)

  g, d, slope = _flat(grads), _flat(ascent.direction), float(ascent.slope)
  rtol = max([rtol, *(_precision(x) for x in jax.tree.leaves(grads))])
  with _promise(f'The slope is positive where the gradient is not zero ({where}).'):
    _expect(slope > 0, f'The slope is {slope:.6g}.')
  with _promise(f'The slope of a metric is ⟨g, direction⟩ ({where}).'):
    _expect(
      abs(slope - g @ d) <= rtol * (np.abs(g) @ np.abs(d)),
      f'The slope is {slope:.6g}, and ⟨g, direction⟩ is {g @ d:.6g}.',
    )
  if matrix is not None:
    G = _matrix(matrix, g, params, kept)
    with _promise(f'The direction is of length one under the metric ({where}).'):
      square, size = d @ G @ d, np.abs(d) @ np.abs(G) @ np.abs(d)
      _expect(
        abs(square - 1.0) <= 2 * rtol * max(size, 1.0),
        f'direction · G direction is {square:.6g}, and must be 1.',
      )
    # Beyond that the solve is not exact enough to compare with.
    if np.linalg.cond(G) < 1e8:
      with _promise(f'The direction is G⁻¹g/√(gᵀG⁻¹g) ({where}).'):
        unit = g / np.max(np.abs(g))
        u = np.linalg.solve(G, unit)
        _assert_close(ascent.direction, _like(u / np.sqrt(unit @ u), grads), rtol)
  with _promise(f'The state keeps its structure, shapes and dtypes ({where}).'):
    _assert_same_types(new_state, state)
  return state, ascent


def _matrix(matrix, g, params, kept):
  """The metric's matrix, for the coordinates that are kept."""
  if kept is None:
    w = _flat(params)
    return _float64(matrix(g, w) if callable(matrix) else matrix)
  full = np.zeros(kept.coordinates.shape)
  full[kept.coordinates] = g
  G = _float64(matrix(full, kept.params) if callable(matrix) else matrix)
  return G[np.ix_(kept.coordinates, kept.coordinates)]


class _Kept(NamedTuple):
  """What a mask keeps of the flat params: one bool per coordinate, and all of them."""

  coordinates: np.ndarray
  params: np.ndarray


def _check_masked(check, call, metric, grads, params, path, rtol):
  mask = _all_but(path, grads)
  where = f'{jax.tree_util.keystr(path)} masked out'
  coordinates = jax.tree.map(lambda keep, x: np.full(np.shape(x), keep), mask, grads)
  kept = _Kept(_flat(coordinates).astype(bool), _flat(params))
  g, w = (_masks.restrict(tree, mask) for tree in (grads, params))
  if not np.any(_flat(g)):
    return
  state, ascent = check(g, w, where, kept=kept)

  g, w = (_without(tree, mask) for tree in (grads, params))
  try:
    alone = metric.init(w)
    expected, _ = call(g, alone, w)
  except Exception:  # A metric may go by names and masks that this tree does not fit.
    return
  with _promise(f'Where leaves are masked out, the sub-tree is what counts ({where}).'):
    _assert_close(jax.tree.leaves(ascent), jax.tree.leaves(expected), rtol)
  with _promise(f'The state keeps nothing of leaves that are masked out ({where}).'):
    shapes = lambda tree: [jnp.shape(x) for x in jax.tree.leaves(tree)]
    _expect(
      shapes(state) == shapes(alone),
      f'Its arrays have the shapes {shapes(state)}, and those of the sub-tree alone'
      f' {shapes(alone)}.',
    )


def _check_sharded(metric, grads, params, ascent, rtol, extra_args):
  """Compares with leaves cut into parts along a mapped axis."""
  count = next(
    (
      next(i for i in range(2, n + 1) if n % i == 0)
      for x in jax.tree.leaves(grads)
      for n in jnp.shape(x)
      if n > 1
    ),
    None,
  )
  if count is None:  # Scalars have no parts.
    return

  def axis_of(x):
    return next((i for i, n in enumerate(jnp.shape(x)) if n and n % count == 0), None)

  def cut(x):
    axis = axis_of(x)
    parts = [x] * count if axis is None else jnp.split(x, count, axis)
    return jnp.stack(parts)

  def spec(x):
    axis = axis_of(x)
    return PartitionSpec(*() if axis is None else (*[None] * axis, _AXIS))

  space = spaces.over(None, jax.tree.map(spec, grads))

  def of_part(g, w):
    state = metric.init(w)
    return _ascend(metric, g, state, w, extra_args=extra_args, space=space)[0]

  with _promise(
    'Sums over leaves are those of `space`, so that they are right for sharded leaves'
    ' (`sharded=False` if the metric needs whole ones).'
  ):
    parts = jax.vmap(of_part, axis_name=_AXIS)(
      *(jax.tree.map(cut, tree) for tree in (grads, params))
    )
    whole = jax.tree.map(cut, ascent.direction), jnp.stack([ascent.slope] * count)
    _assert_close(tuple(parts), whole, rtol)


def _check_compiled(call, grads, params, state, rtol):
  with _promise('Under `jit` a metric does what it does without.'):
    compiled = jax.jit(call)(grads, state, params)
    _assert_close(compiled, call(grads, state, params), rtol)

  rows = [_scaled(factor, grads) for factor in (1.0, 0.0, -0.5)]
  stacked = _stack(*rows)
  with _promise('Under `vmap` a metric does what it does for each gradient.'):
    batched = jax.vmap(call, in_axes=(0, None, None))(stacked, state, params)
    looped = [call(g, state, params) for g in rows]
    _assert_close(batched, _stack(*looped), rtol)

  def body(state, g):
    ascent, state = call(g, state, params)
    return state, ascent

  with _promise('Under `scan` a metric does what it does in a loop.'):
    scanned = jax.lax.scan(body, state, stacked)
    ascents = []
    for g in rows:
      state, ascent = body(state, g)
      ascents.append(ascent)
    looped = state, _stack(*ascents)
    _assert_close(scanned, looped, rtol)


# Combinations.


def _check_combined(combination, grads, params, where, magnitudes, rtol):
  """All that holds for the gradients of a step, of all passes or the first alone."""

  def combine(grads, state):
    return combination.combine(grads, state, spaces.LOCAL)

  def check(grads, params, where):
    with _promise(f'`init` and `combine` accept what they are given ({where}).'):
      state = combination.init(params)
      result = combine(grads, state)
    with _promise(f'`combine` returns `(update, state)` ({where}).'):
      is_pair = isinstance(result, tuple) and len(result) == 2
      _expect(is_pair, f'It returned {result!r}.')
    update, new_state = result
    with _promise(f'The update is like the gradients ({where}).'):
      chex.assert_trees_all_equal_shapes(update, grads[0])
    with _promise(f'The update has no narrower dtypes than the gradients ({where}).'):
      _assert_no_narrower(update, grads[0])
    with _promise(f'The state keeps its structure, shapes and dtypes ({where}).'):
      _assert_same_types(new_state, state)
    with _promise(f'The update is finite where the gradients are ({where}).'):
      chex.assert_tree_all_finite(update)
    if combination.due is not None:
      with _promise(f'`due` is a bool, one scalar ({where}).'):
        due = jax.eval_shape(
          lambda g, state: combination.due(g, state, spaces.LOCAL), grads[0], state
        )
        chex.assert_shape(due, ())
        chex.assert_type(due, bool)
    return state, result

  state, result = check(grads, params, where)
  with _promise(f'A combination is pure: the same again ({where}).'):
    chex.assert_trees_all_equal(combine(grads, state), result)
  for name in _dtypes():
    check(_cast(grads, name), _cast(params, name), f'{where}, in {name}')
  check(_scaled(0.0, grads), params, f'{where}, all zero')
  for size in magnitudes:
    scaled = tuple(_of_magnitude(size, g) for g in grads)
    check(scaled, params, f'{where}, up to {size:.0e}')
  for path, _ in jax.tree_util.tree_leaves_with_path(params) if _many(params) else ():
    mask = _all_but(path, params)
    *fewer, w = (_masks.restrict(x, mask) for x in (*grads, params))
    check(tuple(fewer), w, f'{where}, {jax.tree_util.keystr(path)} left out')

  # What is not finite at the params is so at the probes: they are marked.
  for first in range(len(grads)):
    for bad in (jnp.nan, jnp.inf):
      marked = tuple(
        _with_entry(g, bad) if (i == first or first == 0) else g
        for i, g in enumerate(grads)
      )
      update, marked_state = combine(marked, state)
      with _promise(f'A gradient that is not finite is not hidden ({where}).'):
        _expect(
          not _all_finite(update), f'With {bad} in gradient {first} all is finite.'
        )
      with _promise(f'What is not finite does not stay in the state ({where}).'):
        chex.assert_tree_all_finite(combine(grads, marked_state)[0])
  _check_replicas(combination, grads, state, result, where, rtol)

  with _promise(f'Under `jit` it does what it does without ({where}).'):
    _assert_close(jax.jit(combine)(grads, state), result, rtol)
  twice = jax.tree.map(lambda g: jnp.stack([g, g]), grads)
  with _promise(f'Under `scan` it does what it does in a loop ({where}).'):
    last, updates = jax.lax.scan(lambda s, g: combine(g, s)[::-1], state, twice)
    second = combine(grads, result[1])
    looped = _stack(result[0], second[0])
    _assert_close((last, updates), (second[1], looped), rtol)


def _check_replicas(combination, grads, state, result, where, rtol):
  space = spaces.over(_AXIS)

  def of_replica(grads):
    outcome = combination.combine(grads, state, space)
    if combination.due is None:
      return outcome, ()
    return outcome, combination.due(grads[0], state, space)

  def on_replicas(*each):
    results = jax.vmap(of_replica, axis_name=_AXIS)(_stack(*each))
    return [_row(i, results) for i in range(len(each))]

  # Other directions as well as other lengths.
  turned = jax.tree.map(lambda g: (-3 * jnp.flip(g)).astype(g.dtype), grads)
  far = jax.tree.map(lambda g: (g * g + 0.5).astype(g.dtype), grads)
  with _promise(
    "All replicas get the same update, state and `due`: means are `space.mean`'s."
  ):
    first, *others = on_replicas(grads, turned, far)
    for other in others:
      chex.assert_trees_all_equal(other, first)
  with _promise(
    'Replicas with the same gradients get what one device gets: means are'
    " `space.mean`'s."
  ):
    (same, _), *_ = on_replicas(grads, grads)
    _assert_close(same, result, rtol)


def _assert_no_narrower(update, grads):
  leaves = jax.tree_util.tree_leaves_with_path(update)
  for (path, u), g in zip(leaves, jax.tree.leaves(grads), strict=True):
    got, want = jnp.result_type(u), jnp.result_type(g)
    floating = jnp.issubdtype(got, jnp.floating)
    _expect(
      floating and jnp.finfo(got).eps <= jnp.finfo(want).eps,
      f'{_at(path)} the update is {got}, and the gradient {want}.',
    )


# Methods.


def _check_update_types(tx, params, grads, where, grad_fn):
  def both(params, grads):
    state = tx.init(params)
    return state, tx.update(grads, state, params, grad_fn=grad_fn)

  with _promise(f'`init` and `update` accept what they are given ({where}).'):
    state, result = jax.eval_shape(both, params, grads)
  with _promise(f'`update` returns `(updates, state)` ({where}).'):
    is_pair = isinstance(result, tuple) and len(result) == 2
    _expect(is_pair, f'It returned {result!r}.')
  updates, new_state = result
  with _promise(f'The updates are like the gradients ({where}).'):
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
  with _promise(f'The state keeps its structure, shapes and dtypes ({where}).'):
    _assert_same_types(new_state, state)


def _check_arguments(update, params, state, loss_fn, rtol):
  with _promise('A method is pure: the same arguments give the same again.'):
    result = update(params, state)
    chex.assert_trees_all_equal(update(params, state), result)
  with _promise('A count in the state grows by one in each step.'):
    count_before, count_after = (_values(s, 'count') for s in (state, result[1]))
    steps = [b - a for a, b in zip(count_before, count_after, strict=True)]
    _expect(
      not steps or (max(steps) == 1 and min(steps) >= 0),
      f'The counts {count_before} became {count_after}.',
    )
  with _promise('`grad_fn` and `value_and_grad_fn` give the same update.'):
    other = update(params, state, value_and_grad_fn=jax.value_and_grad(loss_fn))
    _assert_close(other[0], result[0], rtol)
  with _promise('Extra arguments that it does not know are left to others.'):
    other = update(
      params,
      state,
      grad_fn=jax.grad(loss_fn),
      value=loss_fn(params),
      argument_of_another=None,
    )
    _assert_close(other[0], result[0], rtol)
  with _promise('The state is of arrays: a copy in host memory does the same.'):
    other = update(params, jax.device_get(state))
    _assert_close(other, result, rtol)


def _check_transformed(tx, update, params, state, rtol):
  def step(params, state):
    updates, state = update(params, state)
    return jax.tree.map(lambda w, u: w - 0.01 * u, params, updates), state

  looped = [(params, state)]
  for _ in range(2):
    looped.append(step(*looped[-1]))
  with _promise('Under `scan` a method does what it does in a loop.'):
    body = lambda carry, _: (step(*carry), None)
    _assert_close(jax.lax.scan(body, looped[0], length=2)[0], looped[-1], rtol)
  with _promise('Under `jit` with donated arguments a method does what it does.'):
    # The state that `init` makes is donated as it is, and may hold no array twice.
    w = jax.tree.map(jnp.copy, params)
    donated = jax.jit(step, donate_argnums=(0, 1))(w, tx.init(w))
    _assert_close(donated, looped[1], rtol)

  rows = [params, _scaled(0.5, params)]
  with _promise('Under `vmap` a method does what it does for each of the params.'):
    stacked = _stack(*rows)
    batched = jax.vmap(step)(stacked, jax.vmap(tx.init)(stacked))
    each = [looped[1], step(rows[1], tx.init(rows[1]))]
    _assert_close(batched, _stack(*each), rtol)


def _check_chained(tx, params, state, loss_fn):
  with _promise('`optax.tree.map_params` goes through the state.'):
    mapped = optax.tree.map_params(tx, lambda x: x, state)
    chex.assert_trees_all_equal(mapped, state)
  # Adam raises a float to its integer count.
  with (
    _promise('It can stand before Adam in `optax.chain`.'),
    jax.numpy_dtype_promotion('standard'),
    jax.numpy_rank_promotion('allow'),
  ):
    chain = optax.chain(tx, optax.adam(1e-3))
    chained = chain.init(params)
    grads = jax.grad(loss_fn)(params)
    updates, new = chain.update(grads, chained, params, grad_fn=jax.grad(loss_fn))
    chex.assert_tree_all_finite(updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_structs(new, chained)


def _check_probe_gradient(tx, params, grads, state):
  """Zero gradients, and gradients that are not finite, in either pass."""

  @jax.jit
  def update(grads, state, at_params, slope):
    """The gradient at the probe is ``at_params + slope · δ``."""

    def grad_fn(probe):
      def of_leaf(g, p, w):
        return g.astype(p.dtype) + slope.astype(p.dtype) * (p - w.astype(p.dtype))

      return jax.tree.map(of_leaf, at_params, probe, params)

    return tx.update(grads, state, params, grad_fn=grad_fn)

  none, one = jnp.zeros([], jnp.float32), jnp.ones([], jnp.float32)
  zeros = jax.tree.map(jnp.zeros_like, grads)
  with _promise('A zero gradient is not perturbed.'):
    updates, _ = update(zeros, state, zeros, one)
    chex.assert_trees_all_equal(updates, zeros)

  other = jax.tree.map(lambda g: (2 * g + 1).astype(g.dtype), grads)
  with _promise('The update depends on the gradient at the probe.'):
    # A method need not have a probe in every step.
    for _ in range(32):
      updates, new_state = update(grads, state, grads, none)
      if not _identical(updates, update(grads, state, other, none)[0]):
        break
      state = new_state
    else:
      raise AssertionError('In 32 steps it was the same for two of them.')

  for path, _ in jax.tree_util.tree_leaves_with_path(grads):
    for bad in (jnp.nan, jnp.inf):
      marked = _with_entry(grads, bad, path)
      for where, given in {
        'the gradient at the params': (marked, grads),
        'the gradient at the probe': (grads, marked),
      }.items():
        updates, new_state = update(given[0], state, given[1], none)
        at = f'With {bad} in {where}'
        with _promise(
          'A gradient that is not finite gives an update that is not finite in the same'
          ' leaf.'
        ):
          leaf = dict(jax.tree_util.tree_leaves_with_path(updates))[path]
          _expect(
            not _all_finite(leaf), f'{at} the update {_masks.at_path(path)} is {leaf}.'
          )
        with _promise('`finite` in the state says whether the update is.'):
          flags = _values(new_state, 'finite')
          _expect(not any(flags), f'{at} {_masks.at_path(path)} it is True.')
        with _promise('A gradient that is not finite does not stay in the state.'):
          after, new_state = update(grads, new_state, grads, none)
          chex.assert_tree_all_finite(after)
          _expect(all(_values(new_state, 'finite')), '`finite` is still False.')


# Both.


@contextlib.contextmanager
def _promise(sentence: str) -> Iterator[None]:
  """What fails inside is an ``AssertionError`` that begins with the sentence."""
  try:
    yield
  except Exception as error:
    detail = str(error)
    if not isinstance(error, AssertionError):
      detail = f'It raised {type(error).__name__}: {detail}'
    raise AssertionError(f'{sentence}\n{detail}') from error


def _expect(condition: Any, message: str) -> None:
  if not condition:
    raise AssertionError(message)


def _check_example(grads, params):
  """Raises unless gradients can be an example: usage, and no contract."""
  try:
    chex.assert_trees_all_equal_shapes(grads, params)
    chex.assert_tree_all_finite(grads)
    _expect(np.any(_flat(grads)), 'They are zero.')
    for x in jax.tree.leaves((grads, params)):
      _expect(jnp.issubdtype(jnp.result_type(x), jnp.floating), f'{x!r} is not real.')
  except AssertionError as error:
    raise ValueError(
      'The gradients to test with must be real, finite, like the params, and not all'
      f' zero. {error}'
    ) from error


def _assert_close(got, expected, rtol):
  """Close, relative to the largest entry of each leaf, at the dtype's precision."""
  chex.assert_trees_all_equal_shapes(got, expected)
  leaves = jax.tree_util.tree_leaves_with_path(expected)
  for (path, want), x in zip(leaves, jax.tree.leaves(got), strict=True):
    if not jnp.issubdtype(jnp.result_type(want), jnp.floating):
      _expect(np.array_equal(x, want), f'{_at(path)} {x} is not {want}.')
      continue
    x, want, limit = _float64(x), _float64(want), max(rtol, _precision(x, want))
    np.testing.assert_allclose(
      x,
      want,
      rtol=0,
      atol=limit * np.max(np.abs(want), initial=0.0),
      err_msg=f'{_at(path)} it is another (relative tolerance {limit:.0e}).',
    )


def _assert_same_types(got, expected):
  """The same structure, shapes, dtypes and weak types."""
  got, expected = (jax.eval_shape(lambda tree: tree, x) for x in (got, expected))
  chex.assert_trees_all_equal_structs(got, expected)
  leaves = jax.tree_util.tree_leaves_with_path(expected)
  for (path, want), x in zip(leaves, jax.tree.leaves(got), strict=True):
    kinds = [(y.shape, y.dtype.name, y.weak_type) for y in (x, want)]
    names = [f'{d}{list(s)}{" (weak)" if w else ""}' for s, d, w in kinds]
    _expect(kinds[0] == kinds[1], f'{_at(path)} it is {names[0]}, not {names[1]}.')


def _at(path):
  where = _masks.at_path(path)
  return where[0].upper() + where[1:]


def _dtypes():
  wide = ('float64',) if jax.config.jax_enable_x64 else ()  # pyright: ignore
  return ('float32', 'bfloat16', *wide)


def _cast(tree, dtype):
  return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def _precision(*xs):
  return max(_PRECISION.get(jnp.result_type(x).name, 1e-2) for x in xs)


def _wide(tree):
  dtypes = {jnp.result_type(x).name for x in jax.tree.leaves(tree)}
  return jnp.float64 if 'float64' in dtypes else jnp.float32


def _float64(x):
  return np.asarray(x).astype(np.float64)


def _flat(tree):
  return np.concatenate([_float64(x).ravel() for x in jax.tree.leaves(tree)])


def _like(vector, tree):
  """The inverse of :func:`_flat`, in float64."""
  leaves, structure = jax.tree.flatten(tree)
  ends = np.cumsum([np.size(x) for x in leaves])[:-1]
  parts = np.split(vector, ends)
  return structure.unflatten(
    [p.reshape(np.shape(x)) for p, x in zip(parts, leaves, strict=True)]
  )


def _with_entry(tree, bad, path=None):
  """The tree with one entry of a leaf, by default of the first, replaced."""
  if path is None:
    path = jax.tree_util.tree_leaves_with_path(tree)[0][0]

  def of_leaf(p, x):
    if p != path:
      return x
    entries = np.array(x)
    entries.flat[0] = bad
    return jnp.asarray(entries)

  return jax.tree_util.tree_map_with_path(of_leaf, tree)


def _without(tree, mask):
  """The sub-tree that a mask keeps, with the others gone from dicts and lists."""
  if isinstance(tree, dict):
    kept = {k: _without(v, mask[k]) for k, v in tree.items()}
    return type(tree)({k: v for k, v in kept.items() if jax.tree.leaves(v)})
  if type(tree) in (list, tuple):
    kept = [_without(v, m) for v, m in zip(tree, mask, strict=True)]
    return type(tree)(v for v in kept if jax.tree.leaves(v))
  return jax.tree.map(lambda keep, x: x if keep else None, mask, tree)


def _all_but(path, tree):
  """A mask of all leaves but one."""
  return jax.tree_util.tree_map_with_path(lambda p, _: p != path, tree)


def _scaled(factor, tree):
  return jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree)


def _of_magnitude(size, tree):
  """The tree with ``size`` as its largest magnitude."""
  scaled = _scaled(size / float(np.max(np.abs(_flat(tree)))), tree)
  if not _all_finite(scaled) or not np.any(_flat(scaled)):
    dtypes = sorted({jnp.result_type(x).name for x in jax.tree.leaves(tree)})
    raise ValueError(
      f'Gradients in {", ".join(dtypes)} cannot be as large or small as {size:.0e}:'
      ' give others as `magnitudes`, as in `magnitudes=(1e-3, 1e3)`.'
    )
  return scaled


def _stack(*trees):
  return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def _row(i, tree):
  return jax.tree.map(lambda x: x[i], tree)


def _many(tree):
  return len(jax.tree.leaves(tree)) > 1


def _all_finite(tree):
  return all(np.all(np.isfinite(_float64(x))) for x in jax.tree.leaves(tree))


def _identical(a, b):
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(np.array_equal(x, y) for x, y in pairs)


def _values(state, name):
  """The scalars in a state that have a name, in order."""
  return [
    np.asarray(x).item()
    for _, x in optax.tree.get_all_with_path(state, name)
    if np.ndim(x) == 0
  ]
