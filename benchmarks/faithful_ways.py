"""The processes of faithfulness.py: one that trains adapters and computes the reference, one for each engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.step_timers import Lines
from tests.runs.case import TARGETS, versions

if TYPE_CHECKING:
    from benchmarks.faithfulness import Order

ROWS = 4
"""Sequences of one forward pass: the reference's logits are float32, of a vocabulary of 152 k."""


def run_way(way: str, order: Order, lines: Lines) -> None:
    """In the child: compute a way's changes, and report them."""
    import torch

    if not order.cuda:
        torch.set_num_threads(1)
    if way == "trainer":
        _train(order, lines)
        return
    engine = _merged(order) if way == "merge" else _adapted(way, order)
    base, *changed = engine
    lines.write("changes", changes={way: [_difference(one, base) for one in changed]}, versions=versions())


def _difference(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True)]


def _model(order: Order, *, float32: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if float32 else torch.bfloat16
    return AutoModelForCausalLM.from_pretrained(order.base, dtype=dtype).to(order.device)


def _fresh_adapter(model: Any, order: Order) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(order.seed)
    lora = LoraConfig(r=order.rank, lora_alpha=order.rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(model, lora)  # the adapter is in float32: PEFT casts it (autocast_adapter_dtype)


def _train(order: Order, lines: Lines) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    changes: dict[str, list[list[float]]] = {"reference": [], "trainer": []}
    updates, ids = [], order.ids().to(order.device)
    if not order.cuda:
        AutoTokenizer.from_pretrained(order.model).save_pretrained(order.base)
        AutoModelForCausalLM.from_pretrained(order.model, dtype=torch.bfloat16).save_pretrained(order.base)
    for place, rate in enumerate(order.learning_rates):
        policy = _fresh_adapter(_model(order, float32=False), order)
        _reinforce(policy, ids, rate, order)
        policy.save_pretrained(order.adapter(place))
        changes["trainer"].append(_change(policy, ids, autocast=True))
        before = {name: weight.clone() for name, weight in _adapted_weights(policy)}
        policy.merge_adapter()  # as TRL does before it pushes
        moved = [(int((weight != before[name]).sum()), weight.numel()) for name, weight in _adapted_weights(policy)]
        policy.unmerge_adapter()
        largest = max(float(one.abs().max()) for name, one in policy.named_parameters() if "lora_B" in name)
        unmoved = 1 - sum(some for some, _ in moved) / sum(count for _, count in moved)
        updates.append({"unmoved": unmoved, "largest_b": largest})
        del policy, before
        # Merged anew: unmerging in bfloat16 does not lead back to the weights that were.
        _loaded(order, place, float32=False).merge_and_unload().save_pretrained(order.merged(place))
        reference = _loaded(order, place, float32=True)
        changes["reference"].append(_change(reference, ids, autocast=False))
        del reference
    device = torch.cuda.get_device_name() if order.cuda else "CPU"
    lines.write("changes", changes=changes, updates=updates, versions=versions(), device=device)


def _loaded(order: Order, place: int, *, float32: bool) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(_model(order, float32=float32), order.adapter(place))


def _adapted_weights(policy: Any) -> Iterator[tuple[str, Any]]:
    for name, module in policy.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name, module.base_layer.weight.data


def _reinforce(policy: Any, ids: Any, rate: float, order: Order) -> None:
    """Move the adapter as RL does: half of the sequences up and half down, some of them in each step."""
    import torch

    optimizer = torch.optim.AdamW([one for one in policy.parameters() if one.requires_grad], lr=rate, weight_decay=0.0)
    advantages = torch.ones(len(ids), device=ids.device)
    advantages[1::2] = -1.0
    chosen = torch.Generator().manual_seed(order.seed)
    for _ in range(order.steps):
        rows = torch.randperm(len(ids), generator=chosen)[: 2 * ROWS].to(ids.device)
        with torch.autocast(order.device, torch.bfloat16):
            logps = _logps(policy, ids[rows])
        (-(advantages[rows, None] * logps).mean()).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _logps(model: Any, ids: Any) -> Any:
    """Return the log-probability of each token but the first, (rows, tokens - 1), float32."""
    logits = model(input_ids=ids).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def _change(policy: Any, ids: Any, *, autocast: bool) -> list[float]:
    """Return what the adapter does to the log-probability of every token, row by row."""
    import torch

    found: list[float] = []
    with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
        for rows in ids.split(ROWS):
            with_adapter = _logps(policy, rows)
            with policy.disable_adapter():
                found += (with_adapter - _logps(policy, rows)).flatten().tolist()
    return found


def _of_engine(generate: Any, order: Order) -> list[float]:
    """Return the log-probability of every token of the sequences but the first, as the engine computes a prompt."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    rows = order.ids().tolist()
    outputs = generate([{"prompt_token_ids": row} for row in rows], sampling, use_tqdm=False)
    return [
        step[token].logprob
        for row, output in zip(rows, outputs, strict=True)
        for token, step in zip(row[1:], output.prompt_logprobs[1:], strict=True)
    ]


def _engine_arguments(order: Order) -> dict[str, Any]:
    return {"gpu_memory_utilization": 0.2, "enforce_eager": True, "max_num_seqs": order.sequences,
            "max_num_batched_tokens": max(1024, order.tokens + 1)}  # fmt: skip


def _adapted(way: str, order: Order) -> list[list[float]]:
    """Hand each adapter over in memory: the base model's log-probabilities, and those with each adapter."""
    import torch
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    import trlpatch

    base, _ = trlpatch.FastLanguageModel.from_pretrained(
        order.base, dtype=torch.bfloat16, max_seq_length=order.tokens + 16, load_in_4bit=False,
        max_lora_rank=order.rank, enable_sleep_mode=False, share_weights=True if order.cuda else None,
        lora_layers=way, **_engine_arguments(order),
    )  # fmt: skip
    model = trlpatch.FastLanguageModel.get_peft_model(
        base, r=order.rank, lora_alpha=order.rank, target_modules=TARGETS, use_gradient_checkpointing=False
    )
    found = [_of_engine(_with_request(model, None), order)]
    for place in range(len(order.learning_rates)):
        set_peft_model_state_dict(model, load_file(str(order.adapter(place) / "adapter_model.safetensors")))
        found.append(_of_engine(_with_request(model, trlpatch.lora_request(model)), order))
    return found


def _with_request(model: Any, request: Any) -> Any:
    def generate(*given: Any, **named: Any) -> Any:
        return model.fast_generate(*given, lora_request=request, **named)

    return generate


def _merged(order: Order) -> list[list[float]]:
    """Push each merged checkpoint, as stock TRL pushes: the base model's log-probabilities, and those of each."""
    from safetensors.torch import load_file
    from vllm import LLM

    llm = LLM(order.base, dtype="bfloat16", seed=0, max_model_len=order.tokens + 16, **_engine_arguments(order))
    found = [_of_engine(llm.generate, order)]
    for place in range(len(order.learning_rates)):
        if order.cuda:
            runner = llm.llm_engine.model_executor.driver_worker.model_runner
            for file in sorted(order.merged(place).glob("*.safetensors")):
                runner.model.load_weights([(name, one.to("cuda")) for name, one in load_file(str(file)).items()])
        else:  # vLLM's CPU backend packs the weights: TRL's push finds nothing to load into, reloading does
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(order.merged(place))})
        llm.reset_prefix_cache()
        found.append(_of_engine(llm.generate, order))
    return found
