"""Arguments that are gone, on small packages named `transformers` and `trl`: with compat="on", "off", and undone."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import os
import pickle
import sys
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest

from trlpatch import errors
from trlpatch.options import Options
from trlpatch.runtime import compat, session
from trlpatch.runtime.compat.removed import TABLE
from trlpatch.trl_names import CORRECTION, CORRECTION_LEFT_OUT


@pytest.mark.parametrize(("ratio", "steps"), [(0.0, 0), (0.1, 0.1), (1, 1 - 2**-53)])
def test_warmup_ratio_is_a_fraction_of_warmup_steps(accepting, ratio, steps, caplog):
    for cls in (accepting.TrainingArguments, accepting.GRPOConfig, accepting.SFTConfig):
        made = cls(warmup_ratio=ratio)
        assert made.warmup_steps == made.seen["warmup_steps"] == steps
        assert f"{cls.__name__}(warmup_ratio=...): warmup_steps={ratio} is set" in caplog.text
    assert "write warmup_steps, a ratio below 1" in caplog.text


def test_whole_warmup_steps_win_over_a_ratio_and_fractions_do_not(accepting):
    assert accepting.SFTConfig(warmup_ratio=0.1, warmup_steps=7).warmup_steps == 7
    assert accepting.SFTConfig(warmup_ratio=0.1, warmup_steps=0.5).warmup_steps == 0.1
    with pytest.raises(ValueError, match=r"warmup_ratio=1\.5: expected a number from 0 to 1"):
        accepting.SFTConfig(warmup_ratio=1.5)


def test_it_is_said_once(accepting, caplog):
    for _ in range(3):
        accepting.SFTConfig(max_seq_length=3)
    assert caplog.text.count("max_seq_length") == 1
    assert compat.describe()[1:] == [
        "SFTConfig(max_seq_length=...): max_length=3 is set. Gone since TRL 0.20; write max_length"
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"evaluation_strategy": "steps"}, {"eval_strategy": "steps"}),
        ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
        ({"group_by_length": False}, {"train_sampling_strategy": "random"}),
        ({"per_gpu_train_batch_size": 16}, {"per_device_train_batch_size": 16}),
        ({"use_liger_loss": True}, {"use_liger_kernel": True}),
        ({"include_inputs_for_metrics": True}, {"include_for_metrics": ["inputs"]}),
        ({"overwrite_output_dir": True, "save_safetensors": True}, {}),
    ],
)
def test_values_go_to_the_fields_of_today(accepting, given, expected):
    made = accepting.GRPOConfig("place", **given)
    assert made.output_dir == "place"
    assert {name: made.seen[name] for name in expected} == expected
    assert all(getattr(made, name) is None for name in given)


def test_what_cannot_be_done_is_an_error(accepting):
    with pytest.raises(ValueError, match="safetensors only"):
        accepting.SFTConfig(save_safetensors=False)


@pytest.mark.parametrize("limit", [0, -1, True, 2.5])
def test_a_limit_that_cuts_nothing_or_too_little_is_an_error(accepting, limit):
    with pytest.raises(ValueError, match=rf"max_prompt_length={limit}: expected a whole number of at least 1"):
        accepting.GRPOConfig(max_prompt_length=limit)


def test_logging_dir_is_where_tensorboard_looks(accepting, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "elsewhere")
    accepting.SFTConfig(logging_dir="here")
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "here"


def _left_out(config: Any) -> bool:
    return CORRECTION_LEFT_OUT in vars(config)


def test_a_config_knows_whether_the_correction_was_left_out(accepting):
    made = accepting.GRPOConfig("place", warmup_ratio=0.1)
    assert _left_out(made)
    assert _left_out(copy.deepcopy(made))
    assert CORRECTION_LEFT_OUT not in made.to_dict()
    for given in (True, False):
        assert not _left_out(accepting.GRPOConfig(vllm_importance_sampling_correction=given))
    everything = [field.default for field in dataclasses.fields(accepting.GRPOConfig) if not field.kw_only]
    assert not _left_out(accepting.GRPOConfig(*everything[:6], [], *everything[7:]))
    assert not _left_out(dataclasses.replace(made)), "which gives every field"
    made.num_generations = 4
    assert _left_out(made)
    made.vllm_importance_sampling_correction = True
    assert not _left_out(made), "somebody has said what is wanted"
    assert not _left_out(accepting.SFTConfig())


def test_what_a_class_of_the_users_says_of_the_correction_was_not_left_out(accepting):
    @dataclasses.dataclass
    class Own(accepting.GRPOConfig):
        mine: int = 0

    @dataclasses.dataclass
    class Default(accepting.GRPOConfig):
        vllm_importance_sampling_correction: bool = True

    @dataclasses.dataclass
    class Afterwards(accepting.GRPOConfig):
        def __post_init__(self):
            super().__post_init__()
            self.vllm_importance_sampling_correction = True

    class Passing(accepting.GRPOConfig):
        def __init__(self, correction: bool | None, **given: Any):
            super().__init__(**given, **{} if correction is None else {CORRECTION: correction})

    @dataclasses.dataclass
    class Written(accepting.GRPOConfig):
        def __init__(self, vllm_importance_sampling_correction: bool = True):
            super().__init__(vllm_importance_sampling_correction=vllm_importance_sampling_correction)

    compat.install("off")
    compat.install("on")  # classes that are there already
    assert _left_out(Own())
    assert _left_out(Passing(None))
    assert not any(map(_left_out, (Default(), Afterwards(), Passing(True), Written())))


def test_undone_no_config_says_what_was_left_out(accepting):
    wrapped = accepting.GRPOConfig.__init__
    assert "__setattr__" in vars(accepting.GRPOConfig)
    compat.remove()
    assert not _left_out(accepting.GRPOConfig())
    kept_by_others = object.__new__(accepting.GRPOConfig)
    wrapped(kept_by_others)
    assert not _left_out(kept_by_others)
    assert "__setattr__" not in vars(accepting.GRPOConfig)


def test_a_field_that_upstream_has_is_left_to_it(accepting):
    names = {one.name for one in dataclasses.fields(accepting.TrainingArguments)}
    assert "no_cuda" not in names, "there is no use_cpu to move it to"
    assert accepting.SFTConfig(max_length=3).max_length == 3


def test_copies_pickles_and_classes_made_from_it_know_the_field(accepting):
    made = accepting.GRPOConfig(max_prompt_length=64, warmup_ratio=0.5, generation_batch_size=8)
    for twin in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made)), dataclasses.replace(made)):
        assert (twin.max_prompt_length, twin.warmup_steps) == (64, 0.5)
        assert twin.to_dict()["max_prompt_length"] == 64
    assert dataclasses.replace(made, warmup_ratio=0.25).warmup_steps == 0.25
    assert dataclasses.replace(made, warmup_steps=0.25).warmup_steps == 0.25

    @dataclasses.dataclass
    class Mine(accepting.GRPOConfig):
        extra: int = 3

    assert Mine("place", max_prompt_length=5, extra=4, warmup_ratio=0.5).warmup_steps == 0.5
    assert "max_prompt_length" in inspect.signature(accepting.GRPOConfig).parameters
    assert get_type_hints(accepting.GRPOConfig)["max_prompt_length"] == (int | None)


def test_classes_made_before_know_it_too(upstream):
    @dataclasses.dataclass
    class Mine(upstream.GRPOConfig):
        extra: int = 3

    before = dict(vars(Mine))
    compat.install("on")
    assert Mine(max_prompt_length=5, extra=4).max_prompt_length == 5
    compat.remove()
    assert dict(vars(Mine)) == before
    with pytest.raises(TypeError, match="max_prompt_length"):
        Mine(max_prompt_length=5)


@pytest.mark.parametrize("given", [{"max_prompt_length": 3}, {"warmup_ratio": 0.5}, {"nonsense": 3}])
def test_undone_everything_is_as_it_was(accepting, given):
    @dataclasses.dataclass
    class Mine(accepting.GRPOConfig):
        extra: int = 3

    compat.remove()
    assert not any(hasattr(meta, "_tell_after") for meta in sys.meta_path)
    for cls in (accepting.GRPOConfig, Mine):
        names = {one.name for one in dataclasses.fields(cls)}
        assert names.isdisjoint({"max_prompt_length", "warmup_ratio"})
        assert not hasattr(cls, "max_prompt_length")
        with pytest.raises(TypeError, match=next(iter(given))) as raised:
            cls(**given)
        assert not hasattr(raised.value, "__notes__")
    assert Mine("place", extra=4).extra == 4
    with pytest.raises(TypeError, match="tokenizer"):
        accepting.SFTTrainer("model", tokenizer=1)
    assert accepting.PreTrainedTokenizerBase().apply_chat_template([]) == {"input_ids": [1, 2]}
    assert accepting.GRPOTrainer("model", args=SimpleNamespace(max_prompt_length=1))._tokenize_prompts(["ab"])[0] == [
        [0, 1]
    ]


@pytest.mark.parametrize("early", [True, False])
def test_off_upstreams_error_names_what_to_write(upstream, early):
    if early:
        upstream.import_all()
    compat.install("off")
    with pytest.raises(TypeError, match="unexpected keyword argument 'warmup_ratio'") as raised:
        upstream.GRPOConfig(warmup_ratio=0.1, max_prompt_length=3)
    first, second = raised.value.__notes__
    assert "gone since transformers 5 (#41326); write warmup_steps" in first
    assert "gone since TRL 0.28" in second
    assert 'trlpatch.PatchFastRL(compat="on")' in first
    with pytest.raises(TypeError, match="'tokenizer'") as raised:
        upstream.SFTTrainer("model", tokenizer=1)
    assert "write processing_class" in raised.value.__notes__[0]
    assert compat.describe() == []
    assert upstream.PreTrainedTokenizerBase().apply_chat_template([]) == {"input_ids": [1, 2]}
    with pytest.raises(ValueError, match="divisible"):
        upstream.GRPOConfig(num_generations=3)


def test_names_that_upstream_never_had_and_errors_inside_are_left_alone(accepting):
    with pytest.raises(TypeError, match="nonsense") as raised:
        accepting.GRPOConfig(nonsense=3)
    assert not hasattr(raised.value, "__notes__")
    with pytest.raises(TypeError, match="inside") as raised:
        accepting.SFTTrainer("bad", tokenizer=1)
    assert not hasattr(raised.value, "__notes__")


def test_a_config_that_passes_arguments_on_is_explained_once(upstream):
    @dataclasses.dataclass(init=False)
    class Mine(upstream.GRPOConfig):
        extra: int = 3

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)

    compat.install("on")
    with pytest.raises(TypeError, match="fp16_backend") as raised:
        Mine(fp16_backend="auto")
    assert len(raised.value.__notes__) == 1


def test_what_compat_does_not_do_is_explained(accepting):
    with pytest.raises(TypeError, match="fp16_backend") as raised:
        accepting.GRPOConfig(fp16_backend="auto")
    assert raised.value.__notes__ == [
        "GRPOConfig(fp16_backend=...): gone since transformers 5; write nothing: it is gone"
    ]


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({"per_device_train_batch_size": 1, "num_generations": 6}, 6),
        ({"per_device_train_batch_size": 1, "num_generations": 4, "gradient_accumulation_steps": 4}, 1),
        ({"per_device_train_batch_size": 3, "num_generations": 4, "steps_per_generation": 2}, 4),
        ({"per_device_train_batch_size": 2, "num_generations": 4, "steps_per_generation": 2}, 2),
    ],
)
def test_a_batch_that_cuts_groups_is_raised_as_unsloth_does(accepting, given, size, caplog):
    assert accepting.GRPOConfig(**given).per_device_train_batch_size == size
    assert (f"is raised to num_generations={size}" in caplog.text) is (size != given["per_device_train_batch_size"])


def test_a_batch_size_counts_ranks_and_a_given_generation_batch_is_upstreams(accepting, monkeypatch):
    with pytest.raises(ValueError, match="divisible"):
        accepting.GRPOConfig(num_generations=3, generation_batch_size=8)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="divisible"):  # this small TRL counts no ranks
        accepting.GRPOConfig(num_generations=3, per_device_train_batch_size=1)


def test_tokenizer_is_processing_class(accepting, caplog):
    for cls in (accepting.Trainer, accepting.GRPOTrainer, accepting.SFTTrainer):
        assert cls("model", tokenizer="words").processing_class == "words"
        assert f"{cls.__name__}(tokenizer=...): processing_class is set" in caplog.text

    class Mine(accepting.SFTTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    assert Mine("model", tokenizer="words").processing_class == "words"
    with pytest.raises(TypeError, match="both tokenizer= and processing_class="):
        accepting.SFTTrainer("model", None, "others", tokenizer="words")


def test_fields_that_sft_trainer_took(accepting):
    args = accepting.SFTConfig("place", warmup_ratio=0.5)
    made = accepting.SFTTrainer("model", args, max_seq_length=7, packing=True).args
    assert (made.max_length, made.packing, made.warmup_steps, made.output_dir) == (7, True, 0.5, "place")
    assert (args.max_length, args.packing) == (1024, False)
    plain = accepting.TrainingArguments("place")
    plain.hub_token = None
    with pytest.raises(TypeError, match="hub_token"):  # this small one has no such field: TRL's way is taken
        accepting.SFTTrainer("model", plain, packing=True)
    with pytest.raises(TypeError, match="pass args=SFTConfig"):
        accepting.SFTTrainer("model", packing=True)


def test_chat_templates_return_ids_unless_a_library_asks(accepting, caplog):
    words = accepting.PreTrainedTokenizerBase()
    assert words.apply_chat_template([]) == words.apply_chat_template([], None, True) == [1, 2]
    assert "PreTrainedTokenizerBase.apply_chat_template(tokenize=...): a list of ids is returned" in caplog.text
    assert words.apply_chat_template([], tokenize=False) == "text"
    assert words.apply_chat_template([], return_dict=True) == {"input_ids": [1, 2]}
    assert words.apply_chat_template([], return_assistant_tokens_mask=True) == {"input_ids": [1, 2]}
    library: dict[str, Any] = {"__name__": "trl.trainer.sft_trainer", "words": words}
    exec("found = words.apply_chat_template([])", library)
    assert library["found"] == {"input_ids": [1, 2]}


def test_prompts_are_cut_where_the_trainer_does_not_read_the_limit(accepting):
    args = accepting.GRPOConfig(max_prompt_length=2)
    assert accepting.GRPOTrainer("model", args=args)._tokenize_prompts(["abcd", "x"])[0] == [[2, 3], [0]]
    args = accepting.GRPOConfig()
    assert accepting.GRPOTrainer("model", args=args)._tokenize_prompts(["abcd"])[0] == [[0, 1, 2, 3]]


def test_each_name_is_there_once_per_owner():
    pairs = [(owner, one.name) for one in TABLE for owner in one.owners]
    assert len(pairs) == len(set(pairs))


def test_prompts_of_a_release_that_leaves_tokens_to_others_are_cut_while_it_generates(accepting, caplog):
    compat.remove()
    words = SimpleNamespace(truncation_side="right")
    trainer = accepting.GRPOTrainer
    del trainer._tokenize_prompts
    trainer._generate_single_turn = lambda self, prompts: self.processing_class
    compat.install("on")
    made = trainer("model", args=accepting.GRPOConfig(max_prompt_length=2), processing_class=words)
    assert made._generate_single_turn([]) is not words
    assert made.processing_class is words
    assert "GRPOTrainer: prompts are cut from the left to args.max_prompt_length=2 tokens" in caplog.text
    made.args = accepting.GRPOConfig()
    assert made._generate_single_turn([]) is words


def test_the_option_is_checked_reported_and_can_be_changed(fake_trl, patch_grpo):
    with pytest.raises(errors.InvalidOption, match=r"PatchFastRL\(compat='yes'\): expected one of 'off', 'on'"):
        Options(compat="yes")
    report = patch_grpo()
    assert report.compat == ()
    assert report.to_dict()["compat"] == []
    report = patch_grpo(compat="on")
    assert "are accepted (docs/compat.md)" in report.compat[0]
    assert "compat     on: arguments that this TRL" in str(report)
    assert "\ncompat:\n  on: arguments that" in str(report.full())
    assert patch_grpo().compat, "a later call that does not say leaves it on"
    assert patch_grpo(compat="off").compat == ()
    patch_grpo(compat="on")
    session.revert()
    assert compat.describe() == []


def test_a_patch_that_fails_leaves_in_force_what_was(upstream):
    compat.install("on")
    with contextlib.suppress(RuntimeError), compat.undone():
        assert compat.describe() == []
        raise RuntimeError
    assert upstream.SFTConfig(max_seq_length=3).max_length == 3
    with compat.undone():
        pass
    assert compat.describe() == []
