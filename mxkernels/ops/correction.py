"""What offsets add to the product of the elements: a small product over groups of K.

An asymmetric operand is a = S q + O, with O constant in a block. So, over groups of K within the blocks of both sides,

    sum_k a b = sum_k (S q)_a (S q)_b + sum_groups (O_a Σ_b + Σ_a O_b + O_a O_b n)

where Σ is a group's sum of S q, and n its elements. The first is a product of symmetric operands; the rest is a
product along groups, whose columns stand here. The tensor cores take them as tf32 numbers, of 11 bits and fp32's
exponents, which hold an offset, being fp16, exactly; and a sum exactly, or exactly as two numbers: see `sum_parts`.
"""

from __future__ import annotations

from dataclasses import dataclass

from .operand import Operand

BITS = 11  # of a tf32 number


@dataclass(frozen=True)
class Columns:
    """One side of the small product: sections of a column for each group, and a letter for each section.

    Attributes:
        width: elements of K in a group; the last one may be cut.
        sections: O is a group's offset, S its sum of S q, N its offset times its elements; of S and N the leading
            11 bits. s and n are what is left of them.
    """

    width: int
    sections: str

    def count(self, k: int) -> int:
        """How many columns there are."""
        return len(self.sections) * -(-k // self.width)

    def padded(self, k: int) -> int:
        """fp32 numbers of a row of them: descriptors need whole 16 bytes."""
        return (self.count(k) + 3) // 4 * 4


def group_width(a: Operand, b: Operand) -> int:
    """Elements of K in a group: the most that lie in one block of either side."""
    return min(_extent(a), _extent(b))


def correction_columns(a: Operand, b: Operand, k: int) -> tuple[Columns, Columns]:
    """The columns of both sides, of which one at least is asymmetric: with blocks of 32 and e2m1, K/32 if it is one
    side, 3 K/32 if it is both."""
    width = group_width(a, b)
    pairs = []
    if not a.symmetric:
        pairs += [("O", part) for part in sum_parts(b, width)]
    if not b.symmetric:
        pairs += [(part, "O") for part in sum_parts(a, width)]
    if not a.symmetric and not b.symmetric:
        # times a power of two the offset keeps its 11 bits; times what is left of the last group it has up to 18
        pairs += [("O", part) for part in ("Nn" if k % width else "N")]
    left, right = ("".join(side) for side in zip(*pairs, strict=True))
    return Columns(width, left), Columns(width, right)


def sum_parts(operand: Operand, width: int) -> str:
    """Sections for the sums of `width` elements. They are integers, times a power of two: of 32 elements up to 384
    for e2m1, 2048 for e3m0, 256 for int4, 1920 for e2m3, which have 11 bits; up to 14336 for e3m2, which has not.
    Nothing exceeds 22 bits. What was folded may have been any of them."""
    assert operand.spec is not None
    element = operand.spec.element
    largest = max(map(abs, element.values)) / element.smallest * width
    return "S" if largest <= 2**BITS and not operand.folded else "Ss"


def _extent(operand: Operand) -> int:
    """Elements of a block along K."""
    assert operand.spec is not None
    block = operand.spec.block
    return block.rows if operand.turned else block.cols
