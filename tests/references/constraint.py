"""Float64 twins of the gradient constraints, by other algorithms than the library's.

`gem` is the formulation of GEM's code (every past gradient in the program, dual bounded
below by the memory strength) with the regularisation relative to each row; the program
is solved as a non-negative least-squares problem by scipy's active-set method.
"""

import numpy as np
from scipy.optimize import minimize, nnls


def dual(gram, inner, lower, regularization):
    """argmin ½ vᵀ(G + ε diag G) v + bᵀv over v ≥ γ."""
    norm = np.sqrt(np.diag(gram))
    a = gram / np.outer(norm, norm) + regularization * np.eye(len(norm))
    q = inner / norm + a @ (lower * norm)
    scale = np.abs(q).max() or 1.0
    root = np.linalg.cholesky(a)
    u, _ = nnls(root.T, -np.linalg.solve(root, q / scale), maxiter=10_000)
    return lower + scale * u / norm


def kkt_residual(gram, inner, v, lower, regularization):
    """max |min(v − γ, r)| for rows of norm 1, relative to the largest gradient of v."""
    norm = np.sqrt(np.diag(gram))
    a = gram / np.outer(norm, norm) + regularization * np.eye(len(norm))
    gap, r = norm * (v - lower), a @ (norm * v) + inner / norm
    q = inner / norm + a @ (lower * norm)
    return np.abs(np.minimum(gap, r)).max() / np.abs(q).max()


def gem(g, rows, lower=0.0, regularization=1e-3):
    if np.all(rows @ g >= 0):
        return g
    return g + rows.T @ dual(rows @ rows.T, rows @ g, lower, regularization)


def agem(g, r):
    return g - min(0.0, g @ r) / (r @ r) * r if r @ r > 0 else g


def in_metric(d, m, rows, lower=0.0, regularization=1e-3):
    """Δ = D(m + Mᵀv) with the Gram matrix M D Mᵀ and the right side M D m."""
    if np.all(rows @ (d * m) >= 0):
        return d * m
    gram = (rows * d) @ rows.T
    return d * (m + rows.T @ dual(gram, rows @ (d * m), lower, regularization))


def pcgrad(tasks, order=None):
    total = np.zeros(tasks.shape[1])
    for i, g in enumerate(tasks.copy()):
        for j in range(len(tasks)) if order is None else order[i]:
            if i != j and g @ tasks[j] < 0:
                g = g - (g @ tasks[j]) / (tasks[j] @ tasks[j]) * tasks[j]
        total += g
    return total


def cagrad(tasks, c):
    """d = g_0 + c ‖g_0‖ g_w / ‖g_w‖ with w by sequential quadratic programming."""
    mean = tasks.mean(axis=0)
    radius = c * np.linalg.norm(mean)

    def objective(w):
        g = w @ tasks
        return g @ mean + radius * np.linalg.norm(g)

    count = len(tasks)
    starts = [np.full(count, 1 / count), 0.9 * np.eye(count)[0] + 0.1 / count]
    solutions = [
        minimize(
            objective,
            start,
            method="SLSQP",
            bounds=[(0, 1)] * count,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        for start in starts
    ]
    g = min(solutions, key=lambda s: s.fun).x @ tasks
    return mean + radius * g / np.linalg.norm(g)
