"""Train on two engines on Ray actors, one case after the other, and report what happened.

    python -m tests.ray.grpo_runs OUT.json [CASE ...]

In a process of its own; the TRL release is the one that can be imported.
"""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import json
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.cases import case
from tests.cpu.features import TEMPLATE
from tests.ray import fault_cases
from tests.ray.rig import MAX_SEQS, Rig, checkpoint_in, cluster, create
from tests.ray.weights_runs import full_weights

CASE_SECONDS = 300.0
"""Of one case. The longest takes 40 s on two cores, and three times as long where five others use them."""


def main(out: Path, chosen: list[str]) -> None:
    import trlpatch

    trlpatch.PatchFastRL()
    directory = out.parent
    checkpoint = checkpoint_in(directory)
    report: dict[str, Any] = {}
    with cluster():
        began = time.monotonic()
        with case("engines", CASE_SECONDS):
            engines = create(checkpoint)
        report["init_seconds"] = time.monotonic() - began
        rig = Rig(directory, checkpoint, engines)
        for name in chosen or CASES:
            began = time.monotonic()
            with case(name, CASE_SECONDS if name in CASES else 3600.0):
                report[name] = {**CASES, **ON_REQUEST}[name](rig)
            report[f"{name}_seconds"] = time.monotonic() - began
    out.write_text(json.dumps(report, indent=1))


def grpo(rig: Rig) -> dict[str, Any]:
    """Three steps of stock GRPO; then a control whose adapter is never sent."""
    from tests.cpu.small_grpo import small_grpo
    from tests.cpu.training import Recorder, engine_of, logged

    policy = rig.policy()
    trainer = small_grpo(policy, rig.directory)
    recorder = Recorder(trainer, rig.engines)
    spread = Spread(rig.engines)
    trainer.train()
    recorder.close()
    spread.close()
    return {
        "uses_them": engine_of(trainer) is rig.engines,
        "mode": (trainer.args.use_vllm, getattr(trainer.args, "vllm_mode", None)),
        "rollouts": recorder.rollouts,
        "witness": logged(trainer, "sampling/sampling_logp_difference/max"),
        "rewards": logged(trainer, "reward"),
        "sent": rig.engines.adapter_version,
        "engines": sorted(spread.engines),
        "control": control(rig),
    }


def control(rig: Rig) -> list[dict[str, Any]]:
    """As `grpo`, with the request left out of every rollout."""
    import trlpatch.hooks
    from tests.cpu.small_grpo import small_grpo
    from tests.cpu.training import Recorder
    from trlpatch.engine.state import state_of

    injected = trlpatch.hooks.lora_request
    trlpatch.hooks.lora_request = lambda *_: None
    try:
        trainer = small_grpo(rig.policy(), rig.directory)
        state_of(rig.engines).bare_request = None
        recorder = Recorder(trainer, rig.engines)
        trainer.train()
        recorder.close()
        return recorder.rollouts
    finally:
        trlpatch.hooks.lora_request = injected


class Spread:
    """Notes which engine answered."""

    def __init__(self, engines: Any) -> None:
        self.engines: set[int] = set()
        self._submit = engines.submit
        self._of = engines
        engines.submit = self._noted

    def _noted(self, index: int, request: Any) -> Any:
        self.engines.add(index)
        return self._submit(index, request)

    def close(self) -> None:
        """Note no more."""
        del self._of.submit


def surface(rig: Rig) -> dict[str, Any]:
    """What a `vllm.LLM` does, done by two."""
    import ray
    from vllm import SamplingParams

    import trlpatch
    from trlpatch.errors import EngineMismatch

    engines, policy = rig.engines, rig.policy()
    tiny.move(policy, seed=1)
    request = trlpatch.lora_request(policy)
    words = engines.get_tokenizer()
    texts = tiny.prompts(20)
    ids = [{"prompt_token_ids": words(text)["input_ids"]} for text in texts]
    greedy = SamplingParams(temperature=0.0, max_tokens=4)
    bar = Bar()
    spread = Spread(engines)
    outputs = engines.generate(ids, SamplingParams(n=2, max_tokens=4), lora_request=request, use_tqdm=bar)
    together = engines.generate(ids, greedy, lora_request=request, use_tqdm=False)
    spread.close()
    first, second = engines.replicas
    alone = [[one.generate(ids[0], params, use_tqdm=False)[0] for one in (first, second)] for params in (
        SamplingParams(max_tokens=24), SamplingParams(max_tokens=24, seed=7)
    )]  # fmt: skip
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    talk = [[{"role": "user", "content": text}] for text in texts[:2]]
    other = tiny.policy(tiny.checkpoint(rig.directory / "other", seed=1)).get_base_model()
    try:
        trlpatch.attach_engine(other, engines)
        mismatch = ""
    except EngineMismatch as error:
        mismatch = str(error)
    return {
        "prompts": len(ids),
        "engines": sorted(spread.engines),
        "in_order": [list(one.prompt_token_ids) for one in outputs] == [one["prompt_token_ids"] for one in ids],
        "completions": [len(one.outputs) for one in outputs],
        "progress": bar.n,
        "greedy_as_one_engine": tokens(together) == tokens(greedily(first, ids, request, rig)),
        "texts_as_ids": tokens(engines.generate(texts, greedy, lora_request=request, use_tqdm=False))
        == tokens(together),
        "chat_as_rendered": tokens(
            engines.chat(talk, greedy, use_tqdm=False, lora_request=request, chat_template=template)
        )
        == tokens(together[:2]),
        "seeds": engines.on_each("call", seed_of),
        "sampled_alike": tokens([alone[0][0]]) == tokens([alone[0][1]]),
        "seeded_alike": tokens([alone[1][0]]) == tokens([alone[1][1]]),
        "info_bytes": [len(ray.cloudpickle.dumps(info)) for info in engines.infos],
        "status": " ".join(str(trlpatch.status()).split()),
        "other_model": mismatch,
    }


def greedily(engine: Any, ids: list[Any], request: Any, rig: Rig) -> list[Any]:
    """The likeliest tokens, of one engine alone with the adapter that all hold."""
    from vllm import SamplingParams

    from trlpatch.ray.messages import RolloutRequest

    (handle,) = engine.handles
    import ray

    params = [SamplingParams(temperature=0.0, max_tokens=4)] * len(ids)
    asked = handle.generate.options(concurrency_group="rollouts").remote(
        RolloutRequest(ids, params, adapter=rig.engines.adapter_version)
    )
    return list(ray.get(asked, timeout=120).outputs)


def seed_of(llm: Any) -> int:
    """What the engine was built with."""
    return int(llm.llm_engine.vllm_config.model_config.seed)


def tokens(outputs: list[Any]) -> list[list[list[int]]]:
    """Of every completion."""
    return [[list(sequence.token_ids) for sequence in output.outputs] for output in outputs]


class Bar:
    """A progress bar that counts."""

    def __init__(self) -> None:
        self.n = 0

    def __call__(self, **_: Any) -> Bar:
        return self

    def update(self, more: int) -> None:
        self.n += more

    def close(self) -> None:
        """Nothing is shown."""


def hands(rig: Rig) -> dict[str, Any]:
    """Requests added by hand, an interrupt, and requests for what is not there."""
    import ray
    from vllm import SamplingParams

    import trlpatch
    from trlpatch.errors import StaleAdapter, WrongVersion
    from trlpatch.ray.messages import RolloutRequest

    engines, policy = rig.engines, rig.policy()
    tiny.move(policy, seed=2)
    stale = trlpatch.lora_request(policy)
    tiny.move(policy, seed=3)
    request = trlpatch.lora_request(policy)
    words = engines.get_tokenizer()
    ids = [{"prompt_token_ids": words(text)["input_ids"]} for text in tiny.prompts(8)]
    params = SamplingParams(max_tokens=8, logprobs=0)
    for name in "xy":
        engines.llm_engine.add_request(name, ids[0], params, lora_request=request)
    by_hand = engines.llm_engine.step()
    supplied = policy.get_base_model().fast_generate(ids, params, use_tqdm=False)
    found: dict[str, Any] = {
        "by_hand": [output.request_id for output in by_hand],
        "bare_gap": max(gap_of(policy, output) for output in supplied),
    }
    submit = engines.submit
    kept: list[Any] = []  # Ray prints the error of an answer that nobody has looked at
    engines.on_each("pause")  # nothing of it ends by itself
    tokens_before = sampled_tokens(engines)

    def interrupted(index: int, one: Any) -> Any:
        sent = submit(index, one)
        if index == 1:
            kept.append(sent)
            raise KeyboardInterrupt
        return sent

    abort = engines.abort

    def and_wait(key: str | None = None) -> None:
        abort(key)
        aborts = [handle.abort.options(concurrency_group="control").remote(key) for handle in engines.handles]
        ray.get(aborts, timeout=120)

    engines.submit, engines.abort = interrupted, and_wait
    try:
        engines.generate(ids, SamplingParams(max_tokens=200, ignore_eos=True), lora_request=request, use_tqdm=False)
    except KeyboardInterrupt as error:
        found["interrupted"] = type(error).__name__
    finally:
        del engines.submit, engines.abort
    for sent in kept:
        with suppress(Exception):
            ray.get(sent, timeout=120)
    found["left"] = left_after(engines)
    engines.on_each("resume")
    after = engines.generate(ids, params, lora_request=request, use_tqdm=False)
    found["gap_after"] = max(gap_of(policy, output) for output in after)
    found["tokens_after"] = [sampled_tokens(engines) - tokens_before, sum(map(tokens_of, after))]
    try:
        ray.get(engines.submit(0, RolloutRequest(ids[:1], [params], adapter=99)), timeout=120)
    except WrongVersion as error:
        found["wrong_version"] = str(error)
    try:
        engines.generate(ids, params, lora_request=stale, use_tqdm=False)
    except StaleAdapter as error:
        found["stale_request"] = str(error)
    try:
        engines.generate({"prompt_token_ids": [5] * 999}, params, use_tqdm=False)
    except Exception as error:
        found["too_long"] = [type(error).__name__, str(error)]
    return found


def left_after(engines: Any) -> int:
    """Requests that an interrupt has left, once the engines have come to drop them."""
    deadline = time.monotonic() + 120
    while True:
        left: int = sum(health.running + health.waiting for health in engines.health())
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


def sampled_tokens(engines: Any) -> int:
    """Of all answers so far."""
    return sum(health.tokens for health in engines.health())


def tokens_of(output: Any) -> int:
    return sum(len(sequence.token_ids) for sequence in output.outputs)


def gap_of(policy: Any, output: Any) -> float:
    """Largest difference of a token's log-probability between the engine and the training model."""
    theirs = tiny.trainer_logprobs(policy, output.prompt_token_ids, output.outputs[0].token_ids)
    return float((tiny.engine_logprobs(output) - theirs).abs().max())


FEATURES = ("grpo/conversational", "rloo/plain", "online_dpo/plain")


def features(rig: Rig, names: Iterable[str] = FEATURES) -> dict[str, Any]:
    """Scenarios of tests/cpu/features.py, on these engines; those that this release has."""
    from tests.cpu.features import ALGORITHMS, SCENARIOS, Bench
    from trlpatch.source.locate import find_trl

    bench = Bench.__new__(Bench)
    bench.directory, bench.model, bench.engine = rig.directory / "features", rig.checkpoint, rig.engines
    bench.words = tiny.tokenizer()
    bench.words.chat_template = TEMPLATE
    bench.built, bench.types, bench.launched, bench.algorithm = [], set(), set(), ""
    found: dict[str, Any] = {}
    for name in names:
        algorithm, scenario = name.split("/")
        if find_trl().release >= ALGORITHMS[algorithm][1]:
            found[name] = bench.run(algorithm, SCENARIOS[algorithm][scenario])
    return found


def all_features(rig: Rig) -> dict[str, Any]:
    """Every scenario there is; minutes."""
    from tests.cpu.features import SCENARIOS

    return features(rig, [f"{algorithm}/{scenario}" for algorithm, some in SCENARIOS.items() for scenario in some])


def loaded(rig: Rig) -> dict[str, Any]:
    """`FastLanguageModel.from_pretrained(num_engines=1)`, trained for three steps."""
    import trlpatch
    from tests.cpu.fast import SMALL
    from tests.cpu.small_grpo import small_grpo
    from tests.cpu.training import Recorder

    model, words = trlpatch.FastLanguageModel.from_pretrained(
        str(rig.checkpoint), **{**SMALL, "max_num_seqs": MAX_SEQS, "dtype": "float32", "num_engines": 1}
    )
    engines: Any = model.vllm_engine
    try:
        policy = trlpatch.FastLanguageModel.get_peft_model(model, r=8)
        trainer = small_grpo(policy, rig.directory, processing_class=words)
        recorder = Recorder(trainer, engines)
        trainer.train()
        recorder.close()
        utilization = engines.infos[0].vllm_config.cache_config.gpu_memory_utilization
        return {"location": engines.location, "rollouts": recorder.rollouts, "utilization": utilization}
    finally:
        engines.shutdown()


CASES: dict[str, Callable[[Rig], Any]] = {
    "grpo": grpo,
    "surface": surface,
    "hands": hands,
    "features": features,
    "lost_engine": fault_cases.lost_engine,
    "loaded": loaded,
    "toy_faults": lambda rig: fault_cases.toy_faults(),
    "killed_driver": lambda rig: fault_cases.killed_driver(),
    "full_weights": full_weights,
}
ON_REQUEST: dict[str, Callable[[Rig], Any]] = {"all_features": all_features}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
