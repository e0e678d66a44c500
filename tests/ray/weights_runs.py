"""Cases of tests.ray.grpo_runs about full weights. They leave the engines with the checkpoint's."""

from __future__ import annotations

from typing import Any


def full_weights(rig: Any) -> dict[str, Any]:
    """Two steps of stock GRPO that train every weight; then a control whose weights are never sent."""
    from transformers import AutoModelForCausalLM

    import trlpatch
    from trlpatch.engine.weights_publisher import start_policy, write_policy
    from trlpatch.errors import WeightsRefused
    from trlpatch.ray.transfer.policy_transfer import PolicyTransfer

    engines = rig.engines
    before = engines.weights_version
    try:
        found: dict[str, Any] = {"trained": _trained(rig)}
    except WeightsRefused as refusal:
        return {"refused": str(refusal), "version": [before, engines.weights_version]}
    found["version"] = [before, engines.weights_version]
    found["versions"] = engines.on_each("get_weight_version")
    found["status"] = " ".join(str(trlpatch.status()).split())
    send = PolicyTransfer.send
    PolicyTransfer.send = lambda self, weights: None  # type: ignore[method-assign]
    try:
        found["control"] = _trained(rig)
    finally:
        PolicyTransfer.send = send  # type: ignore[method-assign]
    model = trlpatch.attach_engine(AutoModelForCausalLM.from_pretrained(rig.checkpoint), engines, check=False)
    found["started"] = start_policy(model, engines)
    found["ended"] = write_policy(model, engines)
    return found


def _trained(rig: Any) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    import trlpatch
    from tests.cpu.small_grpo import small_grpo
    from tests.cpu.training import Recorder, logged

    model = trlpatch.attach_engine(AutoModelForCausalLM.from_pretrained(rig.checkpoint), rig.engines, check=False)
    trainer = small_grpo(model, rig.directory, config={"max_steps": 2, "learning_rate": 1e-3})
    recorder = Recorder(trainer, rig.engines)
    trainer.train()
    recorder.close()
    return {
        "gaps": [rollout["gap"] for rollout in recorder.rollouts],
        "adapters": [rollout["adapter"] for rollout in recorder.rollouts],
        "witness": logged(trainer, "sampling/sampling_logp_difference/max"),
    }
