"""`leading` outside jit: NumPy in float64, with as many columns as are in use."""

import functools

import jax
import numpy as np

from adamr.lora.leading import EXACT, MORE, ROUNDS, floor_of

__all__ = ["leading_on_host"]

Array = np.ndarray


def _gram(evidence: Array, rows: bool) -> Array:
    """Of entries of at most 1, or of rows of energy 1; 0 for what is not usable."""
    peak = np.max(np.abs(evidence), initial=0.0)
    if not (np.isfinite(peak) and peak > 0):
        return np.zeros((evidence.shape[-1],) * 2)
    evidence = evidence / peak
    if not rows:
        return evidence
    evidence = evidence / np.linalg.norm(evidence)
    return evidence.T @ evidence


def _outside(known: Array, x: Array) -> Array:
    return x - known @ (known.T @ x)


def _spectrum(gram: Array) -> tuple[Array, Array]:
    energy, vectors = np.linalg.eigh(gram)
    return energy[::-1], vectors[:, ::-1]


def _qr(x: Array) -> tuple[Array, Array]:
    """QR of a tall matrix by parts of its rows, then of what is left of them.

    BLAS gives the whole to several threads, which mostly wait for each other.
    """
    rows, count = x.shape
    parts = rows // (2 * count)
    if parts < 2 or rows % parts:
        return np.linalg.qr(x)
    q, r = np.linalg.qr(x.reshape(parts, -1, count))
    top, r = _qr(r.reshape(-1, count))
    return (q @ top.reshape(parts, count, count)).reshape(rows, count), r


@functools.lru_cache(maxsize=8)  # layers have few sizes
def _start(*shape: int) -> Array:
    return np.asarray(jax.random.normal(jax.random.key(0), shape, dtype=float))


def _iterated(known: Array, gram: Array, block: Array) -> tuple[Array, Array]:
    """Energies and vectors by block iteration."""
    block = _outside(known, block)
    for _ in range(ROUNDS):
        block, _ = _qr(_outside(known, gram @ block))
    # QR fills what is missing with arbitrary columns: those inside U vanish here.
    block = _outside(known, block)
    energy, mixed = _spectrum(block.T @ (gram @ block))
    return energy, block @ mixed


def _leading(
    known: Array, evidence: Array, block: Array, count: int, rows: bool, squared: bool
) -> Array:
    gram, floor = _gram(evidence, rows), floor_of(evidence.dtype, rows, squared)
    if squared:
        gram = gram @ gram.T
    if len(gram) > EXACT:
        energy, vectors = _iterated(known, gram, block)
    else:
        energy, vectors = _spectrum(_outside(known, _outside(known, gram).T))
    chosen = energy[:count] > floor * np.trace(gram)
    new = np.where(chosen, vectors[:, :count], 0.0)
    # QR turns zero columns into arbitrary ones: mask after it.
    for _ in range(2):
        new = np.where(chosen, np.linalg.qr(_outside(known, new)).Q, 0.0)
    return np.pad(new, [(0, 0), (0, count - new.shape[1])])


def leading_on_host(
    like: Array, columns: Array, evidence: Array, *, rows: bool, squared: bool
) -> tuple[Array]:
    """As `leading`, for each slice (*batch, …)."""
    *batch, fan_in, count = like.shape
    blocks = _start(*batch, fan_in, 2 * count + MORE)
    used = np.einsum("...nk,...nk->...k", columns, columns) > 0.5  # others are zero
    found = np.empty(like.shape)
    for i in np.ndindex(*batch):
        known = columns[i][:, used[i]]
        found[i] = _leading(known, evidence[i], blocks[i], count, rows, squared)
    return (found,)
