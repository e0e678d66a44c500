"""The resource plan: what fits, and the sentence when it does not; the environment of engines."""

from __future__ import annotations

import pytest

from trlpatch.errors import NotEnoughResources
from trlpatch.ray.environment import DEFAULTS, engine_environment, engine_port
from trlpatch.ray.plan import Need, Node, fitting, require_others, require_room

TWO = [Node("10.0.0.1", 4, 32, 4, 32), Node("10.0.0.2", 4, 32, 1, 32)]


def test_an_engine_is_whole_on_one_node() -> None:
    assert fitting(TWO, Need(2, 2)) == 2
    assert fitting(TWO, Need(2, 2), free=False) == 4
    assert fitting(TWO, Need(1, 20)) == 2
    assert fitting(TWO, Need(0, 8)) == 8
    assert Need(2, 2).bundle == {"GPU": 2.0, "CPU": 2.0}
    assert Need(0, 1).bundle == {"CPU": 1.0}
    require_room(TWO, 2, Need(2, 2))


@pytest.mark.parametrize(
    ("nodes", "engines", "need", "said"),
    [
        (
            TWO,
            3,
            Need(2, 2),
            (
                "create_engines: 3 engines of 2 GPUs each need 6 GPUs, and the Ray cluster has 8, of which 5 are "
                "free (10.0.0.1: 4 of 4, 10.0.0.2: 1 of 4); num_engines=2; or a tensor_parallel_size below 2; or "
                "end what else runs on the cluster (ray status); or add a node: ray start --address=..."
            ),
        ),
        (
            [Node("10.0.0.1", 1, 8, 1, 8), Node("10.0.0.2", 1, 8, 1, 8)],
            1,
            Need(2, 2),
            (
                "create_engines: 1 engine of 2 GPUs each needs 2 GPUs, and the Ray cluster has 2, of which 2 are "
                "free (10.0.0.1: 1 of 1, 10.0.0.2: 1 of 1); an engine needs its 2 GPUs on one node, so 0 fit; a "
                "tensor_parallel_size below 2; or add a node: ray start --address=..."
            ),
        ),
        (
            [Node("10.0.0.1", 0, 2, 0, 1)],
            2,
            Need(0, 1),
            (
                "create_engines: 2 engines of 1 CPU each need 2 CPUs, and the Ray cluster has 2, of which 1 is "
                "free (10.0.0.1: 1 of 2); num_engines=1; or end what else runs on the cluster (ray status); or "
                "add a node: ray start --address=...; or say how many CPUs Ray may count on: "
                "ray.init(num_cpus=...) before create_engines"
            ),
        ),
        (
            [Node("10.0.0.1", 8, 1, 8, 1)],
            2,
            Need(1, 1),
            (
                "create_engines: 2 engines of 1 CPU each need 2 CPUs, and the Ray cluster has 1, of which 1 is "
                "free (10.0.0.1: 1 of 1); num_engines=1; or add a node: ray start --address=...; or say how many "
                "CPUs Ray may count on: ray.init(num_cpus=...) before create_engines"
            ),
        ),
    ],
)
def test_what_is_missing_is_said_exactly(nodes: list[Node], engines: int, need: Need, said: str) -> None:
    with pytest.raises(NotEnoughResources) as caught:
        require_room(nodes, engines, need)
    assert str(caught.value) == said


def test_that_the_trainers_gpu_is_not_counted_is_said() -> None:
    with pytest.raises(NotEnoughResources, match=r": 0 of 0\); GPU 0 trains and is not counted; add a node"):
        require_room([Node("10.0.0.1", 0, 8, 0, 8)], 1, Need(1, 1), trainer="0")


def test_no_engine_may_have_the_trainers_gpu() -> None:
    elsewhere = [("10.0.0.1", ["1"]), ("10.0.0.2", ["0"])]
    require_others(("10.0.0.1", "0"), elsewhere)
    with pytest.raises(NotEnoughResources, match=r"gave engine 2 GPU 0 of 10\.0\.0\.1, which this process trains on"):
        require_others(("10.0.0.1", "0"), [*elsewhere, ("10.0.0.1", ["0"])])


def test_the_users_environment_wins_over_the_defaults() -> None:
    known = frozenset(DEFAULTS)
    made = engine_environment({"VLLM_LOGGING_LEVEL": "DEBUG", "PATH": "/bin", "HF_TOKEN": "x"}, known=known)
    assert made["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert made["HF_TOKEN"] == "x"
    assert made["VLLM_USE_V1"] == "1"
    assert made["VLLM_ATTENTION_BACKEND"] == "FLASH_ATTN"
    assert "PATH" not in made


def test_variables_that_this_vllm_has_dropped_are_not_set_and_addresses_of_the_trainers_host_stay_there() -> None:
    made = engine_environment(
        {"VLLM_HOST_IP": "10.0.0.9"}, known=frozenset({"VLLM_LOGGING_LEVEL", "VLLM_ATTENTION_BACKEND"}), devices=False
    )
    assert made == {"VLLM_LOGGING_LEVEL": "WARNING"}


def test_engines_of_one_host_look_for_ports_in_different_places() -> None:
    assert [engine_port(index, {"VLLM_PORT": "20000"}) for index in range(2)] == [
        {"VLLM_PORT": "20010"},
        {"VLLM_PORT": "20020"},
    ]
    assert engine_port(0, {}) == {}
    assert engine_port(0, {"VLLM_PORT": "tcp://10.0.0.1:8000"}) == {}
