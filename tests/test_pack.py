"""Models packed for serving, on the CPU: what they give, what they hold, and how they travel."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model, save_model
from torch import nn

import mxkernels as mx
from mxkernels import reference
from mxkernels.nn import MXLinear
from mxkernels.packed import PackedLinear

SPECS = [
    mx.mxfp4,
    mx.mxint4,
    mx.mxfp6_e2m3,
    mx.mxfp8_e4m3,
    mx.MXSpec("e2m1", "1x16"),
    mx.MXSpec("e2m1", "4x4"),
    mx.MXSpec("int4", "1x32", scale_rounding="ceil", symmetric=False),
]
HELD = [mx.mxfp4, mx.mxfp6_e2m3, mx.MXSpec("int4", "4x4", symmetric=False)]  # prepared, as packed, with offsets
SHAPES = [(256, 384), (128, 128), (100, 70), (1, 1), (50, 1000)]  # prepared where 4 bits fill tiles, and not


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Model(nn.Module):
    """As the models that people serve: nested modules, a ModuleList, a Sequential, a head apart."""

    def __init__(self, width: int = 128, vocabulary: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(1))
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


TOKENS = torch.arange(24).view(2, 12)


def model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model().bfloat16().eval()


def linear(out_features: int, in_features: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(out_features + in_features)
    return nn.Linear(in_features, out_features, bias).bfloat16()


def activations(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# --- what it gives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_product_of_what_the_weight_decodes_to(spec: mx.MXSpec, shape: tuple[int, int]) -> None:
    original = linear(*shape)
    codes, scale, offset = reference.quantize(original.weight, spec)
    decoded = reference.dequantize(codes, scale, offset, spec, shape[1], torch.float32)
    packed = PackedLinear.from_linear(original, spec)
    for leading in ((), (3,), (2, 5), (70,), (0,)):
        x = activations(*leading, shape[1])
        expected = reference.matmul(x.reshape(-1, shape[1]).float(), decoded.T, original.bias, torch.bfloat16)
        found = packed(x)
        assert found.shape == (*leading, shape[0])
        assert torch.equal(found, expected.view(found.shape))
    assert torch.equal(packed.weight.codes, codes)
    assert torch.equal(packed.weight.scale, scale)


@pytest.mark.parametrize("spec", [mx.mxfp4, mx.mxfp8_e4m3, mx.MXSpec("int4", symmetric=False)], ids=str)
@pytest.mark.parametrize("rows", [3, 70])
def test_quantised_activations(rows: int, spec: mx.MXSpec) -> None:
    original, x = linear(128, 256), activations(rows, 256)
    packed = PackedLinear.from_linear(original, "mxfp4", spec)
    expected = mx.matmul(mx.quantize(x, spec), mx.quantize(original.weight, mx.mxfp4).T, bias=original.bias)
    assert torch.equal(packed(x), expected)
    assert not torch.equal(expected, PackedLinear.from_linear(original, "mxfp4")(x))
    wide = packed(x.float())
    assert wide.dtype == torch.float32
    assert torch.equal(wide.bfloat16(), expected)


def test_a_model_as_its_quantised_weights_give_it() -> None:
    packed = mx.pack(model(), mx.mxfp4, skip="lm_head")
    expected = model()
    for each in expected.layers.modules():
        if type(each) is nn.Linear:
            each.weight.copy_(mx.quantize(each.weight, mx.mxfp4).dequantize())
            each.forward = lambda x, each=each: mx.matmul(x, each.weight.T, bias=each.bias)
    assert torch.equal(packed(TOKENS), expected(TOKENS))
    kinds = {path: type(each) for path, each in packed.named_modules() if "Linear" in type(each).__name__}
    assert kinds.pop("lm_head") is nn.Linear
    assert set(kinds.values()) == {PackedLinear}
    assert len(kinds) == 4


def test_layers_that_were_trained() -> None:
    trained = MXLinear(256, 128, dtype=torch.bfloat16, recipe="mxfp8")
    expected = PackedLinear.from_linear(trained, "mxfp4")(activations(3, 256))
    packed = mx.pack(nn.Sequential(trained), "mxfp4")
    assert type(packed[0]) is PackedLinear
    assert torch.equal(packed(activations(3, 256)), expected)


def test_torchs_own_transformer_layer_calls_it() -> None:
    """Its fast path would read `linear1.weight` instead: an MXTensor there keeps it from that."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True).bfloat16().eval()
    packed = mx.pack(copy.deepcopy(layer), "mxfp4")
    calls = []
    packed.linear1.register_forward_hook(lambda *_: calls.append(1))
    x = activations(2, 5, 128)
    found = packed(x)
    assert calls == [1]
    assert type(packed.self_attn.out_proj) is not PackedLinear
    between = packed.norm1(x + packed.self_attn(x, x, x, need_weights=False)[0])
    hidden = nn.functional.relu(packed.linear1(between))
    assert torch.equal(found, packed.norm2(between + packed.linear2(hidden)))


def test_autocast() -> None:
    packed = PackedLinear.from_linear(nn.Linear(256, 128), "mxfp4")
    x = torch.randn(3, 256)
    with torch.autocast("cpu", torch.bfloat16):
        found = packed(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, packed(x.bfloat16()))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("inputs", [None, mx.mxfp4], ids=str)
@pytest.mark.parametrize("spec", [mx.mxfp4, mx.MXSpec("int4", "4x4", symmetric=False)], ids=str)
def test_compiles_whole(spec: mx.MXSpec, inputs: mx.MXSpec | None, dynamic: bool) -> None:
    torch._dynamo.reset()
    packed = mx.pack(nn.Sequential(linear(256, 128), nn.GELU(), linear(128, 256)), spec, activations=inputs)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for leading in ((3,), (2, 40)):
        x = activations(*leading, 128)
        assert torch.equal(compiled(x), packed(x))


# --- what it holds -------------------------------------------------------------------------------------------------


def held_bytes(packed: nn.Module) -> int:
    """Of every tensor that a module reaches, each storage once."""
    tensors = [*packed.parameters(), *packed.buffers()]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


@pytest.mark.parametrize("shape", [(256, 384), (1024, 4096), (4096, 1024), (8, 4096), (50257, 32)], ids=str)
@pytest.mark.parametrize("spec", [mx.mxfp4, mx.MXSpec("e2m1", "16x16")], ids=str)
def test_bytes(spec: mx.MXSpec, shape: tuple[int, int]) -> None:
    """Held and saved: 0.266 of bfloat16's, and no more where a weight does not fill tiles; 40 bytes say what it is."""
    packed = PackedLinear.from_linear(linear(*shape, bias=False), spec)
    plain = 2 * shape[0] * shape[1]
    assert held_bytes(packed) <= 0.27 * plain
    assert sum(each.nbytes for each in packed.state_dict().values()) <= 0.27 * plain + 48


def test_the_plain_weight_is_freed() -> None:
    original = model()
    weights = [weakref.ref(each.weight) for each in original.modules() if type(each) is nn.Linear]
    packed = mx.pack(original, "mxfp4")
    gc.collect()
    assert all(each() is None for each in weights)
    assert not [name for name, _ in packed.named_parameters() if name.endswith("qkv.weight")]


@pytest.mark.parametrize("spec", HELD, ids=str)
@pytest.mark.parametrize(
    "move", [nn.Module.half, nn.Module.float, nn.Module.double, nn.Module.bfloat16, lambda each: each.to("cpu")]
)
def test_conversions_leave_the_weight_alone(move: Callable[[nn.Module], nn.Module], spec: mx.MXSpec) -> None:
    packed = PackedLinear.from_linear(linear(256, 128), spec)
    before = packed.weight
    moved = move(packed)
    assert torch.equal(moved.weight.codes, before.codes)
    assert torch.equal(moved.weight.scale, before.scale)
    assert torch.equal(moved.weight.dequantize(), before.dequantize())
    assert moved.bias.dtype == move(linear(256, 128)).bias.dtype


def test_a_half_precision_model() -> None:
    packed = mx.pack(linear(256, 128), "mxfp4").half()
    x = activations(3, 128).half()
    assert torch.equal(packed(x), mx.matmul(x, packed.weight.T, bias=packed.bias, out_dtype=torch.float16))


def test_a_weight_that_an_embedding_shares() -> None:
    tied = model()
    tied.lm_head.weight = tied.embedding.weight
    mx.pack(tied, "mxfp4")
    assert type(tied.lm_head) is PackedLinear
    assert tied.embedding.weight.dtype == torch.bfloat16
    assert torch.equal(tied.lm_head.weight.codes, mx.quantize(tied.embedding.weight, mx.mxfp4).codes)


def test_a_module_in_two_places_is_packed_once() -> None:
    shared = linear(128, 128)
    packed = mx.pack(nn.Sequential(shared, nn.GELU(), shared), "mxfp4")
    assert packed[0] is packed[2]


# --- how it travels ------------------------------------------------------------------------------------------------


def empty(spec: mx.MXSpec, device: str = "cpu") -> nn.Module:
    """A model packed before it has weights."""
    with torch.device(device):
        return mx.pack(Model().bfloat16().eval(), spec)


def same_state(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


@pytest.mark.parametrize("spec", HELD, ids=str)
def test_state(spec: mx.MXSpec) -> None:
    packed, other = mx.pack(model(), spec), mx.pack(model(seed=1), spec)
    state = packed.state_dict()
    assert all(type(each) is torch.Tensor for each in state.values())
    assert not same_state(packed, other)
    other.load_state_dict(state)
    assert same_state(packed, other)
    assert torch.equal(packed(TOKENS), other(TOKENS))


def test_the_state_is_that_of_the_quantised_weight() -> None:
    """In the contract's order, whatever is held, so that other tools can make it and read it."""
    original = linear(256, 128)
    for spec in SPECS:
        q = mx.quantize(original.weight, spec)
        state = mx.pack(nn.Sequential(original), spec).state_dict()
        assert torch.equal(state.pop("0.weight.codes"), q.codes)
        assert torch.equal(state.pop("0.weight.scale"), q.scale)
        if not spec.symmetric:
            assert torch.equal(state.pop("0.weight.offset"), q.offset)
        assert bytes(state.pop("0.weight.spec").tolist()).decode() == f"{spec} [256, 128]"
        assert list(state) == ["0.bias"]


@pytest.mark.parametrize("spec", HELD, ids=str)
def test_a_model_on_meta_is_filled(spec: mx.MXSpec) -> None:
    packed = mx.pack(model(), spec)
    for device in ("meta", "cpu"):
        other = empty(spec, device)
        assert {each.device.type for each in other.buffers()} == {device}
        other.load_state_dict(packed.state_dict(), assign=True)
        assert torch.equal(packed(TOKENS), other(TOKENS))
    other = empty(spec, "meta").to_empty(device="cpu")
    other.load_state_dict(packed.state_dict())
    assert torch.equal(packed(TOKENS), other(TOKENS))


def test_a_model_on_meta_needs_memory_first() -> None:
    state = mx.pack(linear(128, 128, bias=False), "mxfp4").state_dict()
    with pytest.raises(RuntimeError, match=r"weight: the model is on meta; allowed: assign=True, or model\.to_empty"):
        PackedLinear(128, 128, bias=False, device="meta").load_state_dict(state)


def test_shapes_on_meta() -> None:
    packed = empty(mx.mxfp4, "meta")
    assert packed(TOKENS.to("meta")).shape == (2, 12, 256)
    assert packed.state_dict()["lm_head.weight.codes"].shape == (256, 64)


@pytest.mark.parametrize("spec", HELD, ids=str)
def test_safetensors(spec: mx.MXSpec, tmp_path: Path) -> None:
    packed, path = mx.pack(model(), spec), tmp_path / "model.safetensors"
    save_model(packed, str(path))
    for other in (mx.pack(model(seed=1), spec), empty(spec)):
        assert load_model(other, str(path)) == (set(), [])
        assert torch.equal(packed(TOKENS), other(TOKENS))
    other = empty(spec, "meta")
    other.load_state_dict(load_file(path), assign=True)
    assert torch.equal(packed(TOKENS), other(TOKENS))

    mx.save_file(packed.state_dict(), path)
    other = empty(spec)
    other.load_state_dict(mx.load_file(path))
    assert same_state(packed, other)


@pytest.mark.parametrize("spec", HELD, ids=str)
def test_copies_and_pickles(spec: mx.MXSpec, tmp_path: Path) -> None:
    packed = mx.pack(model(), spec)
    expected = packed(TOKENS)
    assert torch.equal(copy.deepcopy(packed)(TOKENS), expected)
    torch.save(packed, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(TOKENS), expected)
    torch.save(packed.state_dict(), tmp_path / "state.pt")
    other = empty(spec)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(other(TOKENS), expected)


def test_loading_writes_where_the_weight_was() -> None:
    """As for any module, so that a captured graph sees it; unless the state is assigned."""
    packed, other = mx.pack(linear(256, 128), "mxfp4"), mx.pack(nn.Linear(128, 256).bfloat16(), "mxfp4")
    before = packed.codes.data_ptr()
    packed.load_state_dict(other.state_dict())
    assert packed.codes.data_ptr() == before
    assert torch.equal(packed(activations(3, 128)), other(activations(3, 128)))


def test_a_loaded_layer_shares_nothing_with_the_state() -> None:
    for spec in SPECS:
        packed = mx.pack(linear(100, 70), spec)
        state = {name: each.clone() for name, each in packed.state_dict().items()}
        other = PackedLinear(70, 100, dtype=torch.bfloat16, spec=spec)
        other.load_state_dict(state)
        for each in state.values():
            each.zero_()
        assert same_state(packed, other)


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        mx.mxint4,
        mx.MXSpec("e2m1", "1x16"),
        mx.MXSpec("e2m1", rounding="stochastic"),
        mx.MXSpec("e2m1", symmetric=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_another_spec(spec: mx.MXSpec, device: str) -> None:
    other = empty(spec, device)
    state = mx.pack(model(), mx.mxfp4).state_dict()
    with pytest.raises(RuntimeError, match=rf"lm_head\.weight is {mx.mxfp4} \[256, 128\] in the state, and {spec} \["):
        other.load_state_dict(state, assign=True)


def test_another_shape() -> None:
    """Even where the packed shapes agree: a last group that is not full."""
    state = mx.pack(linear(8, 64), "mxfp4").state_dict()
    with pytest.raises(RuntimeError, match=r"weight is .* \[8, 64\] in the state, and .* \[8, 63\] in the model"):
        PackedLinear(63, 8).load_state_dict(state)


def test_parts_that_do_not_fit() -> None:
    state = mx.pack(linear(8, 64), "mxfp4").state_dict()
    state["weight.codes"] = state["weight.codes"][:, :-1]
    with pytest.raises(RuntimeError, match=r"weight: codes is torch\.uint8 \[8, 31\]; allowed here: .*\[8, 32\]"):
        PackedLinear(64, 8).load_state_dict(state)


def test_parts_that_are_missing_or_unexpected() -> None:
    state = mx.pack(nn.Sequential(linear(8, 64)), "mxfp4").state_dict()
    scale = state.pop("0.weight.scale")
    state["0.weight.offset"] = scale
    other = nn.Sequential(PackedLinear(64, 8))
    with pytest.raises(
        RuntimeError, match=r'Missing key.*"0\.weight\.scale"(.|\n)*Unexpected key.*"0\.weight\.offset"'
    ):
        other.load_state_dict(state)
    before = other.state_dict()
    assert other.load_state_dict(state, strict=False).missing_keys == ["0.weight.scale"]
    assert torch.equal(other.state_dict()["0.weight.codes"], before["0.weight.codes"])  # not half of a weight
    assert torch.equal(other[0].bias, state["0.bias"])


def test_the_state_of_a_plain_model() -> None:
    with pytest.raises(RuntimeError, match=r'Missing key.*weight\.codes(.|\n)*Unexpected key.*"lm_head\.weight"'):
        empty(mx.mxfp4).load_state_dict(model().state_dict())


@pytest.mark.parametrize("argument", ["spec", "activations"])
def test_what_is_no_spec(argument: str) -> None:
    plain = model()
    with pytest.raises(ValueError, match=f"{argument} is 'mxfp5'; allowed: an MXSpec, or mxfp4, mxfp6_e2m3"):
        mx.pack(plain, **{argument: "mxfp5"})
    with pytest.raises(TypeError, match=f"{argument} is a int; allowed: an MXSpec, or mxfp4"):
        mx.pack(plain, **{argument: 4})
    assert not any(isinstance(each, PackedLinear) for each in plain.modules())


def test_a_pattern_that_matches_nothing() -> None:
    plain = model()
    with pytest.raises(ValueError, match=r"skip has 'head', which matches no linear; allowed here: layers\.0\."):
        mx.pack(plain, "mxfp4", skip=("lm_head", "head"))
    assert not any(isinstance(each, PackedLinear) for each in plain.modules())


def test_inputs_that_it_does_not_take() -> None:
    packed = mx.pack(linear(128, 256), "mxfp4")
    with pytest.raises(TypeError, match=r"x is torch\.float32; allowed: torch\.bfloat16, torch\.float16 \(model\.b"):
        packed(torch.ones(3, 256))
    for shape in ((3, 128), ()):
        with pytest.raises(ValueError, match=r"x is \[.*\]; allowed: \[\.\.\., 256\]"):
            packed(torch.ones(shape).bfloat16())
    with pytest.raises(TypeError, match="linear is a Embedding"):
        PackedLinear.from_linear(nn.Embedding(2, 2))


def test_a_weight_that_cannot_be_quantised() -> None:
    with pytest.raises(TypeError, match=r"1\.0: x is torch\.float64; allowed"):
        mx.pack(nn.Sequential(nn.GELU(), nn.Sequential(nn.Linear(4, 4).double())), "mxfp4")


def test_gradients_are_refused() -> None:
    packed = mx.pack(linear(128, 256), "mxfp4")
    x = activations(3, 256).requires_grad_()
    packed(x)
    with torch.enable_grad():
        assert not packed(x.detach()).requires_grad
        with pytest.raises(RuntimeError, match=r"x requires a gradient.*allowed: torch\.no_grad\(\), x\.detach\(\)"):
            packed(x)


def test_a_stochastic_weight_follows_torchs_seed() -> None:
    spec = mx.MXSpec("e2m1", rounding="stochastic")
    codes = []
    for seed in (1, 1, 2):
        original = linear(128, 256)
        torch.manual_seed(seed)
        codes.append(mx.pack(original, spec).weight.codes)
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


def test_repr() -> None:
    text = repr(PackedLinear(64, 8, bias=False, spec="mxfp4", activations="mxfp8_e4m3"))
    assert text == (
        "PackedLinear(in_features=64, out_features=8, bias=False, spec=e2m1 1x32 rtne even symmetric, "
        "activations=e4m3 1x32 rtne rceil symmetric)"
    )
