"""Float64 NumPy twins of the subspace recipes, one kernel (n, out) at a time."""

import numpy as np


def covariance(batches):
    """Mean of x xᵀ over all samples of all batches, one sample at a time."""
    rows = np.concatenate(batches).astype(np.float64)
    return sum(np.outer(x, x) for x in rows) / len(rows)


def null_space_projector(moment, ratio, floor=0.0):
    """P = U2 U2ᵀ, U2 the singular vectors up to ratio · max(λ_min, floor λ_max)."""
    u, sigma, _ = np.linalg.svd(moment)
    free = u[:, sigma <= ratio * max(sigma[-1], floor * sigma[0])]
    return free @ free.T


def nscl_steps(gradients, projector, b1, b2, eps):
    """P m̂ / (√v̂ + eps) with the raw gradient in both moments."""
    m = v = 0.0
    steps = []
    for t, g in enumerate(gradients, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        adam = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        steps.append(projector @ adam)
    return steps


def trust(bases, gradient):
    """‖B Bᵀ G‖ / ‖G‖ for every basis."""
    norm = np.linalg.norm(gradient)
    return np.array([np.linalg.norm(b @ b.T @ gradient) / norm for b in bases])


def task_subspace(memory, samples, threshold):
    """Directions of the task and of the grown memory; ranks old and new in one list."""
    r = samples.T.astype(np.float64)
    old = [(m @ r @ r.T @ m, m, False) for m in memory.T]
    u, sigma, _ = np.linalg.svd(r - memory @ memory.T @ r, full_matrices=False)
    new = [(s**2, x, True) for s, x in zip(sigma, u.T, strict=True)]
    total, gathered, task, fresh = (r**2).sum(), 0.0, [], []
    for energy, direction, is_new in sorted(old + new, key=lambda e: -e[0]):
        if gathered >= (threshold - 1e-6) * total or energy <= 1e-12 * total:
            break
        gathered += energy
        task.append(direction)
        if is_new:
            fresh.append(direction)
    return np.array(task).T, np.array([*memory.T, *fresh]).T


def scaled_weight(kernel, basis, scale):
    """W − B Bᵀ W + B Q Bᵀ W."""
    inside = basis.T @ kernel
    return kernel - basis @ inside + basis @ scale @ inside


def relaxing_subspace(memory, gradient, energy, threshold):
    """The authors' greedy search: best unit u in what is left of M, deflated by QR."""
    u, sigma, _ = np.linalg.svd(gradient, full_matrices=False)
    share = np.cumsum(sigma**2) / (sigma**2).sum()
    u = u[:, : int(np.searchsorted(share, energy)) + 1]
    left, found = memory, []
    while left.shape[1]:
        inner = np.linalg.svd(left.T @ u @ u.T @ left)[0][:, 0]
        best = left @ inner
        if np.linalg.norm(u.T @ best) < threshold:
            break
        found.append(best)
        rest = left - np.outer(best, best @ left)
        vectors, size, _ = np.linalg.svd(rest, full_matrices=False)
        left = vectors[:, size > 1e-4]
    return np.array(found).T.reshape(len(memory), -1)


def gpm_si_trajectory(theta, gradients, rate, k, anchor, basis, b1, b2, eps=1e-8):
    """θ <- θ + P (prox − θ), m from P g, v from g and one number a column."""
    m, v, path = np.zeros_like(theta), np.zeros((1, theta.shape[1])), []
    for t, g in enumerate(gradients, start=1):
        m = b1 * m + (1 - b1) * (g - basis @ (basis.T @ g))
        v = b2 * v + (1 - b2) * np.mean(g**2, axis=0, keepdims=True)
        scale = rate / (np.sqrt(v / (1 - b2**t)) + eps)
        near = theta - scale * m / (1 - b1**t)
        step = (near + scale * k * anchor) / (1 + scale * k) - theta
        theta = theta + step - basis @ (basis.T @ step)
        path.append(theta)
    return path
