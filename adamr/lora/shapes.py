"""How the axes of a kernel W, an A and a B meet in W + A·B."""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adamr.sharding import einsum_sharding

__all__ = ["Factors", "Meeting", "Shape", "factors", "meeting"]

Shape = tuple[int, ...]


class Factors(NamedTuple):
    """What the axes of an A and a B are for.

    Attributes:
      lead: how many axes in front stack layers, in A, B and the kernel.
      rank: r.
      fan_in, fan_out: the other axes of A and of B.
      out_first: PEFT's order: A (*lead, r, *in), B (*lead, *out, r).
    """

    lead: int
    rank: int
    fan_in: Shape
    fan_out: Shape
    out_first: bool

    @property
    def rank_axis(self) -> tuple[int, int]:
        """The axis of A and that of B that has length r."""
        after = self.lead + len(self.fan_out if self.out_first else self.fan_in)
        return (self.lead, after) if self.out_first else (after, self.lead)

    def as_columns(self, a: jax.Array) -> jax.Array:
        """A as (slices, n, r), one slice per stacked layer."""
        slices = math.prod(a.shape[: self.lead])
        if self.out_first:
            return jnp.swapaxes(a.reshape(slices, self.rank, -1), -1, -2)
        return a.reshape(slices, -1, self.rank)

    def from_columns(self, columns: jax.Array, shape: Shape) -> jax.Array:
        """The inverse of `as_columns`."""
        if self.out_first:
            columns = jnp.swapaxes(columns, -1, -2)
        return columns.reshape(shape)


class Meeting(NamedTuple):
    """A·B as one einsum.

    Attributes:
      factors: of A and B.
      subscripts: of the einsum over the kernel's axes.
      a, b: shapes of A and B with their axes split as the kernel has them.
    """

    factors: Factors
    subscripts: str
    a: Shape
    b: Shape

    def product(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """A·B in the kernel's shape, in float32 or wider."""
        dtype = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
        a, b = a.reshape(self.a).astype(dtype), b.reshape(self.b).astype(dtype)
        return jnp.einsum(
            self.subscripts,
            a,
            b,
            precision=jax.lax.Precision.HIGHEST,
            out_sharding=einsum_sharding(self.subscripts, a, b),
        )

    def outputs_as_rank(self, kernel: jax.Array, a: Shape) -> jax.Array:
        """A kernel with A's axes, all its outputs in the place of r."""
        factors, letters = self.subscripts.split("->")
        of_a, of_b = factors.split(",")
        outputs = "".join(x for x in letters if x in of_b and x not in of_a)
        order = [letters.index(x) for x in of_a.replace("z", outputs)]
        at = self.factors.rank_axis[0]
        return kernel.transpose(order).reshape((*a[:at], -1, *a[at + 1 :]))


def _readings(a: Shape, b: Shape, out_first: bool) -> Iterator[Factors]:
    """Every way to read the shapes of a pair, fewest leading axes first."""
    for lead in range(min(len(a), len(b)) - 1):
        if a[:lead] != b[:lead]:
            return
        if out_first:
            ranks, fan_in, fan_out = (a[lead], b[-1]), a[lead + 1 :], b[lead:-1]
        else:
            ranks, fan_in, fan_out = (a[-1], b[lead]), a[lead:-1], b[lead + 1 :]
        if ranks[0] == ranks[1]:
            yield Factors(lead, ranks[0], fan_in, fan_out, out_first)


def factors(a: Shape, b: Shape, out_first: bool) -> Factors | None:
    """What the axes are for, without the kernel: as many stack layers as may."""
    return max(_readings(a, b, out_first), default=None, key=lambda x: x.lead)


def _fits(axes: list[int], given: Shape) -> bool:
    """Whether a factor has these axes, one by one or flattened into one."""
    return tuple(axes) == given or (len(given) == 1 and math.prod(axes) == given[0])


@functools.cache
def meeting(kernel: Shape, a: Shape, b: Shape, out_first: bool) -> Meeting | None:
    """The first way in which A·B has the kernel's shape, or None.

    Contracted axes come as early as the shapes allow; with `out_first`, late.
    """
    roles = ("lead", "out", "in") if out_first else ("lead", "in", "out")
    letters = "abcdefghijklmnopq"[: len(kernel)]
    for how in _readings(a, b, out_first):
        shared = a[: how.lead]
        for chosen in itertools.product(roles, repeat=len(kernel)):
            at = {r: [d for d, role in enumerate(chosen) if role == r] for r in roles}
            size = {r: [kernel[d] for d in at[r]] for r in roles}
            if tuple(size["lead"]) != shared:
                continue
            if not (_fits(size["in"], how.fan_in) and _fits(size["out"], how.fan_out)):
                continue
            lead, fan_in, fan_out = (
                "".join(letters[d] for d in at[r]) for r in ("lead", "in", "out")
            )
            if out_first:
                subscripts = f"{lead}z{fan_in},{lead}{fan_out}z->{letters}"
                of_a, of_b = (how.rank, *size["in"]), (*size["out"], how.rank)
            else:
                subscripts = f"{lead}{fan_in}z,{lead}z{fan_out}->{letters}"
                of_a, of_b = (*size["in"], how.rank), (how.rank, *size["out"])
            return Meeting(how, subscripts, (*shared, *of_a), (*shared, *of_b))
    return None
