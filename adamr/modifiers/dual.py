"""The dual of gradient constraints: a small box-constrained quadratic program.

Constraints ⟨x, g_k⟩ ≥ 0 on x = g + Σ_k v_k g_k have the dual, with G the Gram matrix
of the rows g_k and b_k = ⟨g, g_k⟩,

    min_v  ½ vᵀ(G + ε diag G) v + bᵀv     subject to  v ≥ γ

whose optimality conditions (KKT) are v ≥ γ, r = (G + ε diag G) v + b ≥ 0 and
(v − γ)ᵀ r = 0. ε is relative to each row's own norm, so that it means the same for
gradients of any size: a single violated constraint keeps the part ε / (1 + ε) of its
violation. An absolute ε of 1e-3 keeps 91 % of it at gradient norm 0.01.

ε makes the dual unique, but biased. Without the bias: solve with a small ε, then once
more with ½ ε ‖v − v_1‖² around the first solution v_1 instead (a proximal step).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["box_program", "solve_diagonal", "solve_exact", "unit_rows"]

_PROXIMAL = 1e-5
_TOLERANCE = 2e-5  # KKT residual relative to the largest entry of q
_FULL_EXCHANGES = 3
_INTERIOR_STEPS = 30


class _Best(NamedTuple):
    """The best point that the loops have seen, and its KKT residual."""

    u: jax.Array
    residual: jax.Array


class _Pivot(NamedTuple):
    """Carry of block pivoting.

    Attributes:
      rounds: int32, exchanges so far.
      free: (T,) bool, where u_k > 0 is guessed.
      wrong: (T,) by how much each guess was wrong, 0 where it was right.
      fewest: int32, the fewest wrong guesses of any round.
      patience: int32, rounds left in which all wrong guesses are moved.
      best: see `_Best`.
    """

    rounds: jax.Array
    free: jax.Array
    wrong: jax.Array
    fewest: jax.Array
    patience: jax.Array
    best: _Best


class _Interior(NamedTuple):
    """Carry of the interior-point method.

    Attributes:
      steps: int32.
      u: (T,) the current point, > 0.
      r: (T,) its multipliers, > 0.
      best: see `_Best`.
    """

    steps: jax.Array
    u: jax.Array
    r: jax.Array
    best: _Best


def _product(matrix, vector):
    return jnp.matmul(matrix, vector, precision=jax.lax.Precision.HIGHEST)


def _residual(a, q, u):
    return jnp.max(jnp.abs(jnp.minimum(u, _product(a, u) + q)))


def _on_face(a, q, free):
    """u and r = A u + q with r = 0 where free and u = 0 elsewhere."""
    eye = jnp.eye(q.shape[0], dtype=q.dtype)
    kept = jnp.where(free[:, None] & free[None, :], a, eye)
    factor = (jnp.linalg.cholesky(kept), True)

    def solve(r):
        return jax.scipy.linalg.cho_solve(factor, jnp.where(free, -r, 0.0))

    u = solve(q)
    u = u + solve(_product(a, u) + q)
    return u, _product(a, u) + q


def _keep_better(a, q, u, best: _Best) -> _Best:
    u = jnp.maximum(u, 0.0)
    left = _residual(a, q, u)
    better = jnp.all(jnp.isfinite(u)) & (left < best.residual)
    return _Best(jnp.where(better, u, best.u), jnp.where(better, left, best.residual))


def _pivot(a, q, guess) -> _Best:
    """Guesses which u_k > 0, solves, moves every wrong guess to the other side.

    Two or three rounds as a rule. After three rounds without progress only the worst
    guess is moved, which nearly always ends, but may cycle: hence the cap.
    """
    size = q.shape[0]

    def unfinished(carry: _Pivot):
        return jnp.any(carry.wrong > 0) & (carry.rounds < size + 10)

    def exchange(carry: _Pivot) -> _Pivot:
        count = jnp.sum(carry.wrong > 0, dtype=jnp.int32)
        progress = count < carry.fewest
        patience = jnp.where(progress, _FULL_EXCHANGES, carry.patience - 1)
        worst = jnp.arange(size) == jnp.argmax(carry.wrong)
        free = carry.free ^ jnp.where(patience >= 0, carry.wrong > 0, worst)
        u, r = _on_face(a, q, free)
        rounding = 4e-7 * (1.0 + _product(jnp.abs(a), jnp.abs(u)))
        low = 1e-6 * jnp.max(jnp.abs(u))
        return _Pivot(
            rounds=carry.rounds + 1,
            free=free,
            wrong=jnp.maximum(jnp.where(free, -u - low, -r - rounding), 0.0),
            fewest=jnp.minimum(count, carry.fewest),
            patience=patience,
            best=_keep_better(a, q, u, carry.best),
        )

    zero = jnp.zeros_like(q)
    start = _Pivot(
        rounds=jnp.zeros([], jnp.int32),
        free=jnp.zeros(q.shape, bool),
        wrong=guess.astype(q.dtype),
        fewest=jnp.full([], size + 1, jnp.int32),
        patience=jnp.full([], _FULL_EXCHANGES, jnp.int32),
        best=_Best(zero, _residual(a, q, zero)),
    )
    return jax.lax.while_loop(unfinished, exchange, start).best


def _interior(a, q, best: _Best) -> _Best:
    """Primal-dual interior point; takes no step where `best` is good enough."""

    def unfinished(carry: _Interior):
        return (carry.best.residual > _TOLERANCE) & (carry.steps < _INTERIOR_STEPS)

    def step(carry: _Interior) -> _Interior:
        u, r = carry.u, carry.r
        centre = 0.1 * jnp.mean(u * r)
        ratio = r / u
        factor = (jnp.linalg.cholesky(a + jnp.diag(ratio)), True)
        du = jax.scipy.linalg.cho_solve(factor, centre / u - _product(a, u) - q)
        dr = centre / u - r - ratio * du
        furthest = jnp.maximum(jnp.max(-du / u), jnp.max(-dr / r))
        length = jnp.minimum(1.0, 0.95 / jnp.maximum(furthest, 1e-6))
        u, r = u + length * du, r + length * dr
        best = _keep_better(a, q, u, carry.best)
        face, _ = _on_face(a, q, u > r)
        return _Interior(carry.steps + 1, u, r, _keep_better(a, q, face, best))

    one = jnp.ones_like(q)
    start = _Interior(jnp.zeros([], jnp.int32), one, one, best)
    return jax.lax.while_loop(unfinished, step, start).best


def box_program(a: jax.Array, q: jax.Array, guess: jax.Array) -> jax.Array:
    """argmin_u ½ uᵀA u + qᵀu over u ≥ 0, for A with diagonal of about 1.

    Block principal pivoting: two or three Cholesky factorisations as a rule. Where it
    cycles, an interior-point method takes over. Both loops have a cap, and the best
    point they saw is the answer. Under `vmap` they run until the last lane is done.

    Args:
      a: (T, T) float32, positive definite; T up to about 50.
      q: (T,) float32, any scale.
      guess: (T,) bool, where u > 0 may be. Without a better idea, q < 0, which is
        empty only if u = 0 solves the program.

    References:
      Portugal, Júdice, Vicente, A Comparison of Block Pivoting and Interior-Point
      Algorithms for Linear Least Squares Problems with Nonnegative Variables,
      Mathematics of Computation 63 (1994).
    """
    scale = jnp.max(jnp.abs(q))
    q = q / jnp.where(scale > 0, scale, 1.0)
    return scale * _interior(a, q, _pivot(a, q, guess)).u


def unit_rows(gram, usable, regularization):
    """Norms n (1 where not usable) and the Gram matrix of g_k / n_k plus ε I."""
    size = usable.shape[0]
    norm = jnp.sqrt(jnp.where(usable, jnp.diagonal(gram), 1.0))
    pairs = usable[:, None] & usable[None, :]
    cosines = jnp.where(pairs, gram / (norm[:, None] * norm[None, :]), 0.0)
    eye = jnp.eye(size, dtype=gram.dtype)
    # Below this the float32 factorisation of a singular Gram matrix may not exist.
    epsilon = jnp.maximum(regularization, 2e-7 * size).astype(gram.dtype)
    return norm, cosines * (1.0 - eye) + (1.0 + epsilon) * eye


def solve_exact(
    gram: jax.Array,
    inner: jax.Array,
    lower: jax.typing.ArrayLike,
    usable: jax.Array,
    regularization: jax.typing.ArrayLike | None,
) -> jax.Array:
    """The dual solution v of the module's program, (T,).

    Args:
      gram: (T, T) float32 G; rows and columns that are not usable may hold anything.
      inner: (T,) float32 b.
      lower: γ.
      usable: (T,) bool; other rows get v = 0.
      regularization: ε, at least 2e-7 T; None: no bias, by a proximal step.

    >>> usable = jnp.array([True, True])
    >>> v = solve_exact(jnp.eye(2), jnp.array([1.0, -2.0]), 0.0, usable, 0.25)
    >>> print(v)
    [0.  1.6]
    """
    lower = jnp.asarray(lower, inner.dtype)
    epsilon = _PROXIMAL if regularization is None else regularization
    norm, a = unit_rows(gram, usable, epsilon)
    # In u = norm · (v − γ) ≥ 0.
    floor = jnp.where(usable, lower * norm, 0.0)
    q = jnp.where(usable, inner / norm + _product(a, floor), 0.0)
    if regularization is None:

        def proximal(_, u):
            # The first round starts from u = 0, which says nothing about the face.
            guess = jnp.where(jnp.any(u > 0), u > 0, q < 0)
            return box_program(a, q - epsilon * u, guess)

        u = jax.lax.fori_loop(0, 2, proximal, jnp.zeros_like(q))
    else:
        u = box_program(a, q, q < 0)
    return jnp.where(usable, lower + u / norm, 0.0)


def solve_diagonal(
    squares: jax.Array,
    inner: jax.Array,
    lower: jax.typing.ArrayLike,
    usable: jax.Array,
    regularization: jax.typing.ArrayLike | None,
) -> jax.Array:
    """v_k = max(γ, −b_k / ((1 + ε) ‖g_k‖²)): the dual as if rows were orthogonal.

    Exact for one row and for orthogonal rows. It corrects too much for rows at acute
    angles and too little for rows at obtuse ones. Arguments are those of `solve_exact`,
    with `squares`, (T,), for ‖g_k‖².
    """
    lower = jnp.asarray(lower, inner.dtype)
    epsilon = jnp.asarray(
        0.0 if regularization is None else regularization, inner.dtype
    )
    scale = jnp.where(usable, (1.0 + epsilon) * squares, 1.0)
    return jnp.where(usable, jnp.maximum(lower, -inner / scale), 0.0)
