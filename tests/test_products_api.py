"""`matmul`, `fold`, `prepare` and `explain` as a user calls them, on the CPU: arguments, errors, gradients, tracing."""

from __future__ import annotations

import pytest
import torch

import mxkernels as mx

X = torch.randn(2, 5, 64).to(torch.bfloat16)
W = mx.quantize(torch.randn(48, 64), mx.mxfp4)


def exact(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.double() @ b.double()).float()


@pytest.mark.parametrize(
    "spec", [mx.mxfp4, mx.mxfp8_e4m3, mx.mxint8, mx.MXSpec("int4", "4x4", symmetric=False)], ids=str
)
def test_the_product_of_what_is_decoded(spec: mx.MXSpec) -> None:
    q, w = mx.quantize(X, spec), mx.quantize(torch.randn(48, 64), spec)
    out = mx.matmul(q, w.T, out_dtype=torch.float32)
    assert out.shape == (2, 5, 48)
    assert torch.equal(out, exact(q.dequantize(torch.float32), w.dequantize(torch.float32).T))
    assert torch.equal(mx.matmul(q, w.T), out.to(torch.bfloat16))


def test_plain_sides_bias_and_a_vector() -> None:
    bias = torch.randn(48)
    w = W.dequantize(torch.float32)
    assert torch.equal(
        mx.matmul(X, W.T, bias=bias, out_dtype=torch.float32), (X.double() @ w.T.double() + bias).float()
    )
    assert torch.equal(mx.matmul(W, X[0].T, out_dtype=torch.float32), exact(w, X[0].T))
    assert torch.equal(mx.matmul(W.T, X[0, :, :48].T.contiguous(), out_dtype=torch.float32), exact(w.T, X[0, :, :48].T))
    assert torch.equal(mx.matmul(X[0, :, :48].T, X[0], out_dtype=torch.float32), exact(X[0, :, :48].T, X[0]))
    assert mx.matmul(X[0, 0], W.T).shape == (48,)


def test_folded_and_prepared_weights_decode_to_the_same_product() -> None:
    expected = mx.matmul(X, W.T)
    assert torch.equal(mx.matmul(X, mx.fold(W).T), expected)
    assert torch.equal(mx.matmul(X, mx.prepare(W).T), expected)
    assert torch.equal(mx.prepare(W).dequantize(), W.dequantize())
    folded = mx.fold(mx.quantize(X, mx.mxfp4))
    assert torch.equal(mx.matmul(folded, mx.fold(W).T), mx.matmul(mx.quantize(X, mx.mxfp4), W.T))


def test_folding_a_plain_tensor_quantises_it_first() -> None:
    spec = mx.MXSpec("e2m3", rounding="stochastic")
    found, expected = mx.fold(X, spec, seed=5), mx.fold(mx.quantize(X, spec, seed=5))
    assert found.shape == X.shape
    assert torch.equal(found.values.codes, expected.values.codes)
    assert torch.equal(found.reference, expected.reference)


def test_square_blocks_serve_the_three_products() -> None:
    spec = mx.MXSpec("e2m1", "4x4")
    x, w, dy = (mx.quantize(torch.randn(*shape), spec) for shape in ((32, 64), (48, 64), (32, 48)))
    dx, dw = mx.matmul(dy, w, out_dtype=torch.float32), mx.matmul(dy.T, x, out_dtype=torch.float32)
    plain = [q.dequantize(torch.float32) for q in (x, w, dy)]
    assert torch.equal(dx, exact(plain[2], plain[1]))
    assert torch.equal(dw, exact(plain[2].T, plain[0]))
    assert torch.equal(mx.matmul(mx.fold(dy.T), mx.fold(x.T).T, out_dtype=torch.float32), dw)


def test_no_gradient_flows() -> None:
    bias = torch.zeros(48, requires_grad=True)
    assert not mx.matmul(X.clone().requires_grad_(), W.T, bias=bias).requires_grad


def test_empty_products() -> None:
    empty = mx.quantize(torch.ones(0, 64), mx.mxfp4)
    assert mx.matmul(empty, W.T).shape == (0, 48)
    assert mx.matmul(torch.ones(3, 0).half(), torch.ones(0, 5).half()).abs().sum() == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mx.matmul([1], W), TypeError, "a is a list; allowed: MXTensor, FoldedTensor"),
        (lambda: mx.matmul(X.float(), W.T), TypeError, "a is torch.float32; allowed: torch.bfloat16, torch.float16"),
        (lambda: mx.matmul(mx.prepare(W), W.T), TypeError, "a is a PreparedTensor"),
        (lambda: mx.matmul(X, W), ValueError, "a's last dimension must be b's first"),
        (lambda: mx.matmul(X, X), ValueError, "b has 3 dimensions"),
        (lambda: mx.matmul(X, W.T, bias=torch.ones(3)), ValueError, r"bias is \[3\] on cpu; allowed: \[48\]"),
        (lambda: mx.matmul(X, W.T, bias=1), TypeError, "bias is int"),
        (lambda: mx.matmul(X, W.T, out_dtype=torch.int8), TypeError, "out_dtype is torch.int8"),
        (lambda: mx.matmul(X, W.T, path="quick"), ValueError, "path is 'quick'; allowed: auto, native, fp8, wide"),
        (lambda: mx.matmul(X, W.T, path="fp8"), ValueError, "the CPU has none of them"),
        (lambda: mx.matmul(mx.fold(W).T, W), ValueError, "folded along its rows"),
        (lambda: mx.matmul(X, mx.fold(W.T)), ValueError, r"fold\(b.T\).T"),
        (lambda: mx.fold(X), TypeError, "spec is None; allowed with a plain tensor: MXSpec"),
        (lambda: mx.fold([1], mx.mxfp4), TypeError, "x is a list; allowed: an MXTensor or a torch.Tensor"),
        (lambda: mx.fold(mx.fold(W)), TypeError, "x is a FoldedTensor; allowed: an MXTensor"),
        (lambda: mx.fold(W, mx.mxfp4), ValueError, "x is an MXTensor; allowed with one: neither"),
        (lambda: mx.fold(mx.quantize(X, mx.mxint8)), ValueError, "x is int8.*elements of 4 or 6 bits"),
        (lambda: mx.fold(X, mx.mxfp8_e4m3), ValueError, "spec is e4m3.*elements of 4 or 6 bits"),
        (lambda: mx.prepare(W.T), ValueError, "transposed; allowed: a matrix as it was quantised"),
        (lambda: mx.prepare(X), TypeError, "q is a Tensor; allowed: MXTensor"),
        (lambda: mx.prepare(mx.quantize(torch.ones(0, 64), mx.mxfp4)), ValueError, "not empty"),
        (lambda: mx.prepare(mx.quantize(X[0], mx.mxfp8_e4m3)), ValueError, "symmetric 4-bit elements"),
        (lambda: torch.relu(mx.fold(W)), TypeError, "relu does not take a FoldedTensor"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_explain_on_the_cpu() -> None:
    assert "float64" in str(mx.explain(X, W.T))


def test_opcheck() -> None:
    bias, shape = torch.randn(48), [2, 5]
    torch.library.opcheck(
        torch.ops.mxkernels.matmul.default,
        ([X], "plain", shape, [W.codes, W.scale], f"packed straight {W.spec}", 48, 64, bias, torch.bfloat16, "auto"),
    )
    torch.library.opcheck(torch.ops.mxkernels.quantize_fold.default, (X, str(W.spec), None))
    torch.library.opcheck(torch.ops.mxkernels.fold.default, (W.codes, W.scale, f"packed straight {W.spec}", 48, 64))
    torch.library.opcheck(torch.ops.mxkernels.fold.default, (W.codes, W.scale, f"packed turned {W.spec}", 64, 48))


def test_compiles_into_one_graph() -> None:
    def layer(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        w = mx.MXTensor(codes, scale, None, mx.mxfp4, (48, 64))
        q = mx.quantize(x, mx.mxfp4)
        return mx.matmul(q, w.T) + mx.matmul(mx.fold(q), mx.fold(w).T) + mx.matmul(mx.fold(x, mx.mxfp4), w.T)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (10, 14, 3):
        x = torch.randn(rows, 64)
        assert torch.equal(compiled(x, W.codes, W.scale), layer(x, W.codes, W.scale))
