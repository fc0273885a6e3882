"""Sharpness-aware gradients as loops over the parts of a batch, by the formulas.

What every parallel set-up is compared with: one device, no transformation, no mapped
axis, and none of the library's code.
"""

import jax
import jax.numpy as jnp
import numpy as np

RHO = {'msam': 0.3, 'sam': 0.3, 'asam': 0.5}


def sharpness_aware_gradient(
  method, loss, params, data, *, parts=1, synced=False, radii=None
):
  """The mean over equal parts of a batch of the gradients at their probes.

  Args:
    method: a key of ``RHO``.
    loss: ``(params, data) -> scalar``, a mean over the batch.
    params: pytree of arrays.
    data: pytree of arrays with the batch as first axis.
    parts: how many parts the batch is cut into.
    synced: whether the parts share one ascent, that of their mean gradient.
    radii: the radius of each part; by default the method's in ``RHO``.

  Returns:
    The mean of the losses at ``params``, and the gradient.
  """
  size = len(jax.tree.leaves(data)[0]) // parts
  cuts = [
    jax.tree.map(lambda x, i=i: x[i * size : (i + 1) * size], data)
    for i in range(parts)
  ]
  own = [jax.grad(loss)(params, cut) for cut in cuts]
  ascents = [mean(own)] * parts if synced else own
  radii = [RHO[method]] * parts if radii is None else radii
  at_probes = [
    jax.grad(loss)(probe(method, params, g, rho), cut)
    for g, cut, rho in zip(ascents, cuts, radii, strict=True)
  ]
  return np.mean([loss(params, cut) for cut in cuts]), mean(at_probes)


def probe(method, params, grads, rho):
  """``w + δ`` by the paper's formula of each method."""
  leaves = lambda f: sum(
    float(np.sum(np.square(np.asarray(f(w, g), np.float64))))
    for w, g in zip(jax.tree.leaves(params), jax.tree.leaves(grads), strict=True)
  )
  if method == 'asam':
    scale = lambda w: jnp.abs(w) + 0.01 if w.ndim > 1 else jnp.ones_like(w)
    norm = np.sqrt(leaves(lambda w, g: scale(w) * g))
    step = lambda w, g: scale(w) ** 2 * g * np.float32(rho / norm)
  else:
    norm = np.sqrt(leaves(lambda w, g: g))
    if method == 'msam':
      norm *= np.sqrt(1 + norm**2)
    step = lambda w, g: g * np.float32(rho / norm)
  return jax.tree.map(lambda w, g: w + step(w, g), params, grads)


def mean(trees):
  return jax.tree.map(lambda *xs: sum(xs) / len(xs), *trees)
