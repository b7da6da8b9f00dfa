"""`leading` outside jit: NumPy in float64, with as many columns as are in use."""

import functools

import jax
import numpy as np

from adamr.lora.leading import EXACT, MORE, ROUNDS, floor_of
from adamr.subspaces.host import Array, in_use, of_energy_one, outside

__all__ = ["leading_on_host"]


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
    block = outside(known, block)
    for _ in range(ROUNDS):
        block, _ = _qr(outside(known, gram @ block))
    # QR fills what is missing with arbitrary columns: those inside U vanish here.
    block = outside(known, block)
    energy, mixed = _spectrum(block.T @ (gram @ block))
    return energy, block @ mixed


def _leading(
    known: Array, evidence: Array, block: Array, count: int, rows: bool, squared: bool
) -> Array:
    scaled = of_energy_one(evidence, by_gram=not rows)
    floor = floor_of(evidence.dtype, rows, squared)
    if scaled is None:
        return np.zeros((evidence.shape[-1], count))
    gram = scaled.T @ scaled if rows else scaled
    if squared:
        gram = gram @ gram.T
    if len(gram) > EXACT:
        energy, vectors = _iterated(known, gram, block)
    else:
        energy, vectors = _spectrum(outside(known, outside(known, gram).T))
    chosen = energy[:count] > floor * np.trace(gram)
    new = np.where(chosen, vectors[:, :count], 0.0)
    # QR turns zero columns into arbitrary ones: mask after it.
    for _ in range(2):
        new = np.where(chosen, np.linalg.qr(outside(known, new)).Q, 0.0)
    return np.pad(new, [(0, 0), (0, count - new.shape[1])])


def leading_on_host(
    like: Array, columns: Array, evidence: Array, *, rows: bool, squared: bool
) -> tuple[Array]:
    """As `leading`, for each slice (*batch, …)."""
    *batch, fan_in, count = like.shape
    blocks = _start(*batch, fan_in, min(2 * count + MORE, fan_in))
    columns, evidence = (np.asarray(x, np.float64) for x in (columns, evidence))
    found = np.empty(like.shape)
    for i in np.ndindex(*batch):
        known = in_use(columns[i])
        found[i] = _leading(known, evidence[i], blocks[i], count, rows, squared)
    return (found,)
