from tests.helpers import check_drift, check_patched

BEFORE = """\
class GRPOTrainer:
    def __init__(self, model, args):
        # Disable caching if gradient checkpointing is enabled (not supported)
        model_init_kwargs["use_cache"] = (
            False if args.gradient_checkpointing else model_init_kwargs.get("use_cache")
        )
"""


def test_the_value_is_asked_of_the_hook():
    after = BEFORE.replace(
        "        model_init_kwargs[", "        # trlpatch: use_cache\n        model_init_kwargs["
    ).replace('model_init_kwargs.get("use_cache")', "_trlpatch.use_cache(model_init_kwargs)")
    check_patched("use_cache", "grpo", "0.19.1", BEFORE, after)


def test_a_default_of_its_own_is_drift_because_it_needs_no_repair():
    text = BEFORE.replace('.get("use_cache")', '.get("use_cache", True)')
    check_drift("use_cache", "grpo", "0.19.1", text, "use_cache: expected 1, found 0", 'get("use_cache", True)')
