"""Fill the shards of a started cache with Ray actors, one engine each; the only user of ray.

Files are all that passes between the driver and the actors: an actor opens the cache by its URL and
commits whole shards, the driver hands out shard numbers. Placing, restarting and adding actors and
nodes is Ray's; a shard whose actor died goes to whichever actor is free next, since the one that
Ray restarts may have to wait for a node that never comes back.
"""

import contextlib
import dataclasses
import logging
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from decant.schemas import ShardPlan
from decant.storage import CacheWriter
from decant.teacher_dump.config import DumpConfig
from decant.teacher_dump.engines import EngineError
from decant.teacher_dump.job.config import RayConfig
from decant.teacher_dump.job.ray_actor import CLEAN
from decant.teacher_dump.job.ray_pool import _Pool
from decant.teacher_dump.progress import Progress, progress
from decant.teacher_dump.teacher import Teacher

log = logging.getLogger(__name__)

POLL_S = 1.0
"""How often the driver looks at actors, and the bar is drawn."""
NO_ACTOR_S = 30.0
"""How often the driver says that it waits for Ray to place the first actor."""
CONNECT_S = 10.0
"""How long the cluster's head may take to answer."""


def fill_with_ray(
    config: DumpConfig,
    teacher: Teacher,
    writer: CacheWriter,
    missing: list[ShardPlan],
    options: RayConfig,
    *,
    retry_rejected: bool = False,
) -> None:
    """Have all missing shards of the cache filled by actors.

    Raises ValueError, naming the node, for what an actor finds wrong, RuntimeError when a shard's
    actor has died too often. However this ends, no actor of it stays.
    """
    ray = import_ray()
    total = writer.manifest.num_targets
    committed = total - sum(plan.num_targets for plan in missing)
    with (
        _connected(ray, options),
        progress("score", "targets", total=total, initial=committed) as bar,
    ):
        arguments = (_shipped(config, teacher, writer), writer.manifest.cache_id, retry_rejected)
        pool = _Pool(ray, arguments, options)
        try:
            _fill(ray, pool, writer.manifest.num_shards, missing, options.max_task_retries, bar)
        finally:
            pool.close()


def _fill(
    ray: Any,
    pool: "_Pool",
    num_shards: int,
    missing: list[ShardPlan],
    max_task_retries: int,
    bar: Progress,
) -> None:
    queue, deaths = deque(missing), Counter[int]()
    committed, done = bar.done, 0
    start, last_news = 0.0, time.monotonic()
    while queue or pool.busy:
        pool.resize(len(queue) + len(pool.busy))
        for actor in pool.idle:
            if queue:
                actor.fill(queue.popleft())
            else:  # its GPUs are somebody else's now
                pool.drop(actor)
        for actor in pool.finished(timeout=POLL_S):
            last_news = time.monotonic()
            plan, actor.plan = actor.plan, None
            try:
                result = ray.get(actor.task)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, CLEAN):
                    raise error.cause from error
                raise
            except ray.exceptions.RayError as error:
                reason = _first_line(error)
                if plan is None and not pool.is_restarted(error):
                    raise RuntimeError(
                        f"an actor cannot start, or not again: {reason}; the project must be "
                        "installed, in the same version, on every node of the cluster"
                    ) from error
                log.warning(
                    "lost the actor on node %s: %s%s",
                    actor.node or "unknown",
                    reason,
                    f"; shard {plan.shard + 1} is scored again" if plan else "",
                )
                if plan is not None:
                    deaths[plan.shard] += 1
                    if deaths[plan.shard] > max_task_retries:
                        raise RuntimeError(
                            f"shard {plan.shard + 1} of {num_shards}: its actor died "
                            f"{deaths[plan.shard]} times, last on node {actor.node}: {reason}; look"
                            " at the memory there, lower teacher.max_batch_tokens"
                        ) from error
                    queue.appendleft(plan)
                elif actor.node:
                    actor.failed_loads += 1
                    if actor.failed_loads > max_task_retries:
                        raise RuntimeError(
                            f"an actor died {actor.failed_loads} times while it loaded the "
                            f"teacher, last on node {actor.node}: {reason}; look at the memory "
                            "there, raise ray.num_gpus or ray.num_cpus"
                        ) from error
                actor.place()
                continue
            if not actor.node:
                actor.load(node=result)
                continue
            actor.task = None
            if plan is None:
                start, actor.failed_loads = start or time.monotonic(), 0
                log.info("an actor is ready on node %s", actor.node)
                continue
            done += plan.num_targets
            num_bytes, rejected = result
            log.info(
                "shard %d of %d committed on node %s: %.1f MB, %.0f targets/s over all actors%s",
                plan.shard + 1,
                num_shards,
                actor.node,
                num_bytes / 1e6,
                done / (time.monotonic() - start),
                f", {rejected} sequences rejected" if rejected else "",
            )
        bar.note(f"{len(pool.busy)} actors")
        bar.to(committed + done + pool.scored())
        if not pool.placed and time.monotonic() - last_news > NO_ACTOR_S:
            last_news = time.monotonic()
            log.warning("waiting for Ray to place an actor: %s", pool.wanted())


def import_ray() -> Any:
    """The ray module. Raises EngineError if it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise EngineError(f"executor ray needs Ray ({error}): pip install 'decant[ray]'") from error
    return ray


@contextlib.contextmanager
def _connected(ray: Any, options: RayConfig) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    address = options.address or os.environ.get("RAY_ADDRESS", "") or "local"
    own = {"include_dashboard": False} if address == "local" else {}
    try:
        _reach(address)
        ray.init(address=address, logging_level=logging.WARNING, **own)
    except (OSError, RuntimeError, ValueError) as error:
        raise RuntimeError(f"no Ray cluster at {address}: {_first_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raise OSError if nothing listens at HOST:PORT; Ray itself would try for minutes."""
    host, separator, port = address.rpartition(":")
    if separator and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()


def _shipped(config: DumpConfig, teacher: Teacher, writer: CacheWriter) -> DumpConfig:
    """The config as an actor in another folder, or on another node, must read it."""
    local = config.teacher
    if local.path and Path(local.path).expanduser().exists():
        local = dataclasses.replace(local, path=os.path.abspath(teacher.model_path))
    if local.adapter and Path(local.adapter).expanduser().is_dir():
        local = dataclasses.replace(local, adapter=os.path.abspath(teacher.adapter_path))
    if local.tokenizer and Path(local.tokenizer).expanduser().is_dir():
        tokenizer = os.path.abspath(os.path.expanduser(local.tokenizer))
        local = dataclasses.replace(local, tokenizer=tokenizer)
    return dataclasses.replace(config, output=writer.store.path(""), teacher=local)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
