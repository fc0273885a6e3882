"""The methods, each a metric and a combination in the two-pass transformation."""

from collections.abc import Callable
import functools
import inspect
from typing import Any
from typing import ParamSpec
from typing import Unpack

import jax
import jax.core
import optax

from msam_optax import _hyperparameters
from msam_optax import _numerics
from msam_optax import combinations
from msam_optax import metrics
from msam_optax import transformation
from msam_optax.monge import monge
from msam_optax.monge import unit_rise

P = ParamSpec('P')
Transformation = optax.GradientTransformationExtraArgs


def _method(make: Callable[P, Transformation]) -> Callable[P, Transformation]:
  """Shows ``**options`` as the keywords that they are.

  ``optax.inject_hyperparams`` reads signatures and cannot pass on what is not in them;
  ``help`` and editors show them.
  """
  own = inspect.signature(make)
  shared = inspect.signature(transformation.sharpness_aware).parameters
  parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
  parameters += [shared[name] for name in transformation.Options.__annotations__]
  signature = own.replace(parameters=parameters)

  @functools.wraps(make)
  def method(*args: P.args, **kwargs: P.kwargs) -> Transformation:
    try:
      signature.bind(*args, **kwargs)
    except TypeError as error:
      raise TypeError(f'{make.__name__}() {error}') from None
    return make(*args, **kwargs)

  method.__signature__ = signature  # pyright: ignore
  return method


@_method
def msam(
  rho: _hyperparameters.Hyperparameter = 0.05,
  alpha: _hyperparameters.Hyperparameter = 1.0,
  *,
  max_rise: _hyperparameters.Hyperparameter | None = None,
  base: metrics.Metric = metrics.euclidean(),
  **options: Unpack[transformation.Options],
) -> Transformation:
  """Monge SAM: the gradient at the worst point nearby, as the loss surface sees it.

  For the gradient ``g`` at the parameters ``w`` it is the gradient at ``w + δ``,

      δ = ρ g / (‖g‖ √(1 + α²‖g‖²)),

  SAM's perturbation, divided by ``√(1 + α²‖g‖²)``: the same where the gradient is
  small, and less the steeper the loss is. ``ρ/α`` is the largest first-order rise of
  the loss that it allows. The ``δ`` depends on the scale of the loss: take the
  mean over the batch, unscale and reduce gradients before, and clip them after.

  With ``max_rise=τ`` the allowed rise is the knob instead of ``α``: it is ``ρ/τ``, and
  ``ρ`` may be infinite, where ``δ = τ g/‖g‖²`` raises the loss by ``τ``, to first
  order, wherever it is::

      msam(rho=0.05, alpha=2.0)               # at most 0.025 higher
      msam(rho=0.05, max_rise=0.025)          # the same
      msam(rho=math.inf, max_rise=0.025)      # always 0.025 higher

  Choose ``τ`` first, in units of the loss, with a large ``ρ``, which only holds back
  steps where the gradient is small; without it they grow without bound there. Choose
  ``ρ`` and ``α`` if you know a radius that is right for SAM. With ``max_rise`` the
  metric is :func:`unit_rise`: the slope in the state is between 0 and 1, the part of
  the allowed rise that is predicted, ``τ · slope``.

  Args:
    rho: ``ρ``, scalar >= 0: a number, an array or an Optax schedule of the step. With
      ``max_rise`` it is the largest radius, and may be infinite.
    alpha: ``α``, likewise. 0 is SAM; the paper has 1. Not used with ``max_rise``.
    max_rise: ``τ``, likewise: the rise of the loss that is allowed, to first order;
      by default ``ρ/α``.
    base: the metric that Monge extends; Euclidean in the paper.
    **options: ``mask``, ``axis_name``, ``sync_ascent``, ``param_specs`` and
      ``perturbation_dtype`` of :func:`sharpness_aware`.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`.

  Raises:
    TypeError: if an argument has the wrong type.
    ValueError: if a number is negative or not finite, ``axis_name`` is missing, or
      both ``alpha`` and ``max_rise`` are given.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from msam_optax import msam
    >>> loss = lambda w: jnp.sum(w**2)
    >>> tx = optax.chain(msam(rho=0.5), optax.sgd(0.1))
    >>> w = jnp.array([0.3, 0.4])
    >>> updates, state = tx.update(
    ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
    >>> print(updates, f"{optax.tree.get(state, 'radius'):.4f}")
    [-0.1024 -0.1366] 0.3536

    A rise of 0.1, whatever the gradient:

    >>> tx = msam(rho=jnp.inf, max_rise=0.1)
    >>> _, state = tx.update(jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
    >>> print(f"{state.radius:.4f} {0.1 * state.slope:.4f}")
    0.1000 0.1000

  References:
    Jacobsen & Arvanitidis, `Monge SAM: Robust Reparameterization-Invariant
    Sharpness-Aware Minimization Based on Loss Geometry
    <https://arxiv.org/abs/2502.08448>`_, 2025
  """
  if max_rise is None:
    return transformation.sharpness_aware(monge(alpha, base), rho, **options)
  # Under optax.inject_hyperparams the default is an array, in jit without a value.
  if not isinstance(alpha, jax.core.Tracer) and (
    _hyperparameters.is_schedule(alpha) or alpha != 1.0
  ):
    raise ValueError(
      '`msam` was given both `alpha` and `max_rise`, the allowed rise ρ/α: give'
      ' `msam(rho, alpha)` or `msam(rho, max_rise=rise)`.'
    )
  _hyperparameters.check_hyperparameter('rho', rho, finite=False)
  _hyperparameters.check_hyperparameter('max_rise', max_rise)
  return transformation.sharpness_aware(unit_rise(base, rho), max_rise, **options)


@_method
def sam(
  rho: _hyperparameters.Hyperparameter = 0.05,
  **options: Unpack[transformation.Options],
) -> Transformation:
  """SAM: the gradient at the worst point within the Euclidean distance ``ρ``.

  For the gradient ``g`` at the parameters ``w`` it is the gradient at ``w + ρ g/‖g‖``.

  Args:
    rho: ``ρ``, scalar >= 0: a number, an array or an Optax schedule of the step.
    **options: ``mask``, ``axis_name``, ``sync_ascent``, ``param_specs`` and
      ``perturbation_dtype`` of :func:`sharpness_aware`.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`.

  Raises:
    TypeError: if an argument has the wrong type.
    ValueError: if a number is negative or not finite, or ``axis_name`` is missing.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from msam_optax import sam
    >>> loss = lambda w: jnp.sum(w**2)
    >>> tx = optax.chain(sam(rho=0.5), optax.sgd(0.1))
    >>> w = jnp.array([0.3, 0.4])
    >>> updates, state = tx.update(
    ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
    >>> print(updates, f"{optax.tree.get(state, 'radius'):.4f}")
    [-0.12 -0.16] 0.5000

  References:
    Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
    Generalization <https://arxiv.org/abs/2010.01412>`_, 2021
  """
  return transformation.sharpness_aware(metrics.euclidean(), rho, **options)


@_method
def asam(
  rho: _hyperparameters.Hyperparameter = 0.5,
  eta: float | jax.Array = 0.01,
  *,
  weights: Any = None,
  **options: Unpack[transformation.Options],
) -> Transformation:
  """ASAM: adaptive SAM, whose distances are relative to the size of each weight.

  For the gradient ``g`` at the parameters ``w`` it is the gradient at
  ``w + ρ T²g/‖Tg‖`` with ``T = |w| + η`` on weights and 1 on biases.

  Args:
    rho: ``ρ``, scalar >= 0: a number, an array or an Optax schedule of the step.
    eta: ``η``, scalar >= 0. Lets weights that are zero move.
    weights: which leaves are weights, see :func:`adaptive`; by default the leaves of
      two or more dimensions that are not named as biases and scales are.
    **options: ``mask``, ``axis_name``, ``sync_ascent``, ``param_specs`` and
      ``perturbation_dtype`` of :func:`sharpness_aware`.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`.

  Raises:
    TypeError: if an argument has the wrong type.
    ValueError: if a number is negative or not finite, or ``axis_name`` is missing.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from msam_optax import asam
    >>> loss = lambda w: jnp.sum(w**2)
    >>> tx = optax.chain(asam(rho=0.5, eta=0.0), optax.sgd(0.1))
    >>> w = jnp.array([[0.3, 0.4]])
    >>> updates, state = tx.update(
    ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
    >>> print(updates, f"{optax.tree.get(state, 'radius'):.4f}")
    [[-0.0747 -0.1149]] 0.1892

  References:
    Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
    Learning of Deep Neural Networks <https://arxiv.org/abs/2102.11600>`_, 2021
  """
  return transformation.sharpness_aware(
    metrics.adaptive(eta, weights=weights), rho, **options
  )


@_method
def fisher_sam(
  rho: _hyperparameters.Hyperparameter = 0.1,
  eta: float | jax.Array = 1.0,
  **options: Unpack[transformation.Options],
) -> Transformation:
  """Fisher SAM: SAM whose distances are those of a diagonal Fisher metric.

  For the gradient ``g`` at the parameters ``w`` it is the gradient at
  ``w + ρ u/√⟨u, g⟩`` with ``u = g/(1 + η g²)``: steep coordinates are held back.

  Args:
    rho: ``ρ``, scalar >= 0: a number, an array or an Optax schedule of the step.
    eta: ``η``, scalar >= 0. 0 is SAM.
    **options: ``mask``, ``axis_name``, ``sync_ascent``, ``param_specs`` and
      ``perturbation_dtype`` of :func:`sharpness_aware`.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`.

  Raises:
    TypeError: if an argument has the wrong type.
    ValueError: if a number is negative or not finite, or ``axis_name`` is missing.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from msam_optax import fisher_sam
    >>> loss = lambda w: jnp.sum(w**2)
    >>> tx = optax.chain(fisher_sam(rho=0.5), optax.sgd(0.1))
    >>> w = jnp.array([0.3, 0.4])
    >>> updates, state = tx.update(
    ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
    >>> print(updates, f"{optax.tree.get(state, 'radius'):.4f}")
    [-0.1145 -0.1403] 0.4064

  References:
    Kim et al., `Fisher SAM: Information Geometry and Sharpness Aware Minimisation
    <https://arxiv.org/abs/2206.04920>`_, 2022
  """
  return transformation.sharpness_aware(metrics.diagonal_fisher(eta), rho, **options)


@_method
def gsam(
  rho: _hyperparameters.Hyperparameter = 0.05,
  alpha: float | jax.Array = 0.6,
  *,
  metric: metrics.Metric = metrics.euclidean(),
  **options: Unpack[transformation.Options],
) -> Transformation:
  """GSAM: descends the loss at the probe, and closes its gap to the loss at the params.

  With the gradients ``g`` at the parameters and ``g₁`` at the probe it is

      g₁ − α (g − ⟨g, g₁⟩/⟨g₁, g₁⟩ g₁),

  the part of ``g`` that is perpendicular to ``g₁``, subtracted. The authors let ``ρ``
  follow the learning rate: give it as a schedule.

  Args:
    rho: ``ρ``, scalar >= 0: a number, an array or an Optax schedule of the step.
    alpha: ``α``, scalar >= 0: the weight of the gap. 0 is SAM; the authors have 0.6 for
      ViT-B/32.
    metric: how the length of a perturbation is measured; Euclidean in the paper.
    **options: ``mask``, ``axis_name``, ``sync_ascent``, ``param_specs`` and
      ``perturbation_dtype`` of :func:`sharpness_aware`.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`.

  Raises:
    TypeError: if an argument has the wrong type.
    ValueError: if a number is negative or not finite, or ``axis_name`` is missing.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from msam_optax import gsam
    >>> loss = lambda w: jnp.sum(w**2 * jnp.array([1.0, 4.0]))
    >>> tx = optax.chain(gsam(rho=0.5, alpha=0.6), optax.sgd(0.1))
    >>> w = jnp.array([0.6, 0.2])
    >>> updates, state = tx.update(
    ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
    >>> print(updates)
    [-0.1484 -0.4918]

  References:
    Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
    <https://arxiv.org/abs/2203.08065>`_, 2022
  """
  combination = combinations.surrogate_gap(alpha)
  return transformation.sharpness_aware(metric, rho, combination, **options)


@_method
def wsam(
  rho: _hyperparameters.Hyperparameter = 0.05,
  gamma: float | jax.Array = 0.9,
  *,
  metric: metrics.Metric = metrics.euclidean(),
  **options: Unpack[transformation.Options],
) -> Transformation:
  """WSAM in its coupled form: sharpness as a term of the loss, with a weight.

  With the gradients ``g`` at the parameters and ``g₁`` at the probe it is

      (1 − a) g + a g₁ = g + a (g₁ − g),     a = γ/(1 − γ).

  ``γ = 0`` is the plain gradient, ``γ = 1/2`` is SAM, and above that the sharpness
  ``ℓ(w + δ) − ℓ(w)`` counts more than in SAM: at 0.9 nine times as much. The authors'
  own default is the decoupled form, in which the optimizer sees ``g`` alone and the
  rest is added to its step.

  Args:
    rho: ``ρ``, scalar >= 0: a number, an array or an Optax schedule of the step.
    gamma: ``γ``, scalar, 0 <= γ < 1.
    metric: how the length of a perturbation is measured; Euclidean in the paper.
    **options: ``mask``, ``axis_name``, ``sync_ascent``, ``param_specs`` and
      ``perturbation_dtype`` of :func:`sharpness_aware`.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`.

  Raises:
    TypeError: if an argument has the wrong type.
    ValueError: if a number is negative or not finite, ``gamma`` is 1 or more, or
      ``axis_name`` is missing.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from msam_optax import wsam
    >>> loss = lambda w: jnp.sum(w**2)
    >>> tx = optax.chain(wsam(rho=0.5, gamma=0.75), optax.sgd(0.1))
    >>> w = jnp.array([0.3, 0.4])
    >>> updates, state = tx.update(
    ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
    >>> print(updates)
    [-0.24 -0.32]

  References:
    Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a
    Regularization Term <https://arxiv.org/abs/2305.15817>`_, 2023
  """
  _hyperparameters.check_number('gamma', gamma)
  if not isinstance(gamma, jax.core.Tracer) and gamma >= 1:
    raise ValueError(f'`gamma` must be less than 1, got {gamma!r}: SAM is 0.5.')
  # In bfloat16 `1 − γ` would round. Out of range at run time, γ gives a weight that is
  # out of range as well, which becomes NaN.
  gamma = gamma if isinstance(gamma, (int, float)) else _numerics.widen(gamma)
  combination = combinations.weighted(gamma / (1.0 - gamma))
  return transformation.sharpness_aware(metric, rho, combination, **options)


@_method
def cr_sam(
  rho: _hyperparameters.Hyperparameter = 0.1,
  gamma: float | jax.Array = 0.1,
  beta: float | jax.Array = 0.01,
  *,
  metric: metrics.Metric = metrics.euclidean(),
  **options: Unpack[transformation.Options],
) -> Transformation:
  """CR-SAM: SAM that also lowers the curvature, as seen from both sides of the params.

  With the gradients ``g`` at the parameters ``w``, ``g₊`` at ``w + δ`` and ``g₋`` at
  ``w − δ``, three in a step, it is

      g₊ + γ (g₊ + g₋ − 2g) + β (g₊ − g₋).

  Args:
    rho: ``ρ``, scalar >= 0: a number, an array or an Optax schedule of the step.
    gamma: ``γ``, scalar >= 0: the weight of the second difference.
    beta: ``β``, scalar >= 0: the weight of the first difference. With both 0 it is SAM.
    metric: how the length of a perturbation is measured; Euclidean in the paper.
    **options: ``mask``, ``axis_name``, ``sync_ascent``, ``param_specs`` and
      ``perturbation_dtype`` of :func:`sharpness_aware`.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`.

  Raises:
    TypeError: if an argument has the wrong type.
    ValueError: if a number is negative or not finite, or ``axis_name`` is missing.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from msam_optax import cr_sam
    >>> loss = lambda w: jnp.sum(w**2)
    >>> tx = optax.chain(cr_sam(rho=0.5, beta=0.1), optax.sgd(0.1))
    >>> w = jnp.array([0.3, 0.4])
    >>> updates, state = tx.update(
    ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
    >>> print(updates)
    [-0.132 -0.176]

  References:
    Wu et al., `CR-SAM: Curvature Regularized Sharpness-Aware Minimization
    <https://arxiv.org/abs/2312.13555>`_, 2023
  """
  combination = combinations.curvature(gamma, beta)
  return transformation.sharpness_aware(metric, rho, combination, **options)
