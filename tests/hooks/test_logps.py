"""Log-probabilities, entropies and gradients in chunks, beside those of the logits of the whole batch."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from tests.hooks import logps_models as tiny  # noqa: E402
from trlpatch.hooks.logps import describe  # noqa: E402
from trlpatch.policy import deferred_logits  # noqa: E402

pytestmark = pytest.mark.torch

KEEP = 30
CHUNK = 32
"""Tokens of a chunk at most: the 120 tokens of a batch make four chunks of 30."""
FORMS = ("0.18", "0.29", "1.9", "1.14")
ROUNDING = {"float32": 2**-20, "bfloat16": 2**-6, "autocast": 2**-6, "accelerate": 2**-6}
"""Largest difference of the head's own gradient, in units of its largest value: one sum against one per chunk."""


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred_logits, "CHUNK_ELEMENTS", CHUNK * tiny.VOCABULARY)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(model: Any, *, hooked: bool, owner: Any = None, inputs: Any = None, **options: Any) -> tuple[Any, Any, Any]:
    """Return log-probabilities, entropies, and the gradients of a loss that weighs every one of them."""
    model.zero_grad()
    owner = owner or tiny.trainer()
    with options.pop("under", nullcontext()):
        logps, entropies = tiny.per_token(owner, model, inputs or tiny.batch(), KEEP, hooked=hooked, **options)
    torch.manual_seed(3)
    loss = (logps * torch.randn_like(logps)).sum()
    if options.get("bonus") and entropies is not None:
        loss = loss + (entropies * torch.randn_like(entropies)).sum()
    else:
        assert entropies is None or not entropies.requires_grad
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logps.detach(), None if entropies is None else entropies.detach(), gradients


def assert_same(stock: Any, chunked: Any, rounding: float = 0.0, head: tuple[str, ...] = ()) -> None:
    """Assert equal bits; for gradients of the parameters in `head`, up to `rounding`."""
    torch.testing.assert_close(chunked[:2], stock[:2], rtol=0, atol=0)
    assert chunked[2].keys() == stock[2].keys()
    for name, expected in stock[2].items():
        atol = rounding * float(expected.abs().max()) if name in head else 0.0
        torch.testing.assert_close(chunked[2][name], expected, rtol=0, atol=atol, msg=name)


def head_parameters(model: Any) -> tuple[str, ...]:
    of_head = [id(parameter) for parameter in model.get_output_embeddings().parameters()]
    return tuple(name for name, parameter in model.named_parameters() if id(parameter) in of_head)


def line_of(owner: Any) -> str:
    from trlpatch.hooks.logps import _described, _known

    assert len(describe()) == len(_known)
    return _described(_known[owner])


def prepared(name: str, dtype: str) -> tuple[Any, Any]:
    """Return a model, and the context that TRL would call it in."""
    model, autocast = tiny.model(name), torch.autocast("cpu", torch.bfloat16)
    if dtype == "bfloat16":
        return model.bfloat16(), nullcontext()
    if dtype == "accelerate":  # what Accelerator.prepare_model does where bf16=True
        operations = pytest.importorskip("accelerate.utils.operations")
        model.forward = operations.convert_outputs_to_fp32(autocast(model.forward))
        return model, nullcontext()
    return model, autocast if dtype == "autocast" else nullcontext()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_values_and_gradients_are_those_of_whole_logits(name: str, dtype: str, form: str):
    model, under = prepared(name, dtype)
    owner = tiny.trainer()
    bonus = form in ("1.9", "1.14")
    stock = run(model, hooked=False, form=form, bonus=bonus, under=under)
    chunked = run(model, hooked=True, form=form, bonus=bonus, under=under, owner=owner)
    assert_same(stock, chunked, ROUNDING[dtype], head_parameters(model))
    assert stock[0].dtype == (torch.float32 if dtype in ("float32", "accelerate") else torch.bfloat16)
    assert line_of(owner).startswith("1 passes in chunks, the largest of 30 tokens")
    assert "whole batch" not in line_of(owner)


@pytest.mark.parametrize("form", FORMS)
def test_a_frozen_head_leaves_no_rounding(form: str):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny.model("qwen2"), config)
    assert_same(run(model, hooked=False, form=form), run(model, hooked=True, form=form))


@pytest.mark.parametrize("form", FORMS)
def test_passes_without_gradients(form: str):
    model = tiny.model("gemma2")
    with torch.no_grad():
        stock, chunked = (
            tiny.per_token(tiny.trainer(), model, tiny.batch(), KEEP, hooked=hooked, form=form)
            for hooked in (False, True)
        )
    torch.testing.assert_close(chunked, stock, rtol=0, atol=0)


def test_a_model_that_keeps_all_logits():
    model = tiny.model("llama")
    inputs = tiny.batch()
    forward = model.forward
    model.forward = lambda logits_to_keep, **kwargs: forward(**kwargs)
    stock, chunked = (run(model, hooked=hooked, inputs=inputs) for hooked in (False, True))
    assert_same(stock, chunked, ROUNDING["float32"], ("lm_head.weight",))


def test_images_go_through_the_same_forward_pass():
    transformers = pytest.importorskip("transformers")
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4, "projection_dim": 16}  # fmt: skip
    text = {**tiny._SIZES, "tie_word_embeddings": False}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision), text_config=transformers.Qwen2Config(**text),
        image_token_index=7,
        vision_feature_layer=-1, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    inputs = tiny.batch()
    inputs["input_ids"][inputs["input_ids"] == 7] = 8
    inputs["input_ids"][:, 5:9] = 7  # 4 patches
    inputs["pixel_values"] = torch.randn(4, 3, 8, 8)
    owner = tiny.trainer()
    stock = run(model, hooked=False, inputs=inputs)
    chunked = run(model, hooked=True, inputs=inputs, owner=owner)
    assert_same(stock, chunked, ROUNDING["float32"], head_parameters(model))
    assert "in chunks" in line_of(owner)
    assert any("vision" in name and bool(gradient.any()) for name, gradient in stock[2].items())


def test_one_chunk_is_computed_as_in_stock(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(deferred_logits, "CHUNK_ELEMENTS", 4 * KEEP * tiny.VOCABULARY)
    model, owner = tiny.model("qwen2"), tiny.trainer()
    assert_same(run(model, hooked=False), run(model, hooked=True, owner=owner))
    assert line_of(owner) == "1 passes with logits of one chunk, as in stock"


def test_backward_makes_entropies_only_for_their_gradients():
    model, made, entropy = tiny.model("qwen2"), [], tiny.entropy
    for bonus in (False, True):
        calls: list[int] = []

        def counted(logits: Any, calls: list[int] = calls) -> Any:
            calls.append(1)
            return entropy(logits)

        with pytest.MonkeyPatch.context() as patching:
            patching.setattr(tiny, "entropy", counted)
            run(model, hooked=True, bonus=bonus)
        made.append(len(calls))
    assert made == [4, 8]


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors [..., vocab] that are alive at the same time, and keeps the most."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (tiny.VOCABULARY,):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.known.add(storage.data_ptr())
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, storage.data_ptr(), storage.nbytes())
        return made

    def _gone(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size


@pytest.mark.parametrize("form", FORMS)
def test_the_peak_of_logits_falls_with_the_chunks(form: str):
    model = tiny.model("qwen2")
    model.lm_head.requires_grad_(False)
    peaks = {}
    for hooked in (False, True):
        with Peak(model) as peak:
            run(model, hooked=hooked, form=form)
        peaks[hooked] = peak.most / (4 * KEEP * tiny.VOCABULARY * 4)
        assert peak.now == 0
    assert peaks[False] >= 3
    assert peaks[True] <= peaks[False] / 2
