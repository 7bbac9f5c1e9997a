"""Configs decide speed and never a byte: every op under configs from all over the tuner's space, in the interpreter.

Of products whose sums are exact: the interpreter multiplies tiles of another shape in another order.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="kernels need Triton")

import torch
from invariance import CASTS, Case, check_bytes, products_of, signs, streams_of

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered"),
]

CPU = torch.device("cpu")
PRODUCTS, STREAMS = products_of(signs), streams_of(signs)


@pytest.mark.parametrize("case", CASTS.values(), ids=CASTS)
def test_casts(case: Case) -> None:
    check_bytes(case, CPU, (20, 0, 100), count=4)


@pytest.mark.parametrize("case", PRODUCTS.values(), ids=PRODUCTS)
def test_products(case: Case) -> None:
    check_bytes(case, CPU, (37, 48, 160), count=5)


@pytest.mark.parametrize("case", STREAMS.values(), ids=STREAMS)
def test_products_of_few_rows(case: Case) -> None:
    check_bytes(case, CPU, (9, 48, 640), count=5)
