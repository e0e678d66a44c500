from tests.helpers import HEADER, apply, check_drift

CONFIG = """\
from dataclasses import dataclass, field


@dataclass
class GRPOConfig(TrainingArguments):
    beta: float = field(default=0.0)
    log_unique_prompts: bool = field(
        default=False,
    )

    def __post_init__(self):
        super().__post_init__()
"""


def test_the_field_comes_last_and_post_init_normalises_it():
    result = apply("sampling_config", "grpo_config", "1.16.0", CONFIG)
    assert not result.failed
    namespace: dict[str, object] = {}
    stubs = (
        "class _trlpatch:\n"
        "    @staticmethod\n"
        "    def normalize_sampling(config): config.seen = config.vllm_sampling_params\n"
        "class TrainingArguments:\n    def __post_init__(self): pass\n"
    )
    exec(stubs + result.text.removeprefix(HEADER).replace("import trlpatch.hooks as _trlpatch", ""), namespace)
    config = namespace["GRPOConfig"](vllm_sampling_params={"min_p": 0.1})  # type: ignore[operator]
    assert config.seen == {"min_p": 0.1}
    assert list(config.__dataclass_fields__) == ["beta", "log_unique_prompts", "vllm_sampling_params"]
    assert result.touched == ("GRPOConfig.<fields>", "GRPOConfig.__post_init__")


def test_a_config_without_post_init_is_drift():
    check_drift(
        "sampling_config",
        "grpo_config",
        "1.16.0",
        CONFIG.replace("__post_init__", "__setup__"),
        "post_init: expected 1, found 0",
        lookalike="def __setup__(self):",
    )
