"""The Ray cluster: joined where one runs, else started on this host with the GPUs that training leaves."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from trlpatch.errors import ClusterTimeout, NotEnoughResources, RayNotInstalled
from trlpatch.log import logger
from trlpatch.options import read_launcher
from trlpatch.ray.bounded import bounded
from trlpatch.ray.environment import RAY_DEFAULTS
from trlpatch.ray.plan import Need, Node
from trlpatch.ray.timeouts import Timeouts
from trlpatch.versions import pip_install

_DEVICES = "CUDA_VISIBLE_DEVICES"

_started_here = False


def started_here() -> bool:
    """Was the cluster started by this process, with the trainer's GPU left out?"""
    return _started_here


def import_ray() -> Any:
    """Ray, or RayNotInstalled."""
    try:
        import ray
    except ImportError as error:
        raise RayNotInstalled(
            f"rollout engines on Ray actors need Ray, which cannot be imported ({error}): {pip_install('ray')}"
        ) from error
    return ray


def join(options: Mapping[str, Any] | None = None, limits: Timeouts | None = None) -> Any:
    """Join the cluster that RAY_ADDRESS names or that this process has joined already, else start one on this host.

    `options` are `ray.init`'s. A cluster that is started here has this host's GPUs but for the one that this process
    trains on; where a cluster runs already, its nodes say what they have.

    Raises:
        RayNotInstalled: Ray is missing.
        NotEnoughResources: this process is one of several ranks and there is no common cluster.
        ClusterTimeout: Ray did not come up, or did not answer, within `limits.cluster` seconds.
        InvalidOption: WORLD_SIZE is no number.
    """
    global _started_here
    ray = import_ray()
    if ray.is_initialized():
        return ray
    options = dict(options or {})
    if os.environ.get("RAY_ADDRESS") or options.get("address"):
        where = options.get("address") or os.environ["RAY_ADDRESS"]
        _init(ray, f"joining the Ray cluster at {where}", {"log_to_driver": True, **options}, limits)
        return ray
    ranks = read_launcher("WORLD_SIZE", 1)
    if ranks > 1:
        raise NotEnoughResources(
            f"create_engines: this process is rank {os.environ.get('RANK', '?')} of {ranks}, and each would start a "
            "Ray cluster of its own with the same GPUs; expected one cluster for all: ray start --head (with "
            f"{_DEVICES} set to the GPUs for rollouts), and RAY_ADDRESS=auto for every rank; each has engines of its "
            "own then"
        )
    free = _rollout_devices()
    given: dict[str, Any] = {"include_dashboard": False}
    if free is not None:
        given["num_gpus"] = len(free)
    with _environment({**RAY_DEFAULTS, **({} if free is None else {_DEVICES: ",".join(free)})}):
        _init(ray, "starting a Ray cluster on this host", {**given, **options}, limits)
    _started_here = True
    return ray


def _init(ray: Any, what: str, options: Mapping[str, Any], limits: Timeouts | None) -> None:
    """`ray.init`, bounded, which means in a thread; what Ray does in the main thread only is done here."""
    if threading.current_thread() is threading.main_thread():
        # Ray ends with the process on SIGTERM, by atexit; `ray.init` sets this in the main thread alone.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
    log = logging.getLogger("ray._private.worker")
    log.addFilter(_not_of_sigterm)
    try:
        bounded(what, lambda: ray.init(**options), limits)
    finally:
        log.removeFilter(_not_of_sigterm)


def _not_of_sigterm(record: logging.LogRecord) -> bool:
    return "SIGTERM handler is not set" not in str(record.msg)


def leave(limits: Timeouts | None = None) -> None:
    """Stop the cluster that was started here; one that was joined goes on.

    One that does not stop within `limits.cluster` seconds is left to the end of this process, with a warning.
    """
    global _started_here
    if _started_here:
        _started_here = False
        ray = import_ray()
        try:
            bounded("ending the Ray cluster of this process", ray.shutdown, limits)
        except ClusterTimeout as error:
            atexit.unregister(ray.shutdown)  # which would be waited for again
            logger.warning("%s. What Ray has started ends with this process", error)


def nodes(limits: Timeouts | None = None) -> list[Node]:
    """The hosts of the cluster that are alive, with what is free on each.

    Raises:
        ClusterTimeout: Ray did not answer within `limits.cluster` seconds.
    """
    found: list[Node] = bounded("asking the Ray cluster for its nodes", _nodes, limits)
    return found


def _nodes() -> list[Node]:
    ray = import_ray()
    alive = [node for node in ray.nodes() if node["Alive"]]
    free = _free_by_node(ray, alive)
    return [
        Node(
            str(node.get("NodeManagerAddress", "?")),
            node["Resources"].get("GPU", 0.0),
            node["Resources"].get("CPU", 0.0),
            free[node["NodeID"]].get("GPU", 0.0),
            free[node["NodeID"]].get("CPU", 0.0),
        )
        for node in alive
    ]


def _free_by_node(ray: Any, alive: list[Any]) -> dict[str, dict[str, float]]:
    if len(alive) == 1:
        return {alive[0]["NodeID"]: ray.available_resources()}
    try:  # no public call says it by node
        found: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()
        return {node["NodeID"]: found.get(node["NodeID"], {}) for node in alive}
    except Exception as error:
        logger.debug("what is free on each node of the Ray cluster is not known: %r", error)
        return {node["NodeID"]: node["Resources"] for node in alive}


def placed(ray: Any, engines: int, need: Need, timeout: float, limits: Timeouts | None = None) -> Any:
    """Reserve a bundle for each engine, close together.

    Raises:
        NotEnoughResources: Ray does not give them.
        ClusterTimeout: it does not answer within `limits.cluster` seconds.
    """
    group = bounded(
        "reserving resources for rollout engines",
        lambda: ray.util.placement_group([need.bundle] * engines, strategy="PACK"),
        limits,
    )
    ready, _ = ray.wait([group.ready()], timeout=timeout)
    if not ready:
        ray.util.remove_placement_group(group)
        raise NotEnoughResources(
            f"create_engines: Ray did not reserve {engines} times {need.bundle} in {timeout:g} s, though that much "
            "was free; others may have taken it: ray status says what runs"
        )
    return group


def on_devices() -> bool:
    """Do engines run on GPUs? Not with vLLM built for CPUs, whatever torch it runs on."""
    from vllm.platforms import current_platform

    return not current_platform.is_cpu()


def trainer_device() -> str | None:
    """The GPU that this process trains on, as CUDA_VISIBLE_DEVICES names it; None where there is none."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        return None
    place = torch.cuda.current_device() if torch.cuda.is_initialized() else read_launcher("LOCAL_RANK", 0)
    devices = _visible(count)
    return devices[place] if place < len(devices) else None


def _visible(count: int) -> list[str]:
    named = os.environ.get(_DEVICES)
    return [one.strip() for one in named.split(",")] if named else [str(place) for place in range(count)]


def _rollout_devices() -> list[str] | None:
    """The GPUs of this host that training leaves; None where there is none at all."""
    import torch

    trainer = trainer_device()
    return None if trainer is None else [one for one in _visible(torch.cuda.device_count()) if one != trainer]


def host() -> str:
    """The address of this host, as Ray knows it."""
    return str(import_ray().util.get_node_ip_address())


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """For the time of a `with`; but for the devices, what the user has set stays."""
    before = {name: os.environ.get(name) for name in values}
    for name, value in values.items():
        if name == _DEVICES or name not in os.environ:
            os.environ[name] = value
    try:
        yield
    finally:
        for name, was in before.items():
            if was is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = was
