"""Costs: seconds of a decoding step, a training step and a weight sync in one setting, from the calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from trlpatch.scale.calibration import Calibration, decode_line
from trlpatch.scale.setting import CALIBRATED, Setting


@dataclass(frozen=True)
class EngineCosts:
    """What one engine takes: `base + each*b + seen*c` for a decoding step of b sequences, c tokens of context in all.

    `base` is reading the weights and the host's share, `each` sampling and the host for each sequence, `seen` reading
    the KV cache. Throughput b / step saturates at 1 / (each + seen * context).
    """

    base: float
    each: float
    seen: float
    prefill: float
    """For each token of a prompt."""

    def step(self, running: float, context: float) -> float:
        """Return seconds of one decoding step."""
        return self.base + self.each * running + self.seen * context

    def throughput(self, running: float, context_each: float) -> float:
        """Return tokens per second with so many sequences, each with so many tokens of context on average."""
        return running / self.step(running, running * context_each)


@dataclass(frozen=True)
class Costs:
    """Costs in one setting."""

    setting: Setting
    calibration: Calibration

    @cached_property
    def engine(self) -> EngineCosts:
        """Of an engine of this setting.

        The reading of weights grows with the parameters, the rest of a sequence's cost (sampling, the host) does not.
        """
        setting, known = self.setting, self.calibration
        bandwidth = known["memory_bandwidth"]
        base, each = decode_line(known.generation_points, CALIBRATED.kv_bytes / bandwidth)
        size = setting.shape.parameters / CALIBRATED.parameters
        gpus = 1 if setting.mode == "colocated" else setting.tensor_parallel
        faster = gpus * known["tensor_parallel_efficiency"] ** math.log2(gpus)
        factor = known["generation_in_training_factor"] / faster
        return EngineCosts(
            base=base * size * factor,
            each=each * factor,
            seen=setting.shape.kv_bytes / bandwidth * factor,
            prefill=size / known["prefill_tokens_per_s"] * factor,
        )

    def training(self, tokens: float, context: float) -> float:
        """Return seconds of a step of the trainer on `tokens` tokens of its busiest GPU.

        Args:
            tokens: prompts and padding included.
            context: length of these sequences; attention makes tokens of long ones dearer.
        """
        setting, known = self.setting, self.calibration
        shape = setting.shape
        attention = 1 + shape.layers * shape.hidden * context / (2 * shape.parameters)
        each = known["training_s_per_token"] * (known["checkpointing_factor"] if setting.checkpointing else 1.0)
        if setting.rank == 0:
            each *= 1.5  # gradients of the weights as well: 6 FLOP a parameter and token instead of 4
        if setting.mode != "async" and setting.old_logps == "computed":
            each += known["old_logps_s_per_token"]
        size = shape.parameters / CALIBRATED.parameters
        return tokens * each * size * attention + known["step_overhead_s"] + setting.reward_s + self.reduction

    @cached_property
    def reduction(self) -> float:
        """Seconds of the all-reduce of gradients: float32 of an adapter, 16 bits of all weights."""
        setting, known = self.setting, self.calibration
        replicas = setting.trainer_gpus
        if replicas == 1:
            return 0.0
        shape = setting.shape
        size = 4 * shape.adapter_parameters(setting.rank) if setting.rank else 2 * shape.parameters
        within = replicas <= setting.gpus_per_host
        bandwidth = known["nccl_bandwidth" if within else "nccl_network_bandwidth"]
        return 2 * size * (replicas - 1) / replicas / bandwidth

    @cached_property
    def sync_bytes(self) -> float:
        """Bytes that each engine is sent, in 16 bits: adapters are rounded to the engines' dtype first."""
        setting = self.setting
        if setting.sync == "adapter":
            return 2.0 * setting.shape.adapter_parameters(setting.rank)
        return 2 * setting.shape.parameters

    @cached_property
    def sync(self) -> float:
        """Seconds from the end of an optimizer step until every engine has the new version."""
        setting, known = self.setting, self.calibration
        if setting.mode == "colocated":
            size = setting.shape.parameters / CALIBRATED.parameters
            return known["hand_over_in_process_s"] if setting.rank else known["full_push_in_process_s"] * size
        hosts = math.ceil(setting.rollout_gpus / setting.gpus_per_host)
        size, call = self.sync_bytes, known["remote_call_s"]
        if setting.sync in ("adapter", "full-objects"):
            # Objects are copied from host to host, each that has one giving it on.
            rounds = math.ceil(math.log2(hosts + 1)) if setting.gpus > setting.gpus_per_host else 0
            travelled = size / known["object_store_put_bandwidth"] + rounds * size / known["network_bandwidth"]
            return call + travelled + size / known["object_store_get_bandwidth"] + self.apply
        within = setting.gpus <= setting.gpus_per_host
        broadcast = size / known["nccl_bandwidth" if within else "nccl_network_bandwidth"]
        if setting.sync == "full-nccl":
            return 3 * call + broadcast + self.apply
        merged = known["full_push_in_process_s"] * setting.shape.parameters / CALIBRATED.parameters
        return setting.shape.tensors * known["request_s"] + broadcast + merged

    @cached_property
    def apply(self) -> float:
        """Seconds that an engine stands still for it: between two decoding steps."""
        setting, known = self.setting, self.calibration
        if setting.mode == "colocated" or setting.sync == "server":
            return 0.0
        if setting.sync == "adapter":
            return known["adapter_apply_s"]
        return setting.shape.tensors * known["parameter_s"] + 2 * self.sync_bytes / known["memory_bandwidth"]

    @cached_property
    def pause(self) -> float:
        """Seconds that asynchronous engines generate nothing for a sync: they stop while weights arrive in place."""
        if self.setting.sync in ("adapter", "full-objects"):  # arrived before it is applied
            return self.apply
        return self.sync
