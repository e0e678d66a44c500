"""Unsloth's `finetune_*` switches as PEFT's targets, on a model of names alone. Needs no torch."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from trlpatch.errors import ConflictingArguments
from trlpatch.loading.lora_targets import LINEARS, take_switches


class Linear:
    in_features = 4


class Norm:
    pass


HEAD = Linear()
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


class Model:
    """Two layers; with `both`, a layer name that attention and MLP have in common."""

    def __init__(self, both: bool = False) -> None:
        self.config = SimpleNamespace(num_hidden_layers=2)
        self._both = both

    def get_output_embeddings(self) -> Linear:
        return HEAD

    def named_modules(self) -> list[tuple[str, object]]:
        paths = [f"self_attn.{name}" for name in ATTENTION] + [f"mlp.{name}" for name in MLP]
        if self._both:
            paths += ["self_attn.dense", "mlp.dense"]
        layers = [(f"model.layers.{index}.{path}", Linear()) for index in (0, 1) for path in paths]
        others = [("model.embed_tokens", Norm()), ("model.layers.0.self_attn.q_norm", Norm()), ("lm_head", HEAD)]
        return [*layers, *others]


def taken(targets: Any = LINEARS, *, both: bool = False, **switches: Any) -> dict[str, Any]:
    targets = list(targets) if isinstance(targets, tuple) else targets
    return take_switches(Model(both), {"r": 8, "target_modules": targets, **switches})


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"finetune_vision_layers": False, "finetune_audio_layers": False},
        {"finetune_vision_layers": True, "finetune_language_layers": True},
        {"finetune_attention_modules": True, "finetune_mlp_modules": True, "finetune_last_n_layers": None},
    ],
)
def test_what_asks_for_everything_leaves_the_targets(switches: dict[str, Any]) -> None:
    assert taken(**switches) == {"r": 8, "target_modules": list(LINEARS)}
    assert taken("all-linear", **switches)["target_modules"] == "all-linear"


@pytest.mark.parametrize("targets", [LINEARS, "all-linear", None, r".*\.(q|k|v|o|gate|up|down)_proj"])
def test_modules_of_one_kind_are_left_out(targets: Any) -> None:
    assert taken(targets, finetune_mlp_modules=False)["target_modules"] == sorted(ATTENTION)
    assert taken(targets, finetune_attention_modules=False)["target_modules"] == sorted(MLP)


def test_targets_are_narrowed_not_widened() -> None:
    assert taken(("q_proj", "up_proj"), finetune_mlp_modules=False)["target_modules"] == ["q_proj"]


def test_a_name_of_both_kinds_is_given_by_its_paths() -> None:
    targets = taken(("q_proj", "dense"), both=True, finetune_mlp_modules=False)["target_modules"]
    assert targets == ["q_proj", "model.layers.0.self_attn.dense", "model.layers.1.self_attn.dense"]


def test_the_last_layers() -> None:
    assert taken(finetune_last_n_layers=1)["layers_to_transform"] == [1]


@pytest.mark.parametrize(
    ("switches", "says"),
    [
        ({"finetune_attention_modules": False, "finetune_mlp_modules": False}, "leave nothing to adapt"),
        ({"finetune_language_layers": False}, "a text model has language layers only"),
        ({"finetune_language_layers": False, "finetune_vision_layers": True}, "set it to True"),
        ({"finetune_mlp_modules": None}, "finetune_mlp_modules=None: expected True or False"),
        ({"finetune_last_n_layers": 3}, "expected a whole number from 1 to 2"),
        ({"finetune_last_n_layers": 1, "layers_to_transform": [0]}, "both say which layers"),
    ],
)
def test_what_cannot_be_followed(switches: dict[str, Any], says: str) -> None:
    with pytest.raises(ConflictingArguments, match=says):
        taken(**switches)


def test_targets_of_which_nothing_is_left() -> None:
    with pytest.raises(ConflictingArguments, match=r"finetune_mlp_modules=False leaves none of .*up_proj"):
        taken(("up_proj",), finetune_mlp_modules=False)


@pytest.mark.parametrize("targets", [["up_proj", "embed_tokens", "lm_head"], ".*(up_proj|embed_tokens|lm_head)"])
def test_modules_of_neither_kind_that_are_named_stay(targets: Any) -> None:
    assert taken(targets, finetune_attention_modules=False)["target_modules"] == ["embed_tokens", "lm_head", "up_proj"]
    assert taken(targets, finetune_mlp_modules=False)["target_modules"] == ["embed_tokens", "lm_head"]


# Models with a vision tower.


class TextConfig:
    num_hidden_layers = 2


class VisionModel(Model):
    """Two language layers and a tower whose block has a layer of the same name, and a connector."""

    def __init__(self) -> None:
        super().__init__()
        text = TextConfig()
        self.config = SimpleNamespace(vision_config=object(), get_text_config=lambda: text)
        self._text = text

    def named_modules(self) -> list[tuple[str, object]]:
        text = [
            (path.replace("model.", "model.language_model."), module)
            for path, module in super().named_modules()
            if path != "lm_head"
        ]
        tower = [f"model.visual.blocks.0.{path}" for path in ("attn.qkv", "attn.q_proj", "mlp.up_proj")]
        language = SimpleNamespace(config=self._text)
        others = [*((path, Linear()) for path in tower), ("model.visual.merger.0", Linear()), ("lm_head", HEAD)]
        return [("model.language_model", language), *text, *others]


def adapted(targets: Any = LINEARS, *, tower: bool = False, **switches: Any) -> set[str]:
    """The modules that PEFT adapts, `model.language_model.layers.` as `L.` and `model.visual.` as `V.`."""
    model = VisionModel()
    settings = take_switches(model, {"target_modules": targets, **switches}, tower=tower)
    assert settings.keys() == {"target_modules"}
    matches = re.compile(settings["target_modules"]).fullmatch
    return {
        path.replace("model.language_model.layers.", "L.").replace("model.visual.", "V.")
        for path, _ in model.named_modules()
        if matches(path)
    }


LANGUAGE_ATTENTION = {f"L.{index}.self_attn.{name}" for index in (0, 1) for name in ATTENTION}
LANGUAGE_MLP = {f"L.{index}.mlp.{name}" for index in (0, 1) for name in MLP}
LANGUAGE = LANGUAGE_ATTENTION | LANGUAGE_MLP
TOWER_ATTENTION, TOWER_MLP = {"V.blocks.0.attn.qkv", "V.blocks.0.attn.q_proj"}, {"V.blocks.0.mlp.up_proj"}
TOWER = TOWER_ATTENTION | TOWER_MLP | {"V.merger.0"}


@pytest.mark.parametrize("targets", [LINEARS, None, "all-linear"])
def test_the_tower_is_adapted_where_rollouts_can_carry_it(targets: Any) -> None:
    assert adapted(targets) == adapted(targets, finetune_vision_layers=False, tower=True) == LANGUAGE
    assert adapted(targets, tower=True) == LANGUAGE | TOWER
    assert adapted(targets, tower=True, finetune_language_layers=False) == TOWER


def test_attention_and_mlp_of_both_parts() -> None:
    assert adapted(finetune_mlp_modules=False) == LANGUAGE_ATTENTION
    assert adapted(finetune_attention_modules=False) == LANGUAGE_MLP
    both = adapted(finetune_attention_modules=False, finetune_vision_layers=True, tower=True)
    assert both == LANGUAGE_MLP | TOWER_MLP | {"V.merger.0"}


@pytest.mark.parametrize("targets", [["q_proj"], r".*\.q_proj"])
def test_a_name_that_both_parts_have(targets: Any) -> None:
    language = {"L.0.self_attn.q_proj", "L.1.self_attn.q_proj"}
    assert adapted(targets) == language
    assert adapted(targets, tower=True) == language | {"V.blocks.0.attn.q_proj"}


def test_layers_are_the_language_models() -> None:
    last = {path for path in LANGUAGE if path.startswith("L.1.")}
    assert adapted(finetune_last_n_layers=1) == adapted(layers_to_transform=[1]) == last
    assert adapted(finetune_last_n_layers=1, tower=True) == last | TOWER


@pytest.mark.parametrize(
    ("switches", "says"),
    [
        (
            {"finetune_vision_layers": True},
            "the engine has LoRA on the language model only; load the model with enable",
        ),
        ({"finetune_language_layers": False}, "finetune_vision_layers=False and what else was given leave no layer"),
        ({"targets": ["qkv"]}, r"leave no layer of target_modules=\['qkv'\] to adapt"),
    ],
)
def test_parts_that_cannot_be_adapted(switches: dict[str, Any], says: str) -> None:
    with pytest.raises(ConflictingArguments, match=says):
        adapted(**switches)
