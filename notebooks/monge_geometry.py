# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The geometry of Monge SAM
#
# This notebook shows the metric, what it changes about SAM, which objective Monge SAM
# minimizes, and what is invariant about it. Everything is in two dimensions and in double
# precision.

# %%
import sys

if 'google.colab' in sys.modules:
  import subprocess

  subprocess.run(
    [sys.executable, '-m', 'pip', 'install', '-q', 'msam-optax[plot]'], check=True
  )

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from msam_optax import adaptive
from msam_optax import euclidean
from msam_optax import monge
from msam_optax import perturb
from msam_optax import sharpness_aware
from msam_optax.sharpness import rise

jax.config.update('jax_enable_x64', True)
COLOURS = {'SAM': '#d95f02', 'Monge SAM': '#1b6ca8', 'descent': '#6c757d'}


def delta(metric, loss, w, rho):
  """The perturbation under a metric."""
  ascent, _ = metric.ascend(jax.grad(loss)(w), metric.init(w), w)
  return perturb(w, ascent, rho) - w


# %% [markdown]
# ## A ball on the loss surface
#
# SAM looks for the worst point in a Euclidean ball $\lVert\delta\rVert \le \rho$. The graph
# $\{(w, \alpha\,\ell(w))\}$ of the loss is a surface, on which a small step $\delta$ has the
# squared length
#
# $$\delta^\top G\,\delta, \qquad G = I + \alpha^2 g g^\top.$$
#
# So where the loss is steep, the same radius permits a smaller $\delta$. Under any metric
# the worst point of the linearized loss is $\delta = \rho\, G^{-1}g/\sqrt{g^\top G^{-1}g}$. For
# this metric it is SAM's perturbation divided by $\sqrt{1+\alpha^2\lVert g\rVert^2}$: **always
# in SAM's direction, never longer.**

# %%
angles = np.linspace(0, 2 * np.pi, 200)
circle = np.stack([np.cos(angles), np.sin(angles)])
fig, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout='constrained')
for ax, steepness in zip(axes, (0.3, 1.0, 3.0), strict=True):
  g = steepness * np.array([0.8, 0.6])
  metric = np.eye(2) + np.outer(g, g)
  ball = np.linalg.solve(np.linalg.cholesky(metric).T, circle)  # δᵀGδ = 1
  ax.plot(*circle, color=COLOURS['SAM'], label='SAM')
  ax.plot(*ball, color=COLOURS['Monge SAM'], label='Monge SAM')
  linear = lambda w, g=g: jnp.asarray(g) @ w
  for name, m in {'SAM': euclidean(), 'Monge SAM': monge()}.items():
    ax.annotate(
      '',
      delta(m, linear, jnp.zeros(2), 1.0),
      (0, 0),
      arrowprops={'arrowstyle': '->', 'color': COLOURS[name], 'lw': 2},
    )
  ax.set(title=f'‖g‖ = {steepness:g}, α = 1', aspect='equal')
axes[0].legend(loc='lower left')
plt.show()

# %% [markdown]
# ## The largest rise
#
# To first order, SAM's perturbation raises the loss by $\rho\lVert g\rVert$, and Monge SAM's
# by $\rho\lVert g\rVert/\sqrt{1+\alpha^2\lVert g\rVert^2} < \rho/\alpha$: **$\rho/\alpha$ is the largest
# increase of the loss that the perturbation may reach.** The right $\alpha$ depends on the
# scale of the loss: multiplying the loss by $c$ changes the perturbation as multiplying
# $\alpha$ by $c$ does.

# %%
norm = np.geomspace(1e-2, 1e2, 200)
fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout='constrained')
for alpha, style in ((0.3, ':'), (1.0, '-'), (3.0, '--')):
  label = f'Monge SAM, α = {alpha:g}'
  shrink = 1 / np.sqrt(1 + (alpha * norm) ** 2)
  axes[0].loglog(norm, shrink, style, color=COLOURS['Monge SAM'], label=label)
  axes[1].loglog(norm, norm * shrink, style, color=COLOURS['Monge SAM'], label=label)
axes[0].axhline(1, color=COLOURS['SAM'], label='SAM')
axes[1].loglog(norm, norm, color=COLOURS['SAM'], label='SAM')
axes[0].set(xlabel='‖g‖', title='‖δ‖ / ρ')
axes[1].set(xlabel='‖g‖', title='first-order rise / ρ')
axes[0].legend()
plt.show()

# %% [markdown]
# ## The objective
#
# To first order in $\rho$, Monge SAM is gradient descent on
# $\ell + \frac{\rho}{\alpha}\operatorname{asinh}(\alpha\lVert\nabla\ell\rVert)$, and SAM on
# $\ell + \rho\lVert\nabla\ell\rVert$. The penalties agree where the gradient is small; where it
# is large, Monge SAM's grows only logarithmically. The error shrinks with $\rho^2$:


# %%
def loss(w):
  return (1 - w[0] * w[1]) ** 2


def potential(w, rho, alpha):
  return loss(w) + rho / alpha * jnp.arcsinh(alpha * jnp.linalg.norm(jax.grad(loss)(w)))


w = jnp.array([1.3, 0.4])
for rho in (0.1, 0.05, 0.025):
  at_probe = jax.grad(loss)(w + delta(monge(2.0), loss, w, rho))
  error = jnp.linalg.norm(at_probe - jax.grad(potential)(w, rho, 2.0))
  print(f'ρ = {rho:<6} error {error:.2e} = {error / rho**2:.2f} ρ²')

# %% [markdown]
# ## What it does to the flow
#
# The loss is $(1-w_1w_2)^2$, $\rho = 1$, and the start $(-3/2, 1/2)$, as in the paper's first
# figure. Plain descent stops where it reaches the valley. SAM is attracted by the saddle
# at 0. Monge SAM follows the valley to its flattest point, near $(-1, -1)$.


# %%
def trajectory(metric, rho, start, steps=200, lr=0.01):
  tx = optax.chain(sharpness_aware(metric, rho), optax.sgd(lr))

  def step(carry, _):
    w, state = carry
    grad_fn = jax.grad(loss)
    updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
    return (w + updates, state), w

  (end, _), path = jax.lax.scan(step, (start, tx.init(start)), length=steps)
  return np.vstack([path, end])


start = jnp.array([-1.5, 0.5])
x, y = np.meshgrid(np.linspace(-2.2, 1, 200), np.linspace(-2, 1.2, 200))
fig, ax = plt.subplots(figsize=(5.2, 5), layout='constrained')
ax.contour(x, y, (1 - x * y) ** 2, levels=np.geomspace(0.02, 20, 16), colors='#ced4da')
for name, metric, rho in (
  ('descent', euclidean(), 0.0),
  ('SAM', euclidean(), 1.0),
  ('Monge SAM', monge(), 1.0),
):
  path = trajectory(metric, rho, start)
  ax.plot(*path.T, color=COLOURS[name], label=name, linewidth=2)
  ax.plot(*path[-1], 'o', color=COLOURS[name])
  print(f'{name:10} ends at ({path[-1, 0]:.3f}, {path[-1, 1]:.3f})')
ax.legend()
ax.set(aspect='equal', xlabel='w₁', ylabel='w₂')
plt.show()

# %% [markdown]
# ## What is invariant
#
# $\alpha^2 g g^\top$ is a tensor in all coordinates, but $I$ is not. So re-deriving
# $I + \alpha^2 gg^\top$ in other coordinates gives the same metric only if these differ by a
# rotation, a permutation or a shift; under those SAM is invariant as well. Rescaling
# $(w_1, w_2) \mapsto (a w_1, w_2/a)$ does not change the function that a two-layer linear
# network computes. These are the rises of the loss at the probe, for $\rho = 0.05$:

# %%
METRICS = {
  'SAM': euclidean(),
  'Monge SAM': monge(),
  'ASAM, η = 0': adaptive(0.0, weights=True),
  'Monge over ASAM': monge(base=adaptive(0.0, weights=True)),
}
scales = (1, 2, 5, 20)
print('a'.ljust(16), *(f'{a:8}' for a in scales))
for name, metric in METRICS.items():
  rises = [
    rise(loss, jnp.array([a * 1.0, 0.5 / a]), metric, 0.05).measured for a in scales
  ]
  print(name.ljust(16), *(f'{r:8.4f}' for r in rises))

# %% [markdown]
# SAM's rise grows with the scale. Monge SAM's stays below about $\rho/\alpha$, but it is not
# constant: plain Monge SAM is *not* invariant under rescaling. Over ASAM's metric, which
# does not depend on the scale of a coordinate, it is. If you transform the metric along
# with the coordinates, it is invariant under any change: with $J = \partial w/\partial\psi$, the
# metric $J^\top J + \alpha^2 g_\psi g_\psi^\top$ gives the perturbation $J^{-1}\delta$ in every chart
# $\psi$. Even then only the ascent *direction* is invariant. $w + \delta$ is not the end of a
# geodesic, so charts agree only to $O(\rho^2)$, and the optimizer's step is not covariant.
