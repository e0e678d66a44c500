"""Target table: the TRL files that trlpatch may rewrite, per release.

Names, locations and lifetimes were read in the wheels of every release from 0.18.0 to 1.16.0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from trlpatch.source.releases import Release, ReleaseRange
from trlpatch.trl_names import LEFT_ALONE_TRAINERS

Kind = Literal["trainer", "config", "engine", "helper", "support"]

PACKAGE = "__init__"
"""As the module of a location: the `trl` package's own file."""


@dataclass(frozen=True)
class ModuleLocation:
    """Where a target lives in some releases; `module` is relative to the `trl` package."""

    trl: ReleaseRange
    module: str

    @property
    def file(self) -> str:
        """Path relative to the `trl` package directory."""
        return self.module.replace(".", "/") + ".py"

    @property
    def qualified(self) -> str:
        """Full module name: `trl.trainer.grpo_trainer`, or `trl` for the package itself."""
        return "trl" if self.module == PACKAGE else f"trl.{self.module}"


@dataclass(frozen=True)
class Target:
    """One TRL source file as patches know it.

    Attributes:
        name: key used by patches, the command line and the golden files.
        kind: "support" is a file that trainers import and that has nothing to do with an engine of this process.
        classes: the classes of that file that patches may touch; empty for a file of helper functions.
        coupled_with: targets that share one engine with this one. A target and all that it is coupled with, directly
            or through others, are patched together or not at all.
    """

    name: str
    kind: Kind
    locations: tuple[ModuleLocation, ...]
    classes: tuple[str, ...] = ()
    coupled_with: tuple[str, ...] = field(default=())

    def location(self, release: Release) -> ModuleLocation | None:
        """Return where this target lives in `release`, or None if that release lacks it."""
        return next((location for location in self.locations if release in location.trl), None)


def _locations(modules: dict[str, str]) -> tuple[ModuleLocation, ...]:
    return tuple(ModuleLocation(ReleaseRange(trl), module) for trl, module in modules.items())


def _target(
    name: str,
    kind: Kind,
    locations: dict[str, str],
    classes: str = "",
    coupled_with: tuple[str, ...] = (),
) -> Target:
    return Target(
        name,
        kind,
        _locations(locations),
        tuple(classes.split()),
        coupled_with,
    )


_ALL = (
    _target("vllm_generation", "engine", {">=0.28": "generation.vllm_generation"}, "VLLMGeneration"),
    _target("grpo", "trainer", {">=0.18": "trainer.grpo_trainer"}, "GRPOTrainer", ("grpo_config", "vllm_generation")),
    _target("grpo_config", "config", {">=0.18": "trainer.grpo_config"}, "GRPOConfig"),
    # RLOO before 0.22 is the PPO-style trainer, without vLLM.
    _target("rloo", "trainer", {">=0.22": "trainer.rloo_trainer"}, "RLOOTrainer", ("rloo_config", "vllm_generation")),
    _target("rloo_config", "config", {">=0.22": "trainer.rloo_config"}, "RLOOConfig"),
    # 0.26-0.28 keep shims in trl.trainer that subclass the experimental classes and need no patch of their own.
    _target(
        "online_dpo",
        "trainer",
        {">=0.18,<0.26": "trainer.online_dpo_trainer", ">=0.26": "experimental.online_dpo.online_dpo_trainer"},
        "OnlineDPOTrainer",
        ("online_dpo_config",),
    ),
    _target(
        "online_dpo_config",
        "config",
        {">=0.18,<0.26": "trainer.online_dpo_config", ">=0.26": "experimental.online_dpo.online_dpo_config"},
        "OnlineDPOConfig",
    ),
    _target(
        "gold",
        "trainer",
        {">=0.25": "experimental.gold.gold_trainer"},
        "GOLDTrainer",
        ("gold_config", "vllm_generation"),
    ),
    _target("gold_config", "config", {">=0.25": "experimental.gold.gold_config"}, "GOLDConfig"),
    _target(
        "distillation",
        "trainer",
        {
            ">=1.1,<1.10": "experimental.distillation.distillation_trainer",
            ">=1.10": "trainer.distillation_trainer",
        },
        "DistillationTrainer",
        ("distillation_config", "vllm_generation"),
    ),
    _target(
        "distillation_config",
        "config",
        {
            ">=1.1,<1.10": "experimental.distillation.distillation_config",
            ">=1.10": "trainer.distillation_config",
        },
        "DistillationConfig",
    ),
    # 1.0-1.5: SDPO stands on this base class; SDFT refuses use_vllm until 1.6.
    _target(
        "self_distillation",
        "trainer",
        {">=1.0,<1.6": "experimental.self_distillation.base_self_distillation_trainer"},
        "BaseSelfDistillationTrainer",
        ("self_distillation_config", "vllm_generation"),
    ),
    _target(
        "self_distillation_config",
        "config",
        {">=1.0,<1.6": "experimental.self_distillation.self_distillation_config"},
        "SelfDistillationConfig",
    ),
    _target(
        "sdpo",
        "trainer",
        {">=1.6": "experimental.sdpo.sdpo_trainer"},
        "SDPOTrainer",
        ("sdpo_config", "vllm_generation"),
    ),
    _target("sdpo_config", "config", {">=1.6": "experimental.sdpo.sdpo_config"}, "SDPOConfig"),
    _target(
        "sdft",
        "trainer",
        {">=1.6": "experimental.sdft.sdft_trainer"},
        "SDFTTrainer",
        ("sdft_config", "vllm_generation"),
    ),
    _target("sdft_config", "config", {">=1.6": "experimental.sdft.sdft_config"}, "SDFTConfig"),
    _target(
        "ssd",
        "trainer",
        {">=1.2,<1.16": "experimental.ssd.ssd_trainer"},
        "SSDTrainer",
        ("ssd_config", "vllm_generation"),
    ),
    _target("ssd_config", "config", {">=1.2,<1.16": "experimental.ssd.ssd_config"}, "SSDConfig"),
    _target(
        "iw_opd",
        "trainer",
        {">=1.9": "experimental.iw_opd.iw_opd_trainer"},
        "IWOPDTrainer",
        ("iw_opd_config", "vllm_generation"),
    ),
    _target("iw_opd_config", "config", {">=1.9": "experimental.iw_opd.iw_opd_config"}, "IWOPDConfig"),
    _target("openenv", "helper", {">=0.26,<1.9": "experimental.openenv.utils"}, coupled_with=("grpo",)),
    # Not about rollouts: what has to be repaired in them so that the trainers can be imported.
    _target("trl", "support", {">=0.26,<0.27": PACKAGE}),
    _target("import_utils", "support", {">=0.18,<0.29": "import_utils"}),
    _target("vllm_client", "support", {">=0.28,<1.14.2": "generation.vllm_client"}),
)

TARGETS: dict[str, Target] = {target.name: target for target in _ALL}

_TRAINERS: dict[str, tuple[str, ...]] = {
    "grpo": ("grpo", "grpo_config", "vllm_generation", "openenv"),
    "rloo": ("rloo", "rloo_config", "vllm_generation"),
    "online_dpo": ("online_dpo", "online_dpo_config"),
    "gold": ("gold", "gold_config", "vllm_generation"),
    "distillation": ("distillation", "distillation_config", "vllm_generation"),
    "sdpo": ("sdpo", "sdpo_config", "self_distillation", "self_distillation_config", "vllm_generation"),
    "sdft": ("sdft", "sdft_config", "vllm_generation"),
    "ssd": ("ssd", "ssd_config", "vllm_generation"),
    "iw_opd": ("iw_opd", "iw_opd_config", "vllm_generation"),
    # These subclass GRPOTrainer and GRPOConfig and inherit every patch.
    "dppo": ("grpo", "grpo_config", "vllm_generation"),
    "gfpo": ("grpo", "grpo_config", "vllm_generation"),
    "gspo_token": ("grpo", "grpo_config", "vllm_generation"),
    "gmpo": ("grpo", "grpo_config", "vllm_generation"),
    "minillm": ("grpo", "grpo_config", "vllm_generation"),
    "papo": ("grpo", "grpo_config", "vllm_generation"),
    "grpo_with_replay_buffer": ("grpo", "grpo_config", "vllm_generation"),
}

ALGORITHMS = {name: (*needs, "trl", "import_utils", "vllm_client") for name, needs in _TRAINERS.items()}
"""Trainers that roll out on an in-process engine, and the targets each of them needs, its own file first."""

INHERITING: dict[str, tuple[str, str]] = {
    "dppo": ("experimental.dppo.dppo_trainer", "DPPOTrainer"),
    "gfpo": ("experimental.gfpo.gfpo_trainer", "GFPOTrainer"),
    # Its class has GRPO's own name, so that a search for it says nothing.
    "gspo_token": ("experimental.gspo_token.grpo_trainer", ""),
    "gmpo": ("experimental.gmpo.gmpo_trainer", "GMPOTrainer"),
    "minillm": ("experimental.minillm.minillm_trainer", "MiniLLMTrainer"),
    "papo": ("experimental.papo.papo_trainer", "PAPOTrainer"),
    "grpo_with_replay_buffer": (
        "experimental.grpo_with_replay_buffer.grpo_with_replay_buffer_trainer",
        "GRPOWithReplayBufferTrainer",
    ),
}
"""Algorithms without a target of their own: the module and the class of each, where a release has it."""

LEFT_ALONE: dict[str, tuple[ModuleLocation, ...]] = {
    name: _locations(
        {">=0.18,<0.26": f"trainer.{module}_trainer", ">=0.26,<1.14": f"experimental.{module}.{module}_trainer"}
    )
    for name, module in zip(LEFT_ALONE_TRAINERS, ("nash_md", "xpo"), strict=True)
}
"""Trainers that subclass a target's class and that the hooks leave as TRL wrote them, see `LEFT_ALONE_REASON`."""
