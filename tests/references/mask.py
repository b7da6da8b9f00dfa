"""Float64 twins of replay, masks and step shapes, one flat leaf or list at a time."""

import numpy as np


def mix(g, m, weight):
    return (1 - weight) * g + weight * m


def er(gs, memories, weight, b1=0.9, b2=0.999, eps=1e-8):
    """Steps without learning rate: m from the mixture, v from both parts."""
    m = v = 0.0
    steps = []
    for t, (g, r) in enumerate(zip(gs, memories, strict=True), start=1):
        m = b1 * m + (1 - b1) * mix(g, r, weight)
        v = b2 * v + (1 - b2) * mix(g**2, r**2, weight)
        steps.append(m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps))
    return steps


def disruption(gs, retains, decay=0.9, normalize=True):
    """g̃ for a sequence of flat gradients."""
    r, out = 0.0, []
    for g, x in zip(gs, retains, strict=True):
        r = decay * r + (1 - decay) * x
        norm = np.linalg.norm(g) if normalize else 1.0
        out.append(np.where(np.sign(g) == np.sign(r), g, 0.0) / (norm or 1.0))
    return out


def adam_where(gs, masks, b1=0.9, b2=0.999, eps=1e-8):
    """Adam whose coordinates stand still where the mask is False; one common count."""
    m, v = np.zeros_like(gs[0]), np.zeros_like(gs[0])
    steps = []
    for t, (g, keep) in enumerate(zip(gs, masks, strict=True), start=1):
        m = np.where(keep, b1 * m + (1 - b1) * g, m)
        v = np.where(keep, b2 * v + (1 - b2) * g**2, v)
        step = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        steps.append(np.where(keep, step, 0.0))
    return steps


def adamp_projection(w, g, u, delta, wd_ratio, eps=1e-8):
    """As in the authors' code, on a kernel (out, …): the output axis comes first."""
    for rows in (len(w), 1):
        wv, gv, uv = (x.reshape(rows, -1) for x in (w, g, u))
        norms = np.linalg.norm(wv, axis=1) * np.linalg.norm(gv, axis=1)
        cosine = np.abs((wv * gv).sum(axis=1)) / np.maximum(norms, eps)
        if cosine.max() < delta / np.sqrt(wv.shape[1]):
            unit = wv / (np.linalg.norm(wv, axis=1, keepdims=True) + eps)
            uv = uv - unit * (unit * uv).sum(axis=1, keepdims=True)
            return uv.reshape(w.shape), wd_ratio
    return u, 1.0


def classp(gs, rates, thresholds, suppress, power, eps):
    """The method element by element; steps of one flat leaf."""
    total, steps = np.zeros_like(gs[0]), []
    for g, rate, tau, divide in zip(gs, rates, thresholds, suppress, strict=True):
        step = np.zeros_like(g)
        for i, x in enumerate(g):
            if x**2 > tau:
                total[i] += abs(x) ** power
                divisor = (eps + total[i]) ** (1 / power) if divide else 1.0
                step[i] = -rate * x / divisor
        steps.append(step)
    return steps
