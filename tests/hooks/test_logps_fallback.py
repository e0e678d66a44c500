"""What cannot be chunked is computed as in stock, and said; what else is asked of deferred logits gets them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.nn.parallel import DataParallel, DistributedDataParallel  # noqa: E402

from tests.hooks import logps_models as tiny  # noqa: E402
from tests.hooks.test_logps import CHUNK, KEEP, ROUNDING, _one_thread, assert_same, line_of, run  # noqa: E402, F401
from trlpatch import hooks  # noqa: E402
from trlpatch.hooks.logps import describe  # noqa: E402
from trlpatch.policy import deferred_logits  # noqa: E402

pytestmark = pytest.mark.torch

WHOLE = "logits of a whole batch are held, as in stock: "


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred_logits, "CHUNK_ELEMENTS", CHUNK * tiny.VOCABULARY)


@pytest.fixture
def group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def with_lora(model: Any, **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **settings))


def lora_on_head(model: Any) -> Any:
    return with_lora(model, target_modules=["q_proj", "lm_head"])


def trained_head(model: Any) -> Any:
    return with_lora(model, target_modules=["q_proj"], modules_to_save=["lm_head"])


def hooked_head(model: Any) -> Any:
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    return model


def offloaded_head(model: Any) -> Any:
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: forward(hidden) + 1
    return model


def other_head(model: Any) -> Any:
    class Scaled(torch.nn.Linear):  # type: ignore[misc]
        def forward(self, hidden: Any) -> Any:
            return super().forward(hidden) * 3

    model.lm_head.__class__ = Scaled
    return model


def sharded_head(model: Any) -> Any:
    model.lm_head.weight.ds_id = 0
    return model


def no_head(model: Any) -> Any:
    model.get_output_embeddings = lambda: None
    return model


def unused_head(model: Any) -> Any:
    model.get_output_embeddings = lambda: torch.nn.Linear(2, 2)
    return model


def compiled(model: Any) -> Any:
    model._compiled_call_impl = model._call_impl
    return model


def flat_head(model: Any) -> Any:
    """Call the head with [tokens, features]."""
    head = model.lm_head

    class Flat(torch.nn.Module):  # type: ignore[misc]
        def forward(self, hidden: Any) -> Any:
            return head(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])

    model.lm_head = Flat()
    model.get_output_embeddings = lambda: head
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lora_on_head, "lm_head is peft.tuners.lora.layer.Linear, not torch.nn.Linear"),
        (trained_head, "lm_head is peft.utils.other.ModulesToSaveWrapper, not torch.nn.Linear"),
        (hooked_head, "lm_head has hooks"),
        (offloaded_head, "lm_head has hooks"),
        (other_head, "lm_head is tests.hooks.test_logps_fallback.Scaled, not torch.nn.Linear"),
        (sharded_head, "lm_head is sharded over ranks"),
        (no_head, "Qwen2ForCausalLM has no output embeddings"),
        (unused_head, "the forward pass of Qwen2ForCausalLM does not call its output embeddings"),
        (compiled, "the model is compiled, or every module has hooks"),
        (flat_head, "lm_head is called with torch.float32 (124, 32) on cpu"),
        (DataParallel, "the model is wrapped in DataParallel"),
    ],
)
def test_what_falls_back(change: Callable[[Any], Any], reason: str, caplog: pytest.LogCaptureFixture):
    model, owner = change(tiny.model("qwen2")), tiny.trainer()
    stock = run(model, hooked=False)
    for _ in range(2):
        assert_same(stock, run(model, hooked=True, owner=owner))
    assert line_of(owner) == WHOLE + reason
    assert [r.message for r in caplog.records if reason in r.message] == [f'logps="chunked": {WHOLE}{reason}']


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("unused", [False, True])
def test_distributed_data_parallel_with_a_frozen_head(unused: bool):
    model, owner = with_lora(tiny.model("qwen2"), target_modules=["q_proj"]), tiny.trainer()
    stock = run(DistributedDataParallel(model, find_unused_parameters=unused), hooked=False)
    chunked = run(DistributedDataParallel(model, find_unused_parameters=unused), hooked=True, owner=owner)
    assert_same(stock, chunked)
    assert len(stock[2]) == 4
    assert "whole batch" not in line_of(owner)


@pytest.mark.usefixtures("group")
def test_distributed_data_parallel_with_a_trained_head():
    model, owner = tiny.model("qwen2"), tiny.trainer()
    stock = run(DistributedDataParallel(model), hooked=False)
    assert_same(stock, run(DistributedDataParallel(model), hooked=True, owner=owner))
    assert line_of(owner) == f"{WHOLE}lm_head is trained, and the model is wrapped in DistributedDataParallel"
    fixed = DistributedDataParallel(model, static_graph=True)
    assert hooks.deferred_logits(owner, fixed) is fixed


def masked(logits: Any) -> Any:
    logits[:, :, 3] = -1e4
    return logits


def filled(logits: Any) -> Any:
    logits.mul_(2.0)
    return logits


def divided_in_place(logits: Any) -> Any:
    return logits.div_(torch.full((), 2.0))


@pytest.mark.parametrize(
    ("of_model", "reason"),
    [
        (masked, "logits.__setitem__"),
        (filled, "logits.mul_"),
        (divided_in_place, "a quotient of logits and a tensor"),
        (lambda logits: logits * torch.full((tiny.VOCABULARY,), 0.5), "a product of logits and a tensor"),
        (lambda logits: torch.full((), 0.5) * logits, "mul() of logits"),
        (lambda logits: logits / torch.full((), 2.0), "a quotient of logits and a tensor"),
        (lambda logits: logits + 1, "logits.__add__"),
        (lambda logits: -logits, "logits.__neg__"),
        (lambda logits: logits[..., :], "logits[(Ellipsis, slice(None, None, None))]"),
        (lambda logits: logits[:, :, :200], "logits[(slice(None, None, None), slice(None, None, None), "),
        (lambda logits: torch.nn.functional.relu(logits), "relu() of logits"),
        (lambda logits: torch.cat([logits, logits], dim=-1), "cat() of logits"),
        (lambda logits: logits.to(torch.float64).float(), "logits.to"),
    ],
)
def test_what_needs_all_logits_gets_them(of_model: Callable[[Any], Any], reason: str):
    model, owner = tiny.model("llama"), tiny.trainer()
    forward = model.forward

    def changed(**kwargs: Any) -> Any:
        return SimpleNamespace(logits=of_model(forward(**kwargs).logits))

    model.forward = changed
    inputs = tiny.batch()
    inputs["input_ids"] %= 199
    assert_same(run(model, hooked=False, inputs=inputs), run(model, hooked=True, inputs=inputs, owner=owner))
    assert line_of(owner).startswith(f"{WHOLE}{reason}")


@pytest.mark.parametrize(
    "of_model",
    [
        lambda logits: 2 * logits,
        lambda logits: torch.tanh(logits / 30.0) * 30.0,
        lambda logits: logits.tanh().float(),
        lambda logits: logits[1:3, 2:],
        lambda logits: logits.div_(2),
    ],
)
def test_what_does_not(of_model: Callable[[Any], Any]):
    model, owner = tiny.model("llama"), tiny.trainer()
    forward = model.forward
    model.forward = lambda **kwargs: SimpleNamespace(logits=of_model(forward(**kwargs).logits))
    inputs = tiny.batch()
    if of_model(torch.zeros(4, 31, 1)).shape[0] == 2:
        found = hooks.deferred_logits(owner, model)(**inputs, logits_to_keep=KEEP + 1).logits
        assert (found.shape, found.ndim, found.device.type) == ((2, KEEP - 1, tiny.VOCABULARY), 3, "cpu")
        torch.testing.assert_close(
            found.whole("asked"), model(**inputs, logits_to_keep=KEEP + 1).logits, rtol=0, atol=0
        )
        return
    stock, chunked = run(model, hooked=False), run(model, hooked=True, owner=owner)
    assert_same(stock, chunked, ROUNDING["float32"], ("lm_head.weight",))
    assert "whole batch" not in line_of(owner)


def test_the_head_is_itself_again_whatever_happens():
    model, owner = tiny.model("qwen2"), tiny.trainer()
    with pytest.raises(ValueError, match="input_ids"):
        hooks.deferred_logits(owner, model)(nonsense=1)
    assert "forward" not in vars(model.lm_head)
    hooks.deferred_logits(owner, model)(**tiny.batch())
    assert "forward" not in vars(model.lm_head)
    assert line_of(owner) == "no pass yet"


def test_entropies_alone_and_gradients_of_whole_logits_after_a_pass_without():
    model, inputs = tiny.model("qwen2"), tiny.batch()
    stock = tiny.entropy(model(**inputs).logits)
    logits = hooks.deferred_logits(tiny.trainer(), model)(**inputs).logits
    found = hooks.entropy_from_logits(tiny.entropy)(logits)
    torch.testing.assert_close(found, stock, rtol=0, atol=0)
    assert found.requires_grad
    with torch.no_grad():
        assert not hooks.entropy_from_logits(tiny.entropy)(logits).requires_grad
        assert logits.whole("asked").requires_grad


def test_plain_logits_go_to_trls_own_functions():
    logits, index = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    assert torch.equal(hooks.selective_log_softmax(tiny.log_softmax)(logits, index), tiny.log_softmax(logits, index))
    assert torch.equal(hooks.entropy_from_logits(tiny.entropy)(logits), tiny.entropy(logits))
    pair = hooks.selective_log_softmax_and_entropy(tiny.both)(
        logits, index, entropy_requires_grad=False, temperature=0.5
    )
    torch.testing.assert_close(pair, tiny.both(logits, index, False, temperature=0.5), rtol=0, atol=0)


def test_a_line_for_each_trainer():
    owner = tiny.trainer()
    run(tiny.model("qwen2"), hooked=True, owner=owner)
    assert "_Trainer: 1 passes in chunks, the largest of 30 tokens with 2.4e-05 GiB of logits where stock has " in (
        "\n".join(describe())
    )
