"""Float64 NumPy twins of low-rank pairs: one layer, A (n, r) and B (r, out)."""

import numpy as np

from tests.references import core


def grown(basis, inputs, threshold):
    """U and the fewest left singular vectors of the rest that reach the threshold."""
    total = np.sum(inputs**2)
    rest = inputs - inputs @ basis @ basis.T
    left, sigma, _ = np.linalg.svd(rest.T, full_matrices=False)
    energy = total - np.sum(sigma**2)
    count = 0
    while count < len(sigma) and energy < threshold * total * (1 - 1e-12):
        energy += sigma[count] ** 2
        count += 1
    return np.concatenate([basis, left[:, :count]], axis=1)


def outside(basis, fresh):
    """(I − UUᵀ) A₀, its columns as long as those of A₀."""
    rest = fresh - basis @ (basis.T @ fresh)
    length, after = (np.linalg.norm(x, axis=0) for x in (fresh, rest))
    left = after > 1e-5 * length
    return rest * np.where(left, length / np.where(left, after, 1), 0)


def start_task(w, a, b, basis, inputs, fresh, *, scaling=1.0, threshold=0.97):
    """(W, A, B, U) of the next task."""
    basis = grown(basis, inputs, threshold)
    return w + scaling * a @ b, outside(basis, fresh), np.zeros_like(b), basis


def _leading(basis, gram, rank):
    """The leading left singular vectors of (I − UUᵀ) G^½, G = `gram`."""
    keep = np.eye(len(gram)) - basis @ basis.T
    energy, vectors = np.linalg.eigh(keep @ gram @ keep)
    return vectors[:, ::-1][:, :rank], energy[::-1][:rank]


def inflora(basis, inputs, rank, form="paper"):
    gram = inputs.T @ inputs / len(inputs)
    vectors, _ = _leading(basis, gram @ gram.T if form == "code" else gram, rank)
    return vectors / np.sqrt(3)


def keeplora(basis, gradient, rank):
    return _leading(basis, gradient @ gradient.T, rank)[0]


def orthogonality(blocks):
    """Σ_{t' < t} Σ |A_{t'}ᵀ A_t|, t the last of the blocks (n, r)."""
    *old, new = blocks
    return sum(np.abs(each.T @ new).sum() for each in old)


def one_layer(method, *, seed=0, n=32, out=16, rank=4, inputs=6, steps=60, rate=1e-2):
    """What a second task does to the first one's response of one layer, under Adam.

    Both tasks fit random targets of h = xW + (xA)B from `inputs` random inputs each.

    Returns:
      How far the response x A B of the first task moves, relative to its size before,
      and the loss of the second task, relative to the loss it started with.
    """
    rng = np.random.default_rng(seed)
    x, new = rng.normal(size=(2, inputs, n))
    y, target = rng.normal(size=(2, inputs, out))
    w = np.zeros((n, out))
    a = rng.normal(size=(n, rank)) / np.sqrt(n)
    b = np.zeros((rank, out))

    def gradients(x, y, a, b):
        error = (x @ w + x @ a @ b - y) / len(x)
        return x.T @ error @ b.T, (x @ a).T @ error

    held_a, held_b = method in ("a", "both", "complement"), method in ("b", "both")

    def step(seen, g, basis, held):
        """Adam; v is shared where a subspace has the leaf, also an empty one."""
        seen.append((core.project(g, basis), g))
        return core.trajectory(*zip(*seen, strict=True), shared_axes=(0,) * held)[-1]

    def trained(x, y, a, b, in_a, in_b):
        of_a, of_b = [], []
        for _ in range(steps):
            g_a, g_b = gradients(x, y, a, b)
            a = a - rate * step(of_a, g_a, in_a, held_a)
            b = b - rate * step(of_b, g_b, in_b, held_b)
        return a, b

    nothing = np.zeros((n, 0)), np.zeros((rank, 0))
    a, b = trained(x, y, a, b, *nothing)
    before = x @ (w + a @ b)
    of_a = grown(nothing[0], x, 1.0)
    of_b = grown(nothing[1], x @ a, 1.0)
    if method == "complement":
        fresh = rng.normal(size=(n, rank)) / np.sqrt(n)
        w, a, b, of_a = start_task(w, a, b, nothing[0], x, fresh, threshold=1.0)
    in_a, in_b = of_a if held_a else nothing[0], of_b if held_b else nothing[1]
    start = np.sum((new @ (w + a @ b) - target) ** 2)
    a, b = trained(new, target, a, b, in_a, in_b)
    end = np.sum((new @ (w + a @ b) - target) ** 2)
    moved = np.linalg.norm(x @ (w + a @ b) - before) / np.linalg.norm(before)
    return moved, end / start
