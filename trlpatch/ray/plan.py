"""Resource plan: do the engines fit into the cluster, and if not, what is missing. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trlpatch.errors import NotEnoughResources


@dataclass(frozen=True)
class Node:
    """One host of a Ray cluster."""

    address: str
    gpus: float
    cpus: float
    free_gpus: float
    free_cpus: float


@dataclass(frozen=True)
class Need:
    """What one engine takes; all of it on one node."""

    gpus: int
    cpus: int

    @property
    def bundle(self) -> dict[str, float]:
        """For a placement group."""
        return {name: float(count) for name, count in (("GPU", self.gpus), ("CPU", self.cpus)) if count}


def fitting(nodes: Sequence[Node], need: Need, *, free: bool = True) -> int:
    """How many engines fit, each whole on a node; into what is free, or into all that there is."""
    return sum(_on(node, need, free) for node in nodes)


def _on(node: Node, need: Need, free: bool) -> int:
    gpus, cpus = (node.free_gpus, node.free_cpus) if free else (node.gpus, node.cpus)
    rooms = [int(have // want) for have, want in ((gpus, need.gpus), (cpus, need.cpus)) if want]
    return min(rooms, default=0)


def require_room(nodes: Sequence[Node], engines: int, need: Need, *, trainer: str | None = None) -> None:
    """See that `engines` engines fit into what is free; `trainer` is a GPU that was left out for training.

    Raises:
        NotEnoughResources: they do not; the message says what is missing and what would fit.
    """
    room = fitting(nodes, need)
    if room >= engines:
        return
    what = "GPU" if need.gpus and _lacks_gpus(nodes, engines, need) else "CPU"
    each = need.gpus if what == "GPU" else need.cpus
    has = sum(node.gpus if what == "GPU" else node.cpus for node in nodes)
    free = sum(node.free_gpus if what == "GPU" else node.free_cpus for node in nodes)
    wants = (
        f"create_engines: {_count(engines, 'engine')} of {_count(each, what)} each "
        f"{'needs' if engines == 1 else 'need'} {_count(engines * each, what)}, and the Ray cluster has {has:g}, of "
        f"which {free:g} {'is' if free == 1 else 'are'} free ({_nodes(nodes, what)})"
    )
    said = [wants]
    if what == "GPU" and trainer is not None:
        said.append(f"GPU {trainer} trains and is not counted")
    if free >= engines * each:
        said.append(f"an engine needs its {_count(each, what)} on one node, so {room} fit")
    ways = [f"num_engines={room}"] if room else []
    if what == "GPU" and each > 1:
        ways.append(f"a tensor_parallel_size below {each}")
    if fitting(nodes, need, free=False) >= engines:
        ways.append("end what else runs on the cluster (ray status)")
    ways.append("add a node: ray start --address=...")
    if what == "CPU":
        ways.append("say how many CPUs Ray may count on: ray.init(num_cpus=...) before create_engines")
    said.append("; or ".join(ways))
    raise NotEnoughResources("; ".join(said))


def _lacks_gpus(nodes: Sequence[Node], engines: int, need: Need) -> bool:
    return fitting(nodes, Need(need.gpus, 0)) < engines


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}{'' if number == 1 else 's'}"


def _nodes(nodes: Sequence[Node], what: str) -> str:
    counts = [
        f"{node.address}: {node.free_gpus if what == 'GPU' else node.free_cpus:g} of "
        f"{node.gpus if what == 'GPU' else node.cpus:g}"
        for node in nodes
    ]
    return ", ".join(counts[:8]) + (f" and {len(counts) - 8} more nodes" if len(counts) > 8 else "") or "no nodes"


def require_others(trainer: tuple[str, str], engines: Sequence[tuple[str, Sequence[str]]]) -> None:
    """See that no engine has the GPU that this process trains on.

    `trainer` is the address of its host and its GPU, `engines` those of each engine; GPUs as CUDA_VISIBLE_DEVICES
    names them.

    Raises:
        NotEnoughResources: one has it.
    """
    host, device = trainer
    for index, (node, devices) in enumerate(engines):
        if node == host and device in devices:
            raise NotEnoughResources(
                f"create_engines: Ray gave engine {index} GPU {device} of {host}, which this process trains on; "
                "expected the cluster to leave it out: start Ray on this host without it, "
                "CUDA_VISIBLE_DEVICES=<the other GPUs> ray start ..."
            )
