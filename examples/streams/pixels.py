"""What image streams do to pixels: turn, reorder, scale. All in NumPy."""

import numpy as np


def rotate(x: np.ndarray, degrees: float) -> np.ndarray:
    """Turns images counter-clockwise about their centre; bilinear, zero outside.

    Args:
      x: float32 (n, height, width, channels).
      degrees: 90 equals `numpy.rot90` on square images.
    """
    height, width = x.shape[1:3]
    turn = np.deg2rad(degrees % 360)
    row, column = np.meshgrid(
        np.arange(height) - (height - 1) / 2,
        np.arange(width) - (width - 1) / 2,
        indexing="ij",
    )
    # Rounded: else 90 degrees misses the outermost pixels by 1e-16.
    from_row = np.round(np.cos(turn) * row + np.sin(turn) * column, 9)
    from_column = np.round(np.cos(turn) * column - np.sin(turn) * row, 9)
    from_row, from_column = from_row + (height - 1) / 2, from_column + (width - 1) / 2
    top, left = np.floor(from_row).astype(int), np.floor(from_column).astype(int)
    out = np.zeros_like(x)
    for r in (top, top + 1):
        for c in (left, left + 1):
            share = (1 - abs(from_row - r)) * (1 - abs(from_column - c))
            share *= (0 <= r) & (r < height) & (0 <= c) & (c < width)
            near = x[:, r.clip(0, height - 1), c.clip(0, width - 1)]
            out += near * share[..., None].astype(x.dtype)
    return out


def permute(x: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Pixel k of the result is pixel order[k]; channels move together."""
    flat = x.reshape(len(x), -1, x.shape[-1])
    return flat[:, order].reshape(x.shape)


def resize(x: np.ndarray, size: int) -> np.ndarray:
    """Bilinear, pixel centres aligned as Pillow does: (n, size, size, 3)."""
    for axis in (1, 2):
        length = x.shape[axis]
        if length == size:
            continue
        at = ((np.arange(size) + 0.5) * length / size - 0.5).clip(0, length - 1)
        low = np.floor(at).astype(int)
        share = (at - low).astype(x.dtype)
        share = share[(slice(None), *(None,) * (3 - axis))]
        above = np.minimum(low + 1, length - 1)
        x = x.take(low, axis) * (1 - share) + x.take(above, axis) * share
    return np.broadcast_to(x, (*x.shape[:3], 3)) if x.shape[-1] == 1 else x
