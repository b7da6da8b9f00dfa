"""Float64 NumPy twins of the penalties and importances, one leaf, as in the papers."""

import numpy as np


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def fisher(w, inputs, labels=None, kind="true"):
    """Diagonal Fisher of logits x @ w: the mean of (x_i (y_c − p_c))²."""
    total = np.zeros_like(w, dtype=np.float64)
    eye = np.eye(w.shape[1])
    for n, x in enumerate(inputs.astype(np.float64)):
        p = softmax(x @ w.astype(np.float64))
        if kind == "true":
            draws = [(p[y], y) for y in range(len(p))]
        else:
            draws = [(1.0, labels[n] if kind == "empirical" else p.argmax())]
        for weight, y in draws:
            total += weight * np.outer(x, eye[y] - p) ** 2
    return total / len(inputs)


def mas(w, inputs, per_sample=True):
    """Of outputs x @ w: ∂ ‖f‖² / ∂w = 2 x fᵀ."""
    each = [2 * np.outer(x, x @ w) for x in inputs.astype(np.float64)]
    if per_sample:
        return np.mean(np.abs(each), axis=0)
    return np.abs(np.mean(each, axis=0))


def adam_points(theta, gradient, steps, rate, b1=0.9, b2=0.999, eps=1e-8):
    """(θ, Adam's point θ̂, η D) at each step, θ decided by the caller through `send`."""
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for t in range(1, steps + 1):
        g = gradient(theta, t)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        d = 1 / (np.sqrt(v / (1 - b2**t)) + eps)
        eta = rate(t - 1)
        theta = yield theta - eta * d * m / (1 - b1**t), eta * d


def proximal_trajectory(theta, gradient, steps, rate, k, anchor, **kwargs):
    """θ <- (θ̂ + η D k θ*) / (1 + η D k)."""
    points = adam_points(theta, gradient, steps, rate, **kwargs)
    path, (near, scale) = [], next(points)
    while True:
        theta = (near + scale * k * anchor) / (1 + scale * k)
        path.append(theta)
        try:
            near, scale = points.send(theta)
        except StopIteration:
            return path


def si_boundary(big_omega, omega, theta, anchor, damping):
    return np.maximum(big_omega + omega / ((theta - anchor) ** 2 + damping), 0)


def walk(thetas, gradients, interval, alpha, damping, fisher):
    """F and s of one task; thetas has one entry more than gradients."""
    squares = omega = score = np.zeros_like(thetas[0])
    mark = thetas[0]
    for t, g in enumerate(gradients, start=1):
        omega = omega - g * (thetas[t] - thetas[t - 1])
        squares = squares + g**2
        if t % interval == 0:
            distance = 0.5 * fisher * (thetas[t] - mark) ** 2
            score = score + np.maximum(omega / (distance + damping), 0)
            fisher = (1 - alpha) * fisher + alpha * squares / interval
            squares = omega = np.zeros_like(mark)
            mark = thetas[t]
    return fisher, score


def unit_range(x):
    return (x - x.min()) / (x.max() - x.min())
