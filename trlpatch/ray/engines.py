"""`RayEngines`: rollout engines on Ray actors, with the surface of one `vllm.LLM`."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trlpatch.engine.adapter_sync.registry import LIVE_NAME
from trlpatch.errors import EngineLost, StaleAdapter, TrlpatchError
from trlpatch.ray.actor import CONTROL, ROLLOUTS
from trlpatch.ray.calls import gather
from trlpatch.ray.facade import Asked, RayLLMEngine
from trlpatch.ray.messages import CHECKPOINT_WEIGHTS, EngineHealth, EngineInfo, RolloutRequest, Version
from trlpatch.ray.prompts import as_conversations, as_prompts, one_each
from trlpatch.ray.rollout import Rollout
from trlpatch.ray.timeouts import Timeouts

if TYPE_CHECKING:
    from torch import Tensor

    from trlpatch.engine.backend import RolloutBackend
    from trlpatch.engine.protocols import LoraRequest
    from trlpatch.ray.packed import PackedAdapter
    from trlpatch.ray.prefetch import Prefetch
    from trlpatch.ray.protocols import Supervisor, WeightSender


_all: weakref.WeakSet[RayEngines] = weakref.WeakSet()


class RayEngines:
    """What `create_engines` returns, and what `attach_engine(model, engines)` takes."""

    def __init__(
        self,
        handles: Sequence[Any],
        infos: Sequence[EngineInfo],
        timeouts: Timeouts | None = None,
        *,
        release: Callable[[], None] | None = None,
    ) -> None:
        """`release` gives the resources back, after the actors have ended."""
        self.handles = list(handles)
        """The actors, by index; a lost engine's is replaced in place."""
        self.infos = list(infos)
        self.timeouts = timeouts or Timeouts()
        self.started: Any = None
        """How they were started (`trlpatch.ray.create.Started`), to start one again."""
        self.supervisor: Supervisor | None = None
        self.weight_sender: WeightSender | None = None
        self.weights_version = CHECKPOINT_WEIGHTS
        self.adapter_version = 0
        """Of the adapter that was sent last; 0 for none."""
        self.adapter_ref: Any = None
        """It, in Ray's object store."""
        self.adapter_bytes = 0
        self.sync_seconds = 0.0
        """That the last adapter took to every engine."""
        self.prefetch = 0
        """How many batches GRPOTrainer's are generated ahead."""
        self._prefetched: Prefetch | None = None
        self._live: LoraRequest | None = None
        self._release = release
        if release is not None:  # the actors end with their handles; what was reserved for them does not
            weakref.finalize(self, release).atexit = False
        self.llm_engine = RayLLMEngine(self)
        _all.add(self)

    def __repr__(self) -> str:
        return f"RayEngines({self.infos[0].model}, {self.location})"

    # What trlpatch asks of an engine.

    def rollout_backend(self) -> RolloutBackend:
        """The backend that `trlpatch.engine.backend.choose_backend` takes for these."""
        from trlpatch.ray.backend import RayBackend

        return RayBackend(self)

    def prepare_trainer(self, trainer: Any, args: Any) -> None:
        """A trainer that rolls out here is about to be initialised.

        Raises:
            PrefetchNotSupported: prefetch is on, and this trainer's batches cannot be generated ahead.
        """
        if self.prefetch:
            from trlpatch.ray.prefetch import Prefetch, refuse_prefetch

            refuse_prefetch(trainer, args, self.prefetch)
            self._prefetched = Prefetch(trainer, self.generate_now, self.chat_now)

    @property
    def location(self) -> str:
        """How many actors, and where."""
        nodes = sorted({info.node for info in self.infos})
        parallel = self.infos[0].vllm_config.parallel_config.tensor_parallel_size
        count = f"{len(self.handles)} Ray actor{'s' if len(self.handles) > 1 else ''}"
        return f"{count}{f' of {parallel} GPUs each' if parallel > 1 else ''} on {', '.join(nodes)}"

    @property
    def replicas(self) -> list[RayEngines]:
        """Each engine alone, to ask all of them the same."""
        return [
            RayEngines([handle], [info], self.timeouts) for handle, info in zip(self.handles, self.infos, strict=True)
        ]

    # What trainers and users ask of a `vllm.LLM`.

    def generate(
        self,
        prompts: Any,
        sampling_params: Any = None,
        *,
        use_tqdm: Any = True,
        lora_request: Any = None,
        priority: Sequence[int] | None = None,
        **arguments: Any,
    ) -> list[Any]:
        """As `vllm.LLM.generate`: one `RequestOutput` a prompt, in order."""
        if priority is not None:
            arguments["priority"] = priority
        if self._prefetched is not None:
            return self._prefetched.asked(
                "generate", prompts, sampling_params, use_tqdm=use_tqdm, lora_request=lora_request, **arguments
            )
        return self.generate_now(prompts, sampling_params, use_tqdm=use_tqdm, lora_request=lora_request, **arguments)

    def generate_now(
        self,
        prompts: Any,
        sampling_params: Any = None,
        *,
        use_tqdm: Any = True,
        lora_request: Any = None,
        priority: Sequence[int] | None = None,
        **arguments: Any,
    ) -> list[Any]:
        """As `generate`, and nothing that was generated ahead."""
        each = one_each(priority, len(found := as_prompts(prompts)), "priority")
        return self._asked("generate", found, sampling_params, use_tqdm, lora_request, arguments, each)

    def chat(
        self,
        messages: Any,
        sampling_params: Any = None,
        use_tqdm: Any = True,
        lora_request: Any = None,
        **arguments: Any,
    ) -> list[Any]:
        """As `vllm.LLM.chat`; the engine's process renders the conversations."""
        if self._prefetched is not None:
            return self._prefetched.asked(
                "chat", messages, sampling_params, use_tqdm=use_tqdm, lora_request=lora_request, **arguments
            )
        return self.chat_now(messages, sampling_params, use_tqdm, lora_request, **arguments)

    def chat_now(
        self,
        messages: Any,
        sampling_params: Any = None,
        use_tqdm: Any = True,
        lora_request: Any = None,
        **arguments: Any,
    ) -> list[Any]:
        """As `chat`, and nothing that was generated ahead."""
        return self._asked("chat", as_conversations(messages), sampling_params, use_tqdm, lora_request, arguments, [])

    def _asked(
        self,
        method: str,
        prompts: Sequence[Any],
        sampling_params: Any,
        use_tqdm: Any,
        lora_request: Any,
        arguments: Mapping[str, Any],
        priorities: Sequence[Any],
    ) -> list[Any]:
        self._flush_weights()
        inner = self.llm_engine
        params = one_each(sampling_params, len(prompts), "sampling_params")
        adapters = one_each(lora_request, len(prompts), "lora_request")
        names = []
        try:
            for place, prompt in enumerate(prompts):
                name = inner.fresh_name()
                names.append(name)
                extra = {"priority": priorities[place]} if priorities else {}
                # By way of `add_request`, whose guard sees to the adapter.
                inner.add_request(name, prompt, params[place], lora_request=adapters[place], **extra)
            asked = [inner.asked[name] for name in names]
            return Rollout(self, asked, method, arguments, use_tqdm).outputs()
        finally:
            inner.abort_request(names)

    def answer(self, asked: Sequence[Asked]) -> list[Any]:
        """The outputs of requests that were added by hand, each under its own name."""
        self._flush_weights()
        outputs = Rollout(self, asked, "generate", {}, False).outputs()
        for one, output in zip(asked, outputs, strict=True):
            output.request_id = one.name
        return outputs

    def sleep(self, level: int = 1, **_: Any) -> None:
        """Put every engine to sleep; nothing needs that, since they have GPUs of their own."""
        self.llm_engine.sleep(level)

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Wake every engine."""
        self.llm_engine.wake_up(tags)

    def reset_prefix_cache(self, *_: Any, **__: Any) -> bool:
        """Forget cached prefixes on every engine; TRL ends a full-weight sync with it."""
        self._flush_weights()
        return all(self.on_each("reset_prefix_cache"))

    def collective_rpc(
        self,
        method: str | Callable[..., object],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """Call a method of every worker of every engine; one answer a worker."""
        answers = self.on_each("call", _collective_rpc, method, args, kwargs or {}, timeout=timeout)
        return [answer for engine in answers for answer in engine]

    def apply_model(self, func: Callable[..., Any]) -> list[Any]:
        """As `vllm.LLM.apply_model`, on every engine."""
        return [answer for engine in self.on_each("call", _apply_model, func) for answer in engine]

    def get_tokenizer(self) -> Any:
        """The engines' tokenizer."""
        return self.of_first(_get_tokenizer)

    def get_default_sampling_params(self) -> Any:
        """What is sampled with where nothing is said."""
        return self.of_first(_get_default_sampling_params)

    # Engines by themselves.

    def submit(self, index: int, request: RolloutRequest) -> Any:
        """Send one engine a request; the `ObjectRef` of its RolloutResponse."""
        return self.handles[index].generate.options(concurrency_group=ROLLOUTS).remote(request)

    def on_each(self, method: str, *args: Any, timeout: float | None = None, **kwargs: Any) -> list[Any]:
        """Call a method of every actor, at once, and give the answers by index.

        Raises:
            EngineLost: an actor is dead.
            RolloutTimeout: one did not answer in time.
        """
        refs = [getattr(handle, method).remote(*args, **kwargs) for handle in self.handles]
        answers = gather(refs, method, self.timeouts.sync if timeout is None else timeout)
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        if failures:
            # One that is lost first: what the others say may follow from it.
            raise min(failures, key=lambda error: not isinstance(error, EngineLost))
        return answers

    def of_first(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run `function(llm, *args)` in the first engine's process, between two steps."""
        (answer,) = gather([self.handles[0].call.remote(function, *args)], "call", self.timeouts.sync)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def health(self, timeout: float | None = None) -> list[EngineHealth | BaseException]:
        """How every engine does; its exception in the place of one that cannot say."""
        refs = [handle.health.options(concurrency_group=CONTROL).remote() for handle in self.handles]
        return gather(refs, "health", self.timeouts.health if timeout is None else timeout)

    def abort(self, key: str | None = None) -> None:
        """Tell every engine to drop the requests with that key, or all; does not wait."""
        for handle in self.handles:
            handle.abort.options(concurrency_group=CONTROL).remote(key)

    # Adapter and weights.

    @property
    def version(self) -> Version:
        """What every engine holds."""
        return Version(self.adapter_version, self.weights_version)

    def holds_live(self, request: LoraRequest) -> bool:
        """Is it the request of the adapter that every engine holds?"""
        return self._live is not None and request.lora_name == self._live.lora_name

    def adapter_of(self, request: LoraRequest | None) -> int:
        """The version of the live adapter that a request names; 0 for none and for a saved one.

        Raises:
            StaleAdapter: it names one that was replaced.
        """
        if request is None or not request.lora_name.startswith(LIVE_NAME):
            return 0
        if not self.holds_live(request):
            held = "none" if self._live is None else repr(self._live.lora_name)
            raise StaleAdapter(
                f"a request for {request.lora_name!r}, a version of the live adapter that the engines do not hold: "
                f"they have {held}; ask for it at every rollout, lora_request=trlpatch.lora_request(model)"
            )
        return self.adapter_version

    def publish_adapter(self, packed: PackedAdapter, request: LoraRequest) -> None:
        """Have every engine take an adapter, which `request` stands for from now on.

        Raises:
            AdapterNotExpressible: they have no place for one of its modules; the version before still stands.
            EngineLost: one of them did not take it, and cannot be replaced.
            RolloutTimeout: one of them did not take it in time.
        """
        import ray

        started = time.monotonic()
        before, self._live = self._live, None
        version, self.adapter_version = self.adapter_version, self.adapter_version + 1
        self.adapter_ref, self.adapter_bytes = ray.put(packed), packed.nbytes
        try:
            self.on_each("publish_adapter", self.adapter_ref, self.adapter_version)
        except EngineLost as error:
            self.replaced(error)  # the engine that takes its place is given this adapter
        except TrlpatchError as error:
            if not isinstance(error, TimeoutError):  # refused by all before anything was changed
                self._live, self.adapter_version = before, version
            raise
        self._live = request
        self.sync_seconds = time.monotonic() - started

    def send_weights(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Have every engine take full weights."""
        if self.weight_sender is None:
            raise EngineLost("send_weights: these engines have no way for full weights")
        version = str(int(self.weights_version) + 1)
        self.weight_sender.send(named, version)

    def took_weights(self, version: str) -> None:
        """Note that every engine samples with these weights, and has no live adapter any more."""
        self.weights_version = version
        self.adapter_version, self.adapter_ref, self._live = 0, None, None

    def replaced(self, error: EngineLost, index: int | None = None) -> None:
        """Have the supervisor replace lost engines.

        Raises:
            EngineLost: nobody does, or it cannot be done.
        """
        if self.supervisor is None:
            raise error
        lost = [index] if index is not None else self.lost_engines()
        for one in lost:
            self.supervisor.lost(one, error)

    def lost_engines(self) -> list[int]:
        """Indices of the engines that answer nothing any more."""
        return [
            index
            for index, health in enumerate(self.health())
            if isinstance(health, BaseException) or health.state in ("lost", "stopped")
        ]

    def _flush_weights(self) -> None:
        """Send what TRL's own sync has loaded; OnlineDPO of TRL 0.18 ends it without a word."""
        self.llm_engine.model_executor.driver_worker.model_runner.model.flush()

    # Life.

    def shutdown(self) -> None:
        """End all engines and give their resources back."""
        import ray

        handles, self.handles = self.handles, []
        if ray.is_initialized():
            ending = [handle.shutdown.options(concurrency_group=CONTROL).remote() for handle in handles]
            ray.wait(ending, num_returns=len(ending), timeout=10.0) if ending else None
            for handle in handles:
                ray.kill(handle)
        release, self._release = self._release, None
        if release is not None:
            release()


def all_engines() -> list[RayEngines]:
    """Those of this process that are alive."""
    return [engines for engines in _all if engines.handles]


def _collective_rpc(llm: Any, method: Any, args: Any, kwargs: Any) -> Any:
    return llm.collective_rpc(method, args=args, kwargs=kwargs)


def _apply_model(llm: Any, function: Any) -> Any:
    return llm.apply_model(function)


def _get_tokenizer(llm: Any) -> Any:
    tokenizer = llm.get_tokenizer()
    if type(tokenizer).__name__.startswith("TokenizerPool"):
        # vLLM 0.23's pool arrives as None (vllm-project/vllm#45433); what it is a pool of arrives as it is.
        _, (tokenizer, *_) = tokenizer.__reduce__()
    return tokenizer


def _get_default_sampling_params(llm: Any) -> Any:
    return llm.get_default_sampling_params()
