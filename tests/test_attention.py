"""Attention, positions and Transformer layers against PyTorch, NumPy and themselves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from checks import assert_same_bits, draw

import needle as ndl
from needle import nn, optim
from needle.autograd import Tensor
from needle.nn import functional

WIDTH, HEADS = 8, 2


def tensor(*shape: int, seed: int = 0, dtype: str = "float64") -> Tensor:
    return Tensor(draw(*shape, seed=seed, dtype=dtype))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found.numpy(), np.asarray(expected), 0, 1e-10)


def copied(torch: Any, ours: nn.Module, theirs: Any) -> None:
    """Give a layer of torch's our parameters, by the names that they have there."""
    state: dict[str, Any] = {}
    for name, p in ours.named_parameters():
        array = torch.tensor(p.numpy().reshape(-1) if "bias" in name else p.numpy().T.copy())
        name = name.replace("in_proj.", "in_proj_")
        for number, kind in enumerate("qkv"):
            name = name.replace(f"projections.{number}.weight", f"{kind}_proj_weight")
            if name == f"projections.{number}.bias":
                name = "in_proj_bias"
                array = torch.cat([state[name], array]) if name in state else array
        state[name] = array
    missing = theirs.load_state_dict(state, strict=False).missing_keys
    assert not missing, missing


# Attention


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_scaled_dot_product_attention_is_its_definition(causal: bool, groups: int) -> None:
    q, k, v = tensor(2, 4, 3, 5), tensor(2, groups, 7, 5, seed=1), tensor(2, groups, 7, 6, seed=2)
    wide = [x.numpy().repeat(4 // groups, 1) for x in (k, v)]
    scores = q.numpy() @ wide[0].swapaxes(-1, -2) / math.sqrt(5)
    scores = np.where(np.tri(3, 7, dtype=bool) | (not causal), scores, -np.inf)
    close(
        functional.scaled_dot_product_attention(q, k, v, is_causal=causal),
        softmax(scores) @ wide[1],
    )


@pytest.mark.parametrize("kind", ["bool", "added", "causal", "scale"])
def test_scaled_dot_product_attention_agrees_with_torch(kind: str, torch: Any) -> None:
    arrays = [draw(2, 2, 4, 3, seed=n) for n in range(3)]
    ours = [Tensor(x) for x in arrays]
    theirs = [torch.tensor(x, requires_grad=True) for x in arrays]
    seen = np.random.default_rng(0).random((4, 4)) < 0.6
    seen[:, 0] = True
    number = {"bool": seen, "added": draw(4, 4, seed=5)}.get(kind)
    options: dict[str, Any] = {"causal": {"is_causal": True}, "scale": {"scale": 0.3}}.get(kind, {})
    mask = None if number is None else Tensor(number)
    other = None if number is None else torch.tensor(number)
    y = functional.scaled_dot_product_attention(*ours, mask, **options)
    z = torch.nn.functional.scaled_dot_product_attention(*theirs, other, **options)
    close(y, z.detach())
    y.backward(Tensor(arrays[0]))
    z.backward(torch.tensor(arrays[0]))
    for a, b in zip(ours, theirs, strict=True):
        close(a.grad, b.grad)


def test_a_query_that_sees_nothing_gives_zero() -> None:
    q, k, v = (tensor(1, 1, 2, 3, seed=n) for n in range(3))
    y = functional.scaled_dot_product_attention(
        q, k, v, Tensor(np.array([[False, False], [True, True]]))
    )
    assert not y.numpy()[0, 0, 0].any()
    y.sum().backward()
    assert np.isfinite(q.grad.numpy()).all()
    assert np.isfinite(k.grad.numpy()).all()


def test_attention_refuses_what_does_not_fit() -> None:
    q = tensor(1, 3, 2, 4)
    with pytest.raises(ValueError, match=r"attention: expected query, key and value .* received"):
        functional.scaled_dot_product_attention(q, tensor(1, 2, 2, 4), tensor(1, 2, 2, 4))
    with pytest.raises(ValueError, match="expected attn_mask or is_causal; received both"):
        functional.scaled_dot_product_attention(q, q, q, q, is_causal=True)
    with pytest.raises(
        ValueError, match="expected heads that share embed_dim evenly; received 8, 3"
    ):
        nn.MultiheadAttention(8, 3)


def test_the_courses_attention() -> None:
    q, k, v = tensor(2, 3, 4, 5), tensor(2, 3, 6, 5, seed=1), tensor(2, 3, 6, 5, seed=2)
    result, probs = nn.MultiHeadAttention(causal=True, dropout=0.0).eval()(q, k, v)
    scores = q.numpy() @ k.numpy().swapaxes(-1, -2) / math.sqrt(5)
    expected = softmax(np.where(np.tri(4, 6, 2, dtype=bool), scores, -np.inf))
    close(probs, expected)
    close(result, expected @ v.numpy())


def test_the_courses_layers_and_paths() -> None:
    from needle.nn.nn_transformer import Transformer

    layer = nn.AttentionLayer(6, 2, 4, k_features=5, v_features=7, out_features=3, dtype="float64")
    assert layer(tensor(2, 3, 6), tensor(2, 4, 5), tensor(2, 4, 7)).shape == (2, 3, 3)
    model = Transformer(8, 16, 2, num_head=2, dim_head=4, dropout=0.1, sequence_len=5)
    x = tensor(5, 2, 8, dtype="float32")
    y, h = model(x)
    assert y.shape == h.shape == (5, 2, 8)
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    turned = Transformer(8, 16, 2, num_head=2, dim_head=4, sequence_len=5, batch_first=True).eval()
    turned.load_state_dict(model.state_dict())
    assert_same_bits(turned(x.transpose((0, 1)))[0].transpose((0, 1)), model.eval()(x)[0])
    later = x.numpy().copy()
    later[3:] = 9
    assert_same_bits(model(Tensor(later))[0][:3], model(x)[0][:3])  # causal
    with pytest.raises(IndexError, match="embedding: expected ids from 0 to 4; received 5"):
        model(tensor(6, 2, 8, dtype="float32"))


ATTENTIONS = {
    "self": {}, "no bias": {"bias": False}, "sizes": {"kdim": 5, "vdim": 6}, "cross": {},
    "batch_first": {"batch_first": True}, "masked": {}, "padded": {}, "numbers": {},
}  # fmt: skip


@pytest.mark.parametrize("name", ATTENTIONS)
def test_multihead_attention_agrees_with_torch(name: str, torch: Any) -> None:
    options = ATTENTIONS[name]
    ours = nn.MultiheadAttention(WIDTH, HEADS, dtype="float64", **options)
    theirs = torch.nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options)
    copied(torch, ours, theirs)
    query, length = (
        draw(5, 3, WIDTH),
        5 if name in ("self", "no bias", "batch_first", "masked") else 4,
    )
    key = draw(length, 3, options.get("kdim", WIDTH), seed=1)
    value = draw(length, 3, options.get("vdim", WIDTH), seed=2)
    arrays = [query] * 3 if name in ("self", "no bias") else [query, key, value]
    masks: dict[str, Any] = {}
    if name == "masked":
        masks["attn_mask"] = ~np.tri(5, dtype=bool)
    if name in ("padded", "numbers"):
        masks["key_padding_mask"] = np.array([[False] * 3 + [n > 0] for n in range(3)])
    if name == "numbers":
        masks["attn_mask"] = draw(5, 4, seed=7)
        masks["key_padding_mask"] = np.where(masks["key_padding_mask"], -np.inf, 0.0)
    leaf = Tensor(arrays[0])
    inputs = [leaf] * 3 if name in ("self", "no bias") else [leaf, *map(Tensor, arrays[1:])]
    others = [torch.tensor(x, requires_grad=True) for x in arrays]
    others = [others[0]] * 3 if name in ("self", "no bias") else others
    y, weights = ours(*inputs, **{k: Tensor(m) for k, m in masks.items()})
    z, expected = theirs(*others, **{k: torch.tensor(m) for k, m in masks.items()})
    close(y, z.detach())
    close(weights, expected.detach())
    y.backward(Tensor(draw(*y.shape, seed=9)))
    z.backward(torch.tensor(draw(*y.shape, seed=9)))
    close(leaf.grad, others[0].grad)
    close(ours.out_proj.weight.grad, theirs.out_proj.weight.grad.T)
    if "kdim" not in options:
        close(ours.in_proj.weight.grad, theirs.in_proj_weight.grad.T)
    assert ours(*inputs, need_weights=False)[1] is None


# Layers


def pair(torch: Any, kind: str, norm_first: bool) -> tuple[nn.Module, Any]:
    options = {
        "norm_first": norm_first,
        "dropout": 0.0,
        "dim_feedforward": 12,
        "activation": "gelu",
    }
    name = f"Transformer{kind}"
    ours = getattr(nn, f"{name}Layer")(WIDTH, HEADS, dtype="float64", batch_first=True, **options)
    theirs = getattr(torch.nn, f"{name}Layer")(
        WIDTH, HEADS, dtype=torch.float64, batch_first=True, **options
    )
    stack = getattr(nn, name)(ours, 2, nn.LayerNorm(WIDTH, dtype="float64"))
    nested = {"enable_nested_tensor": False} if kind == "Encoder" else {}
    norm = torch.nn.LayerNorm(WIDTH, dtype=torch.float64)
    other = getattr(torch.nn, name)(theirs, 2, norm, **nested)
    copied(torch, stack, other)
    return stack, other


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
def test_transformers_agree_with_torch_over_steps(kind: str, norm_first: bool, torch: Any) -> None:
    ours, theirs = pair(torch, kind, norm_first)
    arrays = [draw(2, 4, WIDTH), draw(2, 3, WIDTH, seed=1)][: 1 + (kind == "Decoder")]
    mask, target = ~np.tri(4, dtype=bool), draw(2, 4, WIDTH, seed=3)
    optimizer = optim.SGD(ours.parameters(), 0.1)
    other = torch.optim.SGD(theirs.parameters(), 0.1)

    @ndl.jit
    def step(*inputs: Tensor) -> Tensor:
        loss = ((ours(*inputs, Tensor(mask)) - Tensor(target)) ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.reset_grad()
        return loss

    for _ in range(20):
        loss = step(*map(Tensor, arrays))
        other.zero_grad()
        wrong = (theirs(*map(torch.tensor, arrays), torch.tensor(mask)) - torch.tensor(target)) ** 2
        wrong.mean().backward()
        other.step()
        assert abs(loss.item() - wrong.mean().item()) < 1e-10
    names = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        q = names[name.replace("in_proj.", "in_proj_")].detach().numpy()
        np.testing.assert_allclose(p.numpy().reshape(q.T.shape), q.T, 0, 1e-10)


class Step(nn.Module):
    """Forward and backward through both layers."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x: Tensor, memory: Tensor) -> Any:
        y = self.decoder(x, self.encoder(memory), tgt_is_causal=True)
        (y * y).sum().backward()
        grads = [p.grad for p in self.parameters()]
        self.zero_grad()
        return y, *grads


def make_layers() -> list[nn.Module]:
    np.random.seed(0)
    options = {"dropout": 0.1, "dim_feedforward": 16, "batch_first": True}
    return [
        nn.TransformerEncoderLayer(WIDTH, HEADS, **options),
        nn.TransformerDecoderLayer(WIDTH, HEADS, norm_first=True, **options),
    ]


@pytest.mark.parametrize("threads", [1, 2])
def test_layers_have_the_same_bits_in_all_modes(threads: int) -> None:
    before = ndl.get_num_threads()
    x, memory = tensor(2, 37, WIDTH, dtype="float32"), tensor(2, 21, WIDTH, seed=1, dtype="float32")
    found = []
    ndl.set_num_threads(threads)
    try:
        for mode in ("eager", "lazy", "jit"):
            ndl.seed(5)

            run = Step(*make_layers())
            with ndl.autograd.mode(lazy=mode == "lazy"):
                values = (ndl.jit(run) if mode == "jit" else run)(x, memory)
                found.append([each.numpy() for each in values])
    finally:
        ndl.set_num_threads(before)
        ndl.init.random.Source.generator = None
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert_same_bits(a, b)


# Positions


def test_sinusoidal_positions() -> None:
    t, i = np.arange(7)[:, None], np.arange(0, 6, 2)
    angles = t / 10000 ** (i / 6)
    expected = np.stack([np.sin(angles), np.cos(angles)], -1).reshape(7, 6)
    x = tensor(2, 7, 6)
    close(nn.SinusoidalPositions()(x), x.numpy() + expected)
    with pytest.raises(ValueError, match="expected an even dimension; received 5"):
        nn.SinusoidalPositions()(tensor(2, 3, 5))


def test_learned_positions() -> None:
    layer, x = nn.LearnedPositions(7, 6, dtype="float64"), tensor(2, 7, 6)
    close(layer(x), x.numpy() + layer.weight.numpy())
    close(
        layer(x[:, :2], Tensor(np.array([5, 0]))), x.numpy()[:, :2] + layer.weight.numpy()[[5, 0]]
    )
    with pytest.raises(IndexError, match="positions: expected places from 0 to 6; received 7"):
        layer(tensor(2, 8, 6))


def test_rotary_products_depend_on_the_distance_alone() -> None:
    q, k = tensor(1, 1, 1, 8), tensor(1, 1, 1, 8, seed=1)

    def product(i: int, j: int) -> float:
        a = functional.rotary(q, Tensor(np.array([i])))
        return (a * functional.rotary(k, Tensor(np.array([j])))).sum().item()

    assert abs(product(3, 1) - product(12, 10)) < 1e-12
    assert abs(product(3, 1) - product(3, 2)) > 1e-3
    assert_same_bits(functional.rotary(q, Tensor(np.array([0]))), q)


def test_alibi() -> None:
    bias = functional.alibi(6, 2, 4, dtype="float64").numpy()
    slopes = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]  # as the authors' get_slopes(6)
    distance = np.array([[2, 1, 0, 1], [3, 2, 1, 0]])
    assert np.array_equal(bias, -np.array(slopes)[:, None, None] * distance)


# The cache


@pytest.mark.parametrize("rotary", [None, 10000.0])
def test_attention_by_a_cache_is_that_of_the_whole(rotary: float | None) -> None:
    layer = nn.MultiheadAttention(
        WIDTH, 4, num_kv_heads=2, rotary=rotary, batch_first=True, dtype="float64"
    )
    x, cache = tensor(2, 6, WIDTH), nn.KVCache(1, 2, 2, 6, 2, dtype="float64")
    whole, _ = layer(x, is_causal=True)

    @ndl.jit
    def step(x: Tensor, count: Tensor) -> Tensor:
        with ndl.no_grad():
            places = cache.places(x.shape[1], count)
            keep, mask = cache.keep(0, places), cache.mask(places)
            y, _ = layer(x, attn_mask=mask, positions=places, keep=keep, need_weights=False)
            cache.advance(count)
            return y

    padded = ndl.ops.concatenate([x[:, :1] * 7.0, x[:, :3]], 1)  # what does not count comes first
    found = [step(padded, Tensor(np.array(3)))[:, 1:]]
    found += [step(x[:, n : n + 1], Tensor(np.array(1))) for n in range(3, 6)]
    close(ndl.ops.concatenate(found, 1), whole.numpy())
    assert len(step.programs()) == 2  # one for the beginning, one for all other tokens
    assert len(step.programs()[1][1][0].recipe.in_place) == 3
    before = [x.numpy().copy() for x in cache.buffers()]
    with pytest.raises(IndexError, match="cache: expected places from 0 to 5; received 6"):
        step(x[:, :1], Tensor(np.array(1)))
    for a, b in zip(before, cache.buffers(), strict=True):
        assert_same_bits(a, b)
    cache.clear()
    assert_same_bits(step(padded, Tensor(np.array(3)))[:, 1:], found[0])
