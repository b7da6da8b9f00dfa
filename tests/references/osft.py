"""Float64 NumPy twins of OSFT: exact on dense kernels, and as its authors train it."""

import numpy as np


def top_directions(kernel, k):
    """The k leading left and right singular vectors, as columns."""
    u, _, vt = np.linalg.svd(kernel, full_matrices=False)
    return u[:, :k], vt[:k].T


def project(g, u, v, form="both_sides"):
    """(I − P) g (I − Q), or g − P g Q."""
    p, q = u @ u.T, v @ v.T
    if form == "paper":
        return g - p @ g @ q
    return g - p @ g - g @ q + p @ g @ q


def trajectory(
    kernel,
    gradients,
    u,
    v,
    *,
    rate,
    b1,
    b2,
    eps=1e-8,
    decay=0.0,
    form="both_sides",
    share_v=False,
):
    """Kernels after each step of AdamW: moment and decay projected, and one v; or, with
    v per entry, the step projected and v at least the square of what m is fed."""
    m, second, path = np.zeros_like(kernel), 0.0, []
    for t, g in enumerate(gradients, start=1):
        fed = project(g, u, v, form)
        m = b1 * m + (1 - b1) * fed
        square = np.mean(g**2) if share_v else np.maximum(g**2, fed**2)
        second = b2 * second + (1 - b2) * square
        step = m / (1 - b1**t) / (np.sqrt(second / (1 - b2**t)) + eps)
        if share_v:
            step = step + project(decay * kernel, u, v)
        else:
            step = project(step + decay * kernel, u, v, form)
        kernel = kernel - rate * step
        path.append(kernel)
    return path


class AdamW:
    """One array under AdamW, element by element."""

    def __init__(self, rate, decay, b1=0.9, b2=0.999, eps=1e-8):
        self.rate, self.decay, self.b1, self.b2, self.eps = rate, decay, b1, b2, eps
        self.m, self.v, self.t = 0.0, 0.0, 0

    def step(self, x, g):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        m, v = self.m / (1 - self.b1**self.t), self.v / (1 - self.b2**self.t)
        x = x * (1 - self.rate * self.decay)
        return x - self.rate * m / (np.sqrt(v) + self.eps)


def factors_under_adamw(kernel, gradients, k, *, rate, decay, hook=True):
    """PEFT's OSF: W = U_h S_h V_h + U_l S_l V_l, the low factors trained by AdamW.

    Their gradients are projected off U_h and V_h by hooks, before AdamW sees them.

    Args:
      kernel: W.
      gradients: of the loss by W, one per step.
      k: directions kept.
      rate, decay: of AdamW.
      hook: False: no projection.

    Returns:
      W after the last step.
    """
    u, s, vt = np.linalg.svd(kernel, full_matrices=False)
    u_high, high, vt_high = u[:, :k], (u[:, :k] * s[:k]) @ vt[:k], vt[:k]
    low = [u[:, k:], s[k:], vt[k:]]
    optimizers = [AdamW(rate, decay) for _ in low]
    for g in gradients:
        u_low, s_low, vt_low = low
        by_u = g @ (s_low[:, None] * vt_low).T
        by_s = np.sum(u_low * (g @ vt_low.T), axis=0)
        by_v = (u_low * s_low).T @ g
        if hook:
            by_u = by_u - u_high @ (u_high.T @ by_u)
            by_v = by_v - (by_v @ vt_high.T) @ vt_high
        new = zip(optimizers, low, (by_u, by_s, by_v), strict=True)
        low = [optimizer.step(x, by) for optimizer, x, by in new]
    return high + (low[0] * low[1]) @ low[2]


def protected_share(change, u, v):
    """‖Δ − (I − P) Δ (I − Q)‖ / ‖Δ‖."""
    return np.linalg.norm(change - project(change, u, v)) / np.linalg.norm(change)
