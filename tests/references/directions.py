"""Float64 NumPy twins of whole-vector projections; vectors and rows are flat."""

import numpy as np


def project(g, rows):
    """g − Σ ⟨g, v⟩ v for orthonormal rows."""
    return g - rows.T @ (rows @ g)


def gram_schmidt(rows, samples, tolerance=1e-5):
    """Farajtabar et al.: each sample against what is there; what is left, at length 1.

    The classical algorithm once per pass, twice, as the sum over stored vectors.
    """
    rows = [np.asarray(v, np.float64) for v in rows]
    for x in np.asarray(samples, np.float64):
        if not np.all(np.isfinite(x)) or not np.any(x):
            continue
        r = x / np.abs(x).max()
        size = np.linalg.norm(r)
        for _ in range(2):
            r = r - sum((r @ v) * v for v in rows)
        if np.linalg.norm(r) > tolerance * size:
            rows.append(r / np.linalg.norm(r))
    return np.array(rows).reshape(len(rows), samples.shape[1])


def principal(samples, count):
    """Leading right singular vectors, uncentred."""
    return np.linalg.svd(np.asarray(samples, np.float64), full_matrices=False)[2][
        :count
    ]


def fopng(g, gradients, old, new, *, as_published=False, damping=0.0):
    """−Δ of FOPNG for stored gradients (p, k), as in the paper and in its code."""
    new = new + damping * new.mean()
    c = old[:, None] * gradients
    a = np.linalg.pinv(c.T @ (c / new[:, None]), rcond=1e-12)
    target = gradients.T @ (old * g if as_published else old * g / new)
    p = g - c @ (a @ target)
    return p / new / np.sqrt(p @ (p / new))


def mlp(params, x):
    """Logits of x -> tanh(x A) B."""
    return np.tanh(x @ params["a"]) @ params["b"]


def mlp_gradient(params, x, weights):
    """∇ Σ_c w_c f_c by hand."""
    hidden = np.tanh(x @ params["a"])
    back = (params["b"] @ weights) * (1 - hidden**2)
    return {"a": np.outer(x, back), "b": np.outer(hidden, weights)}
