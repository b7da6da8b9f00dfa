"""Float64 NumPy twins of the core's equations, one leaf at a time, as in the papers."""

import numpy as np


def project(g, basis, weights=None):
    """g − U diag(λ) Uᵀ g with U (n, r) on the first axis of g (n, out)."""
    lam = np.ones(basis.shape[1]) if weights is None else weights
    return g - basis @ (lam[:, None] * (basis.T @ g))


def strength(overlaps, alpha_max=0.5, decay=0.99, debias=False):
    """α_t and s̄_t for a sequence of overlaps s_t."""
    smoothed, alphas, means = 0.0, [], []
    for t, s in enumerate(overlaps, start=1):
        smoothed = decay * smoothed + (1 - decay) * s
        seen = smoothed / (1 - decay**t) if debias else smoothed
        means.append(smoothed)
        alphas.append(alpha_max * (1 - seen))
    return np.array(alphas), np.array(means)


def trajectory(
    firsts,
    seconds,
    *,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    eps_root=0.0,
    estimator="adam",
    shared_axes=(),
    guard=True,
):
    """Steps m̂ / (√(v̂ + eps_root) + eps) of the merging link for one leaf."""
    shape = firsts[0].shape
    start = {"yogi": 1e-6}.get(estimator, 0.0)
    m = np.full(shape, start)
    small = tuple(1 if d in shared_axes else n for d, n in enumerate(shape))
    v = np.full(small, {"yogi": 1e-6, "adagrad": 0.1}.get(estimator, 0.0))
    v_max, steps = np.zeros(small), []
    for t, (f, s) in enumerate(zip(firsts, seconds, strict=True), start=1):
        square, other = (np.asarray(x, np.float64) ** 2 for x in (s, f))
        if shared_axes:
            square, other = (
                x.mean(axis=shared_axes, keepdims=True) for x in (square, other)
            )
        if guard == "shared" or (guard and not shared_axes):
            square = np.maximum(square, other)
        m = b1 * m + (1 - b1) * f
        m_hat = m / (1 - b1**t)
        if estimator == "adagrad":
            v = v + square
            v_hat = v
        elif estimator == "yogi":
            v = v - (1 - b2) * np.sign(v - square) * square
            v_hat = v / (1 - b2**t)
        elif estimator == "adafactor":  # leaves below 128 are not factored
            decay = min(b2, 1 - t**-0.8)
            v = decay * v + (1 - decay) * (square + 1e-30)
            v_hat = v
        else:
            v = b2 * v + (1 - b2) * square
            v_hat = v if estimator == "rmsprop" else v / (1 - b2**t)
            if estimator == "amsgrad":
                v_max = np.maximum(v_max, v_hat)
                v_hat = v_max
        steps.append(m_hat / (np.sqrt(v_hat + eps_root) + eps))
    return steps


def oblique(m, d, basis):
    """D(m − U (UᵀDU)⁻¹ UᵀDm) for every column of m (n, out), d (n, out)."""
    columns = []
    for j in range(m.shape[1]):
        weighted = d[:, j : j + 1] * basis
        x = np.linalg.solve(basis.T @ weighted, weighted.T @ m[:, j])
        columns.append(d[:, j] * (m[:, j] - basis @ x))
    return np.stack(columns, axis=1)


def eigenbasis(firsts, seconds, basis, **kwargs):
    """Adam on (Uᵀg, g − UUᵀg), rotated back; the rest is kept off U on the way out."""

    def split(gs):
        along = [basis.T @ g for g in gs]
        return along, [g - basis @ c for g, c in zip(gs, along, strict=True)]

    (f_along, f_rest), (s_along, s_rest) = split(firsts), split(seconds)
    along = trajectory(f_along, s_along, **kwargs)
    rest = trajectory(f_rest, s_rest, **kwargs)
    return [basis @ a + project(b, basis) for a, b in zip(along, rest, strict=True)]


def grow(basis, samples, threshold):
    """GPM's rule (eq. 5 and 9) by SVD; samples (num_samples, n), basis (n, r)."""
    r = samples.T
    residual = r - basis @ (basis.T @ r)
    total, left = (r**2).sum(), (residual**2).sum()
    u, sigma, _ = np.linalg.svd(residual, full_matrices=False)
    have, k = total - left, 0
    while k < len(sigma) and have < (threshold - 1e-6) * total:
        have += sigma[k] ** 2
        k += 1
    return np.concatenate([basis, u[:, :k]], axis=1)


def importance(samples, basis, alpha):
    """Scaled Gradient Projection: (α+1) σ_i / (α σ_i + σ_max)."""
    sigma = np.sqrt(((samples @ basis) ** 2).sum(axis=0))
    return (alpha + 1) * sigma / (alpha * sigma + sigma.max())
