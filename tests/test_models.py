"""Language models and ViT: against transformers, files that are none, text token by token."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from checks import assert_same_bits, draw

import needle as ndl
from needle import optim
from needle.autograd import Tensor
from needle.files import FileError, load_tensors, save_tensors
from needle.models import GPT, GPTConfig, Llama, LlamaConfig, ViT, ViTConfig
from needle.models.sampling import probabilities, sample, top_k_logits, top_p_logits
from needle.nn import RotaryScaling
from needle.nn.functional import frequencies

IDS = np.random.default_rng(0).integers(0, 65, (2, 9))
SMALL = GPTConfig(block_size=80, vocab_size=65, n_layer=2, n_head=2, n_embd=16)
LLAMA = LlamaConfig(65, 16, 24, 2, 4, 2, 80)


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    """transformers, or a skip where it is missing."""
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def other_of(transformers: Any, name: str, tied: bool = True) -> tuple[Any, Any]:
    """A small random model of transformers, and the class that reads it."""
    common = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    if name == "gpt2":
        options = {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
        config = transformers.GPT2Config(vocab_size=65, n_positions=32, **options)
        return transformers.GPT2LMHeadModel(config), GPT
    if name == "llama":
        sizes = {"vocab_size": 65, "hidden_size": 32, "max_position_embeddings": 32, **common}
        config = transformers.LlamaConfig(
            num_key_value_heads=2, tie_word_embeddings=not tied, rope_theta=500.0, **sizes
        )
        return transformers.LlamaForCausalLM(config), Llama
    config = transformers.ViTConfig(
        image_size=16, patch_size=4, hidden_size=32, num_labels=7, **common
    )
    return transformers.ViTForImageClassification(config), ViT


def saved(torch: Any, model: Any, folder: Path, dtype: str, **options: Any) -> Any:
    """A model of transformers with parameters that none is at its start, saved."""
    torch.manual_seed(0)
    model = model.to(getattr(torch, dtype)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder, **options)
    return model


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "vit"])
@pytest.mark.filterwarnings("ignore")
def test_models_agree_with_transformers(
    name: str, dtype: str, transformers: Any, torch: Any, tmp_path: Path
) -> None:
    model, cls = other_of(transformers, name, dtype == "float32")
    shards = {"max_shard_size": "60KB"} if dtype == "float64" else {}
    model = saved(torch, model, tmp_path, dtype, **shards)
    assert (tmp_path / "model.safetensors.index.json").is_file() == bool(shards)
    ours = cls.from_pretrained(tmp_path, dtype=dtype).eval()
    if name == "vit":
        images = draw(2, 3, 16, 16, dtype=dtype)
        found, expected = ours(Tensor(images)), model(torch.tensor(images)).logits
    else:
        if name == "llama" and dtype == "float64":  # of which some is float32 there
            angles = np.arange(9)[:, None] * 500.0 ** (-np.arange(0, 8, 2) / 8)
            twice = torch.tensor(np.concatenate([angles, angles], -1))[None]
            model.model.rotary_emb.forward = lambda x, position_ids: (twice.cos(), twice.sin())
            for norm in (each for each in model.modules() if "RMSNorm" in type(each).__name__):
                norm.forward = lambda x, own=norm: torch.nn.functional.rms_norm(
                    x, x.shape[-1:], own.weight, own.variance_epsilon
                )
        found, expected = ours(IDS), model(torch.tensor(IDS)).logits
    bound = 1e-5 if dtype == "float32" else 1e-10
    np.testing.assert_allclose(found.numpy(), expected.detach(), 0, bound)


SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
]  # fmt: skip


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda each: each["rope_type"])
@pytest.mark.filterwarnings("ignore")
def test_llamas_with_a_longer_context_agree_with_transformers(
    scaling: dict[str, Any], transformers: Any, torch: Any, tmp_path: Path
) -> None:
    """96 tokens, of an original context of 32; in float32, in which transformers has frequencies.
    Also as files of older versions name these settings."""
    config = transformers.LlamaConfig(
        vocab_size=65, hidden_size=64, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
        rope_scaling=dict(scaling),
    )  # fmt: skip
    model = saved(torch, transformers.LlamaForCausalLM(config), tmp_path, "float32")
    ids = np.random.default_rng(1).integers(0, 65, (2, 96))
    expected = model(torch.tensor(ids)).logits.detach().numpy()
    ours = Llama.from_pretrained(tmp_path).eval()
    np.testing.assert_allclose(ours(ids).numpy(), expected, 0, 2e-5)
    path = tmp_path / "config.json"
    known = json.loads(path.read_text())
    rope = known.pop("rope_parameters")
    known |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    known["rope_scaling"]["type"] = rope.pop("rope_type")
    path.write_text(json.dumps(known))
    assert_same_bits(Llama.from_pretrained(tmp_path).eval()(ids), ours(ids))
    assert [*ours.generate(ids[0], 8, temperature=0)] == argmaxes(model, torch, ids[0], 8)
    path.write_text(json.dumps({**known, "rope_scaling": None}))
    plain = Llama.from_pretrained(tmp_path).eval()(ids).numpy()
    assert np.abs(plain - expected)[:, 32:].max() > 0.1  # the settings matter


def argmaxes(model: Any, torch: Any, ids: np.ndarray, count: int) -> list[int]:
    """The likeliest tokens that follow, each by a pass over all before it."""
    found = [int(each) for each in ids]
    for _ in range(count):
        found.append(int(model(torch.tensor([found])).logits[0, -1].argmax()))
    return found[len(ids) :]


def test_scaled_frequencies() -> None:
    """Llama 3.1's, by its definition in wavelengths; other scalings are refused by name."""
    found = frequencies(128, 500000.0, RotaryScaling(8.0, 1.0, 4.0, 8192))
    for own, plain in zip(found, frequencies(128, 500000.0), strict=True):
        length = 2 * np.pi / plain
        smooth = (8192 / length - 1) / 3
        middle = (1 - smooth) * plain / 8 + smooth * plain
        expected = plain if length < 2048 else plain / 8 if length > 8192 else middle
        np.testing.assert_allclose(own, expected, rtol=1e-14)
    np.testing.assert_array_equal(frequencies(8, 10.0, RotaryScaling(2)), frequencies(8, 10.0) / 2)
    for wrong in ((0,), (2, 1, 4), (2, 4, 1, 8), (2, 0, 4, 8)):
        with pytest.raises(ValueError, match="rotary: expected factor above 0, alone or with"):
            RotaryScaling(*wrong)


@pytest.mark.parametrize(
    ("rope", "match"),
    [
        ({"type": "yarn", "factor": 2.0}, "rope_type default, linear, llama3; received 'yarn'"),
        ({"rope_type": "dynamic"}, "rope_type default, linear, llama3; received 'dynamic'"),
        ({"rope_type": ["longrope"]}, r"rope_type .*; received \['longrope'\]"),
        ("longrope", "rope_type .*; received 'longrope'"),
        ({"type": "linear"}, "expected factor above 0; received None"),
        ({"type": "linear", "factor": -1.0}, "expected factor above 0; received -1.0"),
        ({**SCALINGS[1], "low_freq_factor": 4.0}, "rope_type llama3; received .*low_freq_factor="),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor 1; rec"),
    ],
)
def test_other_scalings_are_refused(rope: Any, match: str, tmp_path: Path) -> None:
    names = "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"
    config = {"model_type": "llama", **dict.fromkeys(names, 8), "num_attention_heads": 2}
    config |= {"max_position_embeddings": 8, "rms_norm_eps": 1e-5, "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refuse(tmp_path, f"config.json: expected {match}" if match[0] == "r" else match, Llama)


@pytest.mark.filterwarnings("ignore")
def test_models_without_a_head_are_read(transformers: Any, torch: Any, tmp_path: Path) -> None:
    model, _ = other_of(transformers, "vit")
    saved(torch, model, tmp_path, "float32")
    arrays, _ = load_tensors(tmp_path / "model.safetensors")
    bare = {k.removeprefix("vit."): x for k, x in arrays.items() if "classifier" not in k}
    save_tensors(tmp_path / "model.safetensors", bare)
    images = draw(2, 3, 16, 16, dtype="float32")
    found = ViT.from_pretrained(tmp_path)(Tensor(images))
    expected = model.vit(torch.tensor(images)).last_hidden_state
    np.testing.assert_allclose(found.numpy(), expected.detach(), 0, 1e-5)


# Files that are none


def pretrained(folder: Path) -> dict[str, np.ndarray]:
    """A folder as transformers would save a small GPT-2, written by hand."""
    config = {"model_type": "gpt2", "n_positions": 4, "vocab_size": 6, "n_layer": 1, "n_head": 2,
              "n_embd": 4, "layer_norm_epsilon": 1e-5}  # fmt: skip
    shapes = {"wte.weight": (6, 4), "wpe.weight": (4, 4), "ln_f.weight": (4,), "ln_f.bias": (4,)}
    sizes = {"ln_1": (4,), "ln_2": (4,), "attn.c_attn": (4, 12), "attn.c_proj": (4, 4),
             "mlp.c_fc": (4, 16), "mlp.c_proj": (16, 4)}  # fmt: skip
    for name, shape in sizes.items():
        shapes |= {f"h.0.{name}.weight": shape, f"h.0.{name}.bias": shape[-1:]}
    arrays = {key: draw(*shape, dtype="float32") for key, shape in shapes.items()}
    (folder / "config.json").write_text(json.dumps(config))
    save_tensors(folder / "model.safetensors", arrays)
    return arrays


def refuse(folder: Path, match: str, cls: Any = GPT) -> None:
    with pytest.raises(FileError, match=match):
        cls.from_pretrained(folder)


def test_other_architectures_are_refused_by_their_keys_and_shapes(tmp_path: Path) -> None:
    arrays = pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).config.n_embd == 4
    wrong = {k: x for k, x in arrays.items() if "ln_" not in k} | {"wpe.weight": np.ones((9, 4))}
    save_tensors(tmp_path / "model.safetensors", wrong | {"h.7.x": np.ones(1)})
    refuse(
        tmp_path,
        r"model.safetensors: expected the weights of this GPT; received ln_f.weight, .* and 1 more "
        r"missing; h.7.x unexpected; wpe.weight \(9, 4\) for \(4, 4\) of other shapes",
    )
    refuse(tmp_path, "config.json: expected model_type 'llama'; received 'gpt2'", Llama)


def test_forged_and_truncated_files_are_refused(tmp_path: Path) -> None:
    refuse(tmp_path, "config.json: expected a file; received a folder without it")
    pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    whole, known = weights.read_bytes(), json.loads(config.read_text())
    for forged, match in (
        ({"n_layer": 10**9}, "model.safetensors: expected at least .* numbers, by config.json"),
        ({"n_head": "two"}, "config.json: expected n_head above 0; received 'two'"),
        ({"n_embd": -4}, "config.json: expected n_embd above 0; received -4"),
        (
            {"activation_function": "relu"},
            "expected activation_function 'gelu_new'; received 'relu'",
        ),
    ):
        config.write_text(json.dumps(known | forged))
        refuse(tmp_path, match)
    config.write_text(json.dumps(known))
    weights.write_bytes(whole[:-10])
    refuse(tmp_path, "model.safetensors: expected a safetensors file; received content")
    weights.unlink()
    refuse(tmp_path, "model.safetensors: expected a file; received a folder without it")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"wte.weight": "../secret.safetensors"}}')
    refuse(tmp_path, "index.json: expected an index of safetensors files; received .* outside")
    index.write_text('{"weight_map": {"wte.weight": "a.safetensors"}}')
    refuse(tmp_path, "a.safetensors: expected a file; received a folder without it")
    config.write_text("[]")
    refuse(tmp_path, "config.json: expected the configuration of a model; received content")


# Models


def test_gpt_begins_as_gpt2_does() -> None:
    np.random.seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=300, n_layer=8, n_head=2, n_embd=64, bias=False))
    assert not [name for name, _ in model.named_parameters() if "bias" in name]
    assert abs(model.tokens.weight.numpy().std() - 0.02) < 0.001
    assert abs(model.blocks[3].down.weight.numpy().std() - 0.02 / 4) < 0.0005
    untied = GPT(GPTConfig(8, 30, 1, 2, 8, tie_weights=False))
    assert untied.output.weight.shape == (8, 30)
    assert untied(IDS[:, :3] % 30).shape == (2, 3, 30)


@pytest.mark.parametrize("make", [lambda: GPT(SMALL), lambda: Llama(LLAMA)], ids=["gpt", "llama"])
def test_training_steps_have_the_same_bits_in_all_modes(make: Any) -> None:
    found = []
    for mode in ("eager", "lazy", "jit"):
        np.random.seed(0)
        model = make()
        optimizer = optim.AdamW(model.parameters(), 1e-2)

        def step(ids: Tensor, y: Tensor, model: Any = model, opt: Any = optimizer) -> Tensor:
            loss = ndl.nn.functional.cross_entropy(model(ids).reshape((18, 65)), y)
            loss.backward()
            opt.step()
            opt.reset_grad()
            return loss

        run = ndl.jit(step) if mode == "jit" else step
        with ndl.autograd.mode(lazy=mode == "lazy"):
            losses = [run(Tensor(IDS), Tensor(IDS.ravel())).item() for _ in range(3)]
        assert losses[2] < losses[0]
        found.append([*losses, *(p.numpy() for p in model.parameters())])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert_same_bits(np.asarray(a), np.asarray(b))


def test_vit_trains_and_refuses_other_images() -> None:
    model = ViT(ViTConfig(8, 4, 1, 16, 1, 2, 32, num_classes=3), dtype="float64")
    model(Tensor(draw(2, 1, 8, 8))).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(
        ValueError, match=r"ViT: expected images \(n, 1, 8, 8\); received \(2, 1, 4"
    ):
        model(Tensor(draw(2, 1, 4, 4)))
    with pytest.raises(
        ValueError, match="expected an image_size of whole patches; received 10 and 4"
    ):
        ViT(ViTConfig(10, 4))


# Text


@pytest.mark.parametrize("make", [lambda: GPT(SMALL), lambda: Llama(LLAMA)], ids=["gpt", "llama"])
def test_generate_takes_what_the_whole_model_would(make: Any) -> None:
    np.random.seed(1)
    model = make()
    prompt = np.random.default_rng(3).integers(0, 65, 67)
    found = list(model.generate(prompt, 13, temperature=0))
    assert model.training
    text = list(prompt)
    for token in found:  # as many as the context has places
        assert token == model(np.array([text])).numpy()[0, -1].argmax()
        text.append(token)
    decoder = model._decoder
    assert len(decoder.step.programs()) == 2  # of 64 tokens and of one
    assert list(model.generate(prompt, 13, temperature=0)) == found
    assert model._decoder is decoder
    assert len(decoder.step.programs()) == 2
    twins = copy.deepcopy(model)
    pairs = list(twins.generate(np.stack([prompt, prompt]), 3, temperature=0))
    assert [each.tolist() for each in pairs] == [[token, token] for token in found[:3]]
    first, second = (model.generate(prompt, 3, temperature=0) for _ in range(2))
    assert [next(first), next(second), next(first), next(second)] == [
        found[0], found[0], found[1], found[1],
    ]  # fmt: skip


def test_a_seed_fixes_the_text() -> None:
    model = GPT(SMALL)
    try:
        texts = []
        for seed in (3, 3, 4):
            ndl.seed(seed)
            texts.append(list(model.generate([1, 2], 12, temperature=1.5, top_k=40, top_p=0.95)))
    finally:
        ndl.init.random.Source.generator = None
    assert texts[0] == texts[1] != texts[2]


def test_what_cannot_be_generated_is_refused_at_once() -> None:
    model = GPT(SMALL)
    for options, match in (
        (([1] * 70, 11), "GPT: expected at most 80 tokens; received 70 and 11 more"),
        (([], 3), r"generate: expected ids \(T,\) or \(B, T\), T above 0; received \(0,\)"),
        (([1], -1), "generate: expected tokens to add; received -1"),
        (([1], 1, -0.5), "generate: expected a temperature of at least 0; received -0.5"),
        (([1], 1, 1, 0), "generate: expected top_k of at least 1; received 0"),
        (([1], 1, 1, None, 1.5), "generate: expected top_p above 0 and up to 1; received 1.5"),
    ):
        keys = ("ids", "max_new_tokens", "temperature", "top_k", "top_p")
        with pytest.raises(ValueError, match=match):
            model.generate(**dict(zip(keys, options, strict=False)))
    with pytest.raises(ValueError, match="GPT: expected at most 80 tokens; received 81"):
        model(np.zeros((1, 81), int))
    with pytest.raises(IndexError, match="expected ids from 0 to 64; received 65"):
        list(model.generate([65], 1))
    assert list(model.generate([1], 0)) == []


# Sampling


def test_top_k_and_top_p_are_their_definitions() -> None:
    logits = np.log(np.array([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1]]))
    kept = np.isfinite(top_k_logits(logits, 2))
    assert kept.tolist() == [[False, True, False, True], [True, True, True, True]]  # equal ones
    kept = np.isfinite(top_p_logits(logits, 0.65))
    assert kept.tolist() == [[False, True, False, True], [True, False, False, False]]
    assert np.array_equal(top_k_logits(logits, 9), logits)
    assert np.array_equal(top_p_logits(logits, 1.0), logits)


@pytest.mark.filterwarnings("ignore")
def test_sampling_cuts_as_transformers_does(transformers: Any, torch: Any) -> None:
    logits = draw(3, 50) * 2
    for p in (0.1, 0.5, 0.9, 0.999):
        other = transformers.TopPLogitsWarper(p)(None, torch.tensor(logits)).numpy()
        assert np.array_equal(top_p_logits(logits, p), other)
    for k in (1, 7, 50):
        other = transformers.TopKLogitsWarper(k)(None, torch.tensor(logits)).numpy()
        assert np.array_equal(top_k_logits(logits, k), other)


def test_samples_follow_their_probabilities() -> None:
    np.random.seed(0)
    logits = np.array([0.0, 1.0, -np.inf, 2.0])
    drawn = sample(np.broadcast_to(logits, (20000, 4)), temperature=0.5)
    expected = probabilities(logits / 0.5)
    assert np.abs(np.bincount(drawn, minlength=4) / 20000 - expected).max() < 0.01
    assert not (drawn == 2).any()
    assert sample(logits[None], temperature=0).tolist() == [3]
    assert set(sample(np.broadcast_to(logits, (99, 4)), top_k=1).tolist()) == {3}
    with pytest.raises(ValueError, match="generate: expected logits; received NaN"):
        sample(np.array([[np.nan, 1.0]]))
