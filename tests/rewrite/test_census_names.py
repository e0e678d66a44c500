"""Names that hooks rely on: a renamed field or attribute is drift, although hooks ask for it with `getattr`."""

from __future__ import annotations

import pytest

from tests.helpers import source
from trlpatch.outcomes import ENGINE_USE
from trlpatch.rewrite.census.names import FIELDS, READ, SET, lost_names
from trlpatch.rewrite.outline import outline
from trlpatch.rewrite.rewriter import rewrite
from trlpatch.source.releases import ReleaseRange, parse_release
from trlpatch.source.targets import TARGETS

NAMES = FIELDS["sdpo_config"][">=1.6"]
CONFIG = """\
@dataclass
class SDPOConfig(_BaseConfig):
    {}

    def __post_init__(self):
        super().__post_init__()
""".format("\n    ".join(f"{name}: object = field(default=None)" for name in NAMES))


def failures(text: str, skip: frozenset[str] = frozenset()) -> list[str]:
    found = rewrite(source("sdpo_config", text), (1, 16, 0), skip=skip).failed
    assert {outcome.patch for outcome in found} <= {ENGINE_USE}
    return [outcome.reason for outcome in found]


def test_a_config_with_all_fields_is_clean():
    assert failures(CONFIG) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_renamed_field_is_drift(name: str):
    (reason,) = failures(CONFIG.replace(f"    {name}:", f"    renamed_{name}:"))
    assert reason.startswith(
        f"the config has no field `{name}`, which hooks rely on (the nearest that is there: `renamed_{name}`); "
        "hooks have to learn the new name; "
    )


def test_another_field_that_hooks_know_is_not_taken_for_a_renamed_one():
    (reason,) = failures(CONFIG.replace("    vllm_server_host: object = field(default=None)\n", ""))
    assert reason.startswith("the config has no field `vllm_server_host`, which hooks rely on; ")


def test_a_field_in_a_docstring_or_a_method_is_none():
    text = CONFIG.replace("    use_vllm: object = field(default=None)", '    """use_vllm: bool"""')
    assert failures(text + "        use_vllm: bool = True\n")


def test_fields_of_rollouts_do_not_matter_where_rollouts_are_left_to_trl():
    assert failures(CONFIG.replace("use_vllm", "rollout_backend"), frozenset({"live_adapter"})) == []


TRAINER = """\
class GRPOTrainer(_BaseTrainer):
    def __init__(self, model, reward_funcs, args=None, rollout_func=None):
        self.use_vllm = args.use_vllm
        self.vllm_mode = args.vllm_mode
        self.rollout_func = rollout_func
        self.vllm_generation = VLLMGeneration(model=self.model)
"""


@pytest.mark.parametrize(
    ("old", "new", "lost"),
    [
        ("args.use_vllm", "args.backend == 'vllm'", "no longer reads `args.use_vllm`"),
        ("args.vllm_mode", "args.vllm_placement", "no longer reads `args.vllm_mode`"),
        ("self.vllm_generation =", "self.generation =", "no longer sets `self.vllm_generation`"),
    ],
)
def test_a_trainer_that_goes_by_other_names_is_drift(old: str, new: str, lost: str):
    assert [o.reason for o in rewrite(source("grpo", TRAINER), (1, 16, 0)).failed] == []
    found = rewrite(source("grpo", TRAINER.replace(old, new)), (1, 16, 0)).failed
    assert any(lost in outcome.reason for outcome in found), found


def test_tables_name_targets_and_have_something_in_every_release_with_an_engine():
    for table in (FIELDS, READ, SET):
        for target, ranges in table.items():
            starts = [str(location.trl).split(",")[0] for location in TARGETS[target].locations]
            assert all(ReleaseRange(trl) for trl in ranges)
            first = parse_release(min(starts, key=lambda text: parse_release(text.strip(">="))).strip(">="))
            assert any(first in ReleaseRange(trl) for trl in ranges), target
    configs = {target.name for target in TARGETS.values() if target.kind == "config"}
    trainers = {target.name for target in TARGETS.values() if target.kind == "trainer"}
    assert set(FIELDS) == configs
    assert set(READ) == trainers
    assert set(SET) == trainers | {"vllm_generation"}


def test_a_target_without_its_class_has_lost_every_name():
    lost = [use.what for use in lost_names("sdpo_config", (1, 16, 0), ("SDPOConfig",), outline("x = 1", ()))]
    assert len(lost) == len(NAMES)
