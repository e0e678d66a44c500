"""Setting: what is trained on how many GPUs, and in which mode; shapes of models."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, get_args

from trlpatch.errors import InvalidSetting
from trlpatch.scale.lengths import Fixed, Lengths, LogNormal, Measured

Mode = Literal["colocated", "sync", "prefetch", "async"]
"""How rollouts and training share the GPUs.

    colocated  every trainer GPU has an engine of its own and generates its own share; no rollout GPUs
    sync       engines of their own; the trainer waits for them, they wait for it
    prefetch   the next batch is generated while this one trains: one version off-policy
    async      engines never stop; a sample that is more than `max_staleness` versions old is dropped
"""

Sync = Literal["adapter", "full-nccl", "full-objects", "server"]
"""How weights reach engines of their own.

    adapter       LoRA tensors through Ray's object store
    full-nccl     all weights, packed, by vLLM's NCCL weight transfer
    full-objects  all weights through Ray's object store
    server        TRL's `trl vllm-serve`: all weights (of LoRA the merged ones), a request and a broadcast for each
"""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that costs depend on."""

    name: str
    parameters: float
    layers: int
    hidden: int
    kv_heads: int
    head_dim: int
    linears_a_layer: tuple[tuple[int, int], ...]
    """(in, out) features of the linear layers that have an adapter."""

    def adapter_parameters(self, rank: int) -> int:
        """Return how many numbers A and B of all layers have."""
        return self.layers * rank * sum(rows + columns for rows, columns in self.linears_a_layer)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache for each token, in 16 bits."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def tensors(self) -> int:
        """Parameters of the checkpoint, about: seven linears, their three biases and two norms a layer."""
        return 12 * self.layers + 3


def _qwen2(
    name: str, parameters: float, layers: int, hidden: int, inner: int, kv_heads: int, head_dim: int = 128
) -> Shape:
    kv = kv_heads * head_dim
    attention = ((hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden))
    linears = (*attention, (hidden, inner), (hidden, inner), (inner, hidden))
    return Shape(name, parameters, layers, hidden, kv_heads, head_dim, linears)


SHAPES = {
    "1.5b": _qwen2("1.5b", 1.54e9, 28, 1536, 8960, 2),
    "7b": _qwen2("7b", 7.6e9, 28, 3584, 18944, 4),
    "32b": _qwen2("32b", 32.8e9, 64, 5120, 27648, 8),
    "72b": _qwen2("72b", 72.7e9, 80, 8192, 29568, 8),
}
"""Qwen2.5's. What was measured is 7b; the others are scaled from it by their parameters."""

CALIBRATED = SHAPES["7b"]


@dataclass(frozen=True)
class Setting:
    """One training run, as far as its speed goes.

    Attributes:
        shape: of the model.
        mode: see `Mode`.
        trainer_gpus: data parallel replicas of the trainer.
        rollout_gpus: GPUs of engines of their own; ignored when colocated.
        tensor_parallel: GPUs of one engine.
        completions: of one optimizer step, over all trainer GPUs.
        generations: completions of one prompt: a group is trained on as a whole.
        prompt_tokens: of every prompt.
        lengths: of completions.
        max_staleness: versions that a sample may be behind when it is trained on; async only.
        rank: of the adapter; 0 is full fine-tuning.
        sync: see `Sync`.
        checkpointing: gradient checkpointing.
        old_logps: log-probabilities of the rollout are computed in a pass of their own (TRL's default where it
            corrects for what the engine samples) or reused; async takes the engine's.
        padded: sequences are padded to the longest of a trainer's share, as GRPOTrainer does. None: by mode, since
            AsyncGRPOTrainer packs.
        max_num_seqs: sequences that an engine decodes at once.
        kv_gib: GiB of KV cache of one GPU.
        gpus_per_host: what is slower across hosts counts them.
        reward_s: seconds of the reward functions in a step.
    """

    shape: Shape = CALIBRATED
    mode: Mode = "sync"
    trainer_gpus: int = 1
    rollout_gpus: int = 1
    tensor_parallel: int = 1
    completions: int = 64
    generations: int = 8
    prompt_tokens: int = 64
    lengths: Lengths = field(default_factory=lambda: Fixed(1024))
    max_staleness: int = 4
    rank: int = 16
    sync: Sync = "adapter"
    checkpointing: bool = False
    old_logps: Literal["computed", "reused"] = "computed"
    padded: bool | None = None
    max_num_seqs: int = 256
    kv_gib: float = 50.0
    gpus_per_host: int = 8
    reward_s: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (("mode", Mode), ("sync", Sync)):
            if getattr(self, name) not in get_args(allowed):
                found = getattr(self, name)
                raise InvalidSetting(name, found, f"one of {', '.join(get_args(allowed))}")
        positive = (
            "trainer_gpus", "tensor_parallel", "completions", "generations", "max_num_seqs", "gpus_per_host",
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise InvalidSetting(name, getattr(self, name), "1 or more")
        for name in ("prompt_tokens", "max_staleness", "rank", "reward_s"):
            if getattr(self, name) < 0:
                raise InvalidSetting(name, getattr(self, name), "0 or more")
        if self.completions % self.generations:
            raise InvalidSetting("completions", self.completions, f"a multiple of generations ({self.generations})")
        if self.mode != "colocated" and (
            self.rollout_gpus < self.tensor_parallel or self.rollout_gpus % self.tensor_parallel
        ):
            raise InvalidSetting(
                "rollout_gpus", self.rollout_gpus, f"a multiple of tensor_parallel ({self.tensor_parallel})"
            )
        if self.rank == 0 and self.sync == "adapter" and self.mode != "colocated":
            raise InvalidSetting("sync", self.sync, "full-nccl, full-objects or server: rank 0 has no adapter")
        if self.slots < 1:
            raise InvalidSetting("kv_gib", self.kv_gib, "room for at least one sequence")

    @property
    def engines(self) -> int:
        """Engines that generate."""
        if self.mode == "colocated":
            return self.trainer_gpus
        return self.rollout_gpus // self.tensor_parallel

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.trainer_gpus + (0 if self.mode == "colocated" else self.rollout_gpus)

    @cached_property
    def slots(self) -> int:
        """Sequences that one engine decodes at once: `max_num_seqs`, or what its KV cache holds on average."""
        each = (self.prompt_tokens + self.lengths.mean) * self.shape.kv_bytes
        gpus = 1 if self.mode == "colocated" else self.tensor_parallel
        return min(self.max_num_seqs, int(self.kv_gib * 2**30 * gpus // each))

    @property
    def piece(self) -> int:
        """Completions that go to one engine together: a group, or an engine's share of the batch if that is less."""
        return min(self.generations, -(-self.completions // self.engines))

    @property
    def most_of_an_engine(self) -> int:
        """Completions of a batch that the engine with most of them gets."""
        pieces = -(-self.completions // self.piece)
        return min(self.completions, -(-pieces // self.engines) * self.piece)

    @property
    def pads(self) -> bool:
        """Whether the trainer computes on padding."""
        return self.mode != "async" if self.padded is None else self.padded

    def with_(self, **changes: Any) -> Setting:
        """Return a setting with other values."""
        return replace(self, **changes)


def from_json(given: dict[str, Any]) -> Setting:
    """Make a setting of what JSON holds: the shape by its name, lengths as `lengths_of` reads them.

    Raises:
        InvalidSetting: there is no such field or shape, or a value cannot be.
    """
    known = {one.name for one in fields(Setting)}
    if unknown := set(given) - known:
        name = min(unknown)
        raise InvalidSetting(name, given[name], f"one of the fields {', '.join(sorted(known))}")
    values = dict(given)
    if "shape" in values:
        values["shape"] = shape_of(values["shape"])
    if "lengths" in values:
        values["lengths"] = lengths_of(values["lengths"])
    return Setting(**values)


def shape_of(name: str) -> Shape:
    """Return the shape that is called so.

    Raises:
        InvalidSetting: none is.
    """
    if name not in SHAPES:
        raise InvalidSetting("shape", name, f"one of {', '.join(SHAPES)}")
    return SHAPES[name]


def lengths_of(given: int | list[int] | dict[str, Any]) -> Lengths:
    """Read lengths: a number for fixed ones, a list of measured ones, or {median, sigma, limit}.

    Raises:
        InvalidSetting: it is none of these.
    """
    try:
        if isinstance(given, dict):
            found = LogNormal(**given)
            if min(found.median, found.sigma, found.limit) > 0:
                return found
        elif isinstance(given, list):
            return Measured.of(given)
        elif given >= 1:
            return Fixed(int(given))
    except (TypeError, ValueError):
        pass
    raise InvalidSetting("lengths", given, "a number, a list of numbers, or {median, sigma, limit}, all positive")
