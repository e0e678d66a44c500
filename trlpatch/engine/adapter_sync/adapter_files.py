"""Adapter sync through files, for an engine whose workers are in other processes."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path

from trlpatch.engine.adapter_sync import registry
from trlpatch.engine.private_files import private_directory
from trlpatch.engine.protocols import LoraRequest, RolloutEngine
from trlpatch.errors import AdapterNotExpressible
from trlpatch.policy.adapter import LoraWeights
from trlpatch.policy.adapter_tensors import adapter_tensors


class AdapterFiles:
    """Writes the adapter to a private directory, in memory where there is /dev/shm, for the engine to load."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = weakref.ref(engine)
        self._directory, self.remove_files = private_directory(self)
        self._current: LoraRequest | None = None
        self._valid = False

    @property
    def description(self) -> str:
        """For `trlpatch.status()`."""
        return f"through files in {self._directory.parent}"

    @property
    def compares(self) -> bool:
        """Every version is handed over at a price."""
        return False

    def publish(self, weights: LoraWeights) -> LoraRequest:
        """Write the tensors and have the engine read them at once; see AdapterSync."""
        from safetensors.torch import save_file

        engine = self._engine()
        adapter = adapter_tensors(weights)
        request = registry.fresh_request(self._directory)
        path = Path(request.lora_path)
        path.mkdir(mode=0o700)
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "",
            "r": adapter.rank,
            "lora_alpha": adapter.rank,
            "target_modules": list(adapter.targets),
            "bias": "none",
        }
        save_file(
            {name: tensor.cpu() for name, tensor in adapter.tensors.items()},
            path / "adapter_model.safetensors",
        )
        (path / "adapter_config.json").write_text(json.dumps(config))
        try:
            self._call(engine, "add_lora", request)
        except ValueError as error:
            shutil.rmtree(path, ignore_errors=True)
            raise AdapterNotExpressible(f"vLLM refuses the adapter: {error}") from error
        old, self._current, self._valid = self._current, request, True
        if old is not None:
            self._call(engine, "remove_lora", old.lora_int_id)
            shutil.rmtree(old.lora_path, ignore_errors=True)
        return request

    def start(self) -> None:
        """Nothing is handed over that has not changed."""

    def holds(self, request: LoraRequest) -> bool:
        """Tell whether this is the newest version."""
        # Evicted or not, vLLM can read it again: the newest version's files are kept.
        return self._valid and self._current is request

    def invalidate(self) -> None:
        """Stand by no version; the files of the last one go with the next `publish`."""
        self._valid = False

    @staticmethod
    def _call(engine: RolloutEngine | None, method: str, argument: LoraRequest | int) -> None:
        function = getattr(getattr(engine, "llm_engine", None), method, None)
        if callable(function):
            function(argument)
