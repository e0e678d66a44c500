"""Owners that call the hooks in the order in which patched TRL calls them, release by release (docs/patches.md)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from trlpatch import hooks


class Owner:
    """A trainer or a VLLMGeneration: a model, an engine, and TRL's own sync with the adapter_sync patch in it."""

    def __init__(self, model: Any, engine: Any, *, sleep: bool = True, level: int = 2, mode: str = "colocate") -> None:
        self.model = model
        self.llm = engine
        self.mode = mode
        self.state = SimpleNamespace(global_step=0)
        self.enable_sleep_mode = sleep
        self.level = level
        self.syncs = 0
        self._last_loaded_step = -1
        if sleep:
            hooks.sleep(self, self.llm, level=level)

    def sync_weights(self) -> None:
        self.syncs += 1
        if hooks.hand_over(self):
            return
        self.llm.load_weights()
        self.llm.reset_prefix_cache()

    def sync_if_stepped(self) -> None:
        if self.state.global_step != self._last_loaded_step:
            self.sync_weights()
            self._last_loaded_step = self.state.global_step

    def generate(self) -> None:
        self.llm.generate(["prompt"], lora_request=hooks.lora_request(self, self.llm))

    def wake(self, *tags: str) -> None:
        if self.enable_sleep_mode:
            hooks.wake_up(self, self.llm, **({"tags": list(tags)} if tags else {}))

    def rest(self) -> None:
        if self.enable_sleep_mode:
            hooks.sleep(self, self.llm, level=self.level)

    def batch(self) -> None:
        raise NotImplementedError


class Since023(Owner):
    """0.23-0.24: wake everything, sync when the step changed, generate, sleep at level 1."""

    def __init__(self, model: Any, engine: Any, **settings: Any) -> None:
        super().__init__(model, engine, level=1, **settings)

    def batch(self) -> None:
        self.wake()
        self.sync_if_stepped()
        self.generate()
        self.rest()


class Since025(Owner):
    """0.25: as 0.24 with tags and level 2. Also OnlineDPO 0.28-1.16, where the second batch is a micro-step."""

    def batch(self) -> None:
        self.wake("weights")
        self.sync_if_stepped()
        self.wake("kv_cache")
        self.generate()
        self.rest()


class Since026(Owner):
    """0.26-0.27: `reload_weights` before the sync."""

    def batch(self) -> None:
        self.wake("weights")
        hooks.reload_weights(self, self.llm)
        self.sync_if_stepped()
        self.wake("kv_cache")
        self.generate()
        self.rest()


class Since028(Owner):
    """0.28.0: sync before anything is awake, then `reload_weights` over it."""

    def batch(self) -> None:
        self.sync_if_stepped()
        self.wake("weights")
        hooks.reload_weights(self, self.llm)
        self.wake("kv_cache")
        self.generate()
        self.rest()


class Since029(Since028):
    """0.29.0-1.9.2: the sync wakes the weights itself."""

    def sync_weights(self) -> None:
        self.wake("weights")
        super().sync_weights()


class Since110(Owner):
    """1.10-1.16: no reload; generate syncs by itself after every sleep."""

    def __init__(self, model: Any, engine: Any, **settings: Any) -> None:
        super().__init__(model, engine, **settings)
        self._llm_weights_sleeping = self.enable_sleep_mode

    def sync_weights(self) -> None:
        self.wake("weights")
        self._llm_weights_sleeping = False
        super().sync_weights()

    def batch(self) -> None:
        self.sync_if_stepped()
        if self._llm_weights_sleeping:
            self.sync_weights()
        self.wake("kv_cache")
        self.generate()
        self.rest()
        self._llm_weights_sleeping = self.enable_sleep_mode


class RolloutFunction(Since110):
    """openenv's helper, called from a `rollout_func`: wakes only the cache, and sleeps."""

    def batch(self) -> None:
        self.sync_if_stepped()
        self.wake("kv_cache")
        hooks.reload_weights(self, self.llm)
        self.generate()
        self.rest()


class WithoutSleepCode(Owner):
    """GRPO 0.18-0.22, RLOO 0.22-0.23, OnlineDPO 0.23-0.27: the patch adds a sleep after the rollout."""

    def __init__(self, model: Any, engine: Any, **settings: Any) -> None:
        super().__init__(model, engine, **{**settings, "sleep": False})

    def batch(self) -> None:
        self.sync_if_stepped()
        self.generate()
        hooks.sleep(self, self.llm)


class WithoutSync:
    """OnlineDPO below 0.23: loads weights before every rollout, and has no method for it."""

    def __init__(self, model: Any, engine: Any, **_: Any) -> None:
        self.model = model
        self.llm = engine
        self.state = SimpleNamespace(global_step=0)

    def batch(self) -> None:
        if not hooks.hand_over(self):
            self.llm.load_weights()
        self.llm.generate(["prompt"], lora_request=hooks.lora_request(self, self.llm))
        hooks.sleep(self, self.llm)


EPOCHS = [Since023, Since025, Since026, Since028, Since029, Since110, RolloutFunction, WithoutSleepCode, WithoutSync]
