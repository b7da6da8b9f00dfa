"""Float64 NumPy twins of the recipes that act on the momentum, one leaf at a time."""

import numpy as np

QUINTIC = (3.4445, -4.775, 2.0315)


def newton_schulz(x, coefficients=QUINTIC, steps=5, eps=1e-8):
    """a X + b X Xᵀ X + c X (Xᵀ X)² of X / ‖X‖, again and again."""
    a, b, c = coefficients
    x = x / (np.linalg.norm(x) + eps)
    for _ in range(steps):
        gram = x.T @ x
        x = a * x + b * x @ gram + c * x @ gram @ gram
    return x


def polar(x):
    """The exact msign: all singular values that are not zero become 1."""
    u, sigma, v = np.linalg.svd(x, full_matrices=False)
    kept = sigma > 1e-9 * max(sigma[0], 1e-300)
    return u[:, kept] @ v[kept]


def muon_steps(gradients, basis, beta=0.95, nesterov=True, msign=newton_schulz):
    """√max(1, out / in) P msign(M), M Nesterov's momentum of P g, for g (in, out)."""

    def project(x):
        return x - basis @ (basis.T @ x)

    m, steps = 0.0, []
    for t, g in enumerate(map(project, gradients), start=1):
        m = beta * m + (1 - beta) * g
        if nesterov:
            ahead = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        else:
            ahead = m / (1 - beta**t)
        scale = np.sqrt(max(1.0, g.shape[1] / g.shape[0]))
        steps.append(scale * project(msign(ahead)))
    return steps


def among_largest(x, share):
    """|x| at least as large as the k-th largest, by sorting."""
    size = np.sort(np.abs(x).ravel())
    return np.abs(x) >= size[-max(1, int(share * x.size + 1e-9))]


def mofo_steps(gradients, share=0.1, b1=0.9, b2=0.999, eps=1e-8):
    """m̂ / (√v̂ + eps) where |m| is among the largest."""
    m = v = 0.0
    steps = []
    for t, g in enumerate(gradients, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        adam = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        steps.append(np.where(among_largest(m, share), adam, 0.0))
    return steps
