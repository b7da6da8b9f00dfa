"""Memory of this process."""

import contextlib
import ctypes

__all__ = ["give_back"]


def give_back() -> None:
    """Hands freed memory back to the system, where the C library is one that keeps it.

    A boundary frees arrays of many sizes between others that stay. glibc keeps their
    memory, gigabytes in all, and little of it fits what is asked for next.
    """
    # Elsewhere there is no such library or no such function.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
