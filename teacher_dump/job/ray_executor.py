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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from decant.schemas import ShardPlan
from decant.storage import CacheWriter
from decant.storage.cache import paths
from decant.teacher_dump.config import DumpConfig
from decant.teacher_dump.engines import Engine, EngineError
from decant.teacher_dump.job.fill import fill_shard, is_done, open_teacher
from decant.teacher_dump.teacher import Teacher, describe_teacher, hash_weights

log = logging.getLogger(__name__)

POLL_S = 1.0
"""How often the driver looks at actors, and the bar is drawn."""
GROW_S = 5.0
"""How often the driver looks whether the cluster has room for more actors."""
NO_ACTOR_S = 30.0
"""How often the driver says that it waits for Ray to place the first actor."""
CLAIM_POLL_S, CLAIM_WAIT_S = 0.5, 600.0
"""How often, and how long, an actor asks for a shard that another process holds."""
CONNECT_S = 10.0
"""How long the cluster's head may take to answer."""
CLEAN = (ValueError, OSError, ImportError, RuntimeError)
"""What the command line shows as one line; travels from an actor as its plain kind and text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RayConfig:
    """How the shards are spread over a Ray cluster."""

    address: str = ""
    """Of the cluster: auto (that of this machine) or HOST:PORT; "" is $RAY_ADDRESS or, without
    it, a new cluster of this machine alone."""

    num_actors: int = 0
    """Engines at once; 0 = as many as the cluster fits, also as it grows. More than fit make Ray's
    autoscaler, where there is one, add nodes."""

    num_gpus: float = -1
    """GPUs of each actor; -1 = one if the cluster has any, else none."""

    num_cpus: float = 1
    """CPUs of each actor, which are also its compute threads."""

    max_restarts: int = -1
    """How often Ray starts an actor again that died; -1 = always."""

    max_task_retries: int = 3
    """How often a shard is tried again after its actor died."""

    def __post_init__(self) -> None:
        for name, least in (
            ("num_actors", 0),
            ("num_cpus", 0),
            ("max_restarts", -1),
            ("max_task_retries", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"ray.{name} is {getattr(self, name)}: expected at least {least}")
        if self.num_gpus != -1 and self.num_gpus < 0:
            raise ValueError(f"ray.num_gpus is {self.num_gpus}: expected -1 (auto), 0 or more")
        if not (self.num_cpus or self.num_gpus):
            raise ValueError("ray.num_cpus and ray.num_gpus are both 0: nothing bounds the actors")


class ShardActor:
    """A loaded teacher on some node; lives in a worker process of Ray."""

    def __init__(self, config: DumpConfig, cache_id: str, retry_rejected: bool) -> None:
        """Nothing can fail here, so that what does fail is told as any other error."""
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        self._config, self._cache_id = config, cache_id
        self._retry_rejected = retry_rejected
        self._scored = 0
        self._loaded: tuple[CacheWriter, Engine] | None = None

    def node(self) -> str:
        """The name of the node that Ray has placed it on."""
        return _node_name()

    def load(self) -> None:
        """Open the cache and load the teacher, unless that is done."""
        with _named_errors():
            if self._loaded is None:
                self._loaded = self._load()

    def fill(self, shard: int) -> tuple[int, int]:
        """Score and commit one shard; returns its bytes and how many sequences were rejected.

        Both are 0 if another process has committed it.
        """
        with _named_errors():
            if self._loaded is None:
                self._loaded = self._load()
            writer, engine = self._loaded
            give_up = time.monotonic() + CLAIM_WAIT_S
            while True:
                self._scored = 0
                filled = fill_shard(
                    writer,
                    engine,
                    writer.plan[shard],
                    max_rejected=self._config.max_rejected,
                    retry_rejected=self._retry_rejected,
                    progress=self._count,
                )
                if filled is not None:
                    return filled.bytes, filled.rejected
                if is_done(writer, shard, retry_rejected=self._retry_rejected):
                    return 0, 0
                if time.monotonic() > give_up:
                    raise RuntimeError(
                        f"another process holds {writer.store.path(paths.inputs(shard))} since "
                        f"{CLAIM_WAIT_S:.0f} s without committing its shard: stop that process"
                    )
                time.sleep(CLAIM_POLL_S)  # until the kernel has ended the actor that held it

    def scored(self) -> int:
        """Targets of the shard in progress that are scored so far."""
        return self._scored

    def _count(self, num_targets: int) -> None:
        self._scored += num_targets

    def _load(self) -> tuple[CacheWriter, Engine]:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            writer = CacheWriter(self._config.output)
        except ValueError as error:
            raise ValueError(
                f"{error}; output must be an object store, or a folder that all nodes share"
            ) from error
        if writer.manifest.cache_id != self._cache_id:
            raise ValueError(
                f"{self._config.output} is cache {writer.manifest.cache_id} here, but the driver's "
                f"is {self._cache_id}: output must be a folder that all nodes share"
            )
        teacher = hash_weights(describe_teacher(self._config.teacher))
        ours, theirs = teacher.info.fingerprint, writer.manifest.teacher.fingerprint
        if ours != theirs:
            raise ValueError(
                f"{teacher.model_path} has fingerprint {ours} here, but the cache's teacher has "
                f"{theirs}: copy the same files to every node"
            )
        return writer, open_teacher(self._config, teacher)


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
        tqdm(
            desc="score",
            total=total,
            initial=committed,
            unit=" targets",
            unit_scale=True,
            disable=None,
        ) as bar,
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
    bar: tqdm,
) -> None:
    queue, deaths = deque(missing), Counter[int]()
    committed, done = bar.n, 0
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
        bar.update(committed + done + pool.scored() - bar.n)
        bar.set_postfix_str(f"{len(pool.busy)} actors", refresh=False)
        if not pool.placed and time.monotonic() - last_news > NO_ACTOR_S:
            last_news = time.monotonic()
            log.warning("waiting for Ray to place an actor: %s", pool.wanted())


class _Actor:
    """The driver's view of one actor."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.node = ""
        """Name of the node, once Ray has placed it."""
        self.plan: ShardPlan | None = None
        """What it fills."""
        self.task: Any = None
        """What it does; None when idle."""
        self.asked: Any = None
        """A question about its progress that is on the way."""
        self.scored = self.failed_loads = 0
        self.place()

    def place(self) -> None:
        """Wait until Ray has started its process, again if need be."""
        self.node, self.asked = "", None
        self.task = self.handle.node.options(max_task_retries=-1).remote()

    def load(self, node: str) -> None:
        """Load the teacher, now that it has a place."""
        self.node = node
        self.task = self.handle.load.remote()

    def fill(self, plan: ShardPlan) -> None:
        self.scored, self.asked, self.plan = 0, None, plan
        self.task = self.handle.fill.remote(plan.shard)


class _Pool:
    """As many actors as the cluster fits, or were asked for."""

    def __init__(
        self, ray: Any, arguments: tuple[DumpConfig, str, bool], options: RayConfig
    ) -> None:
        self._ray, self._options = ray, options
        self._arguments = arguments
        self._actors: list[_Actor] = []
        self._looked = -GROW_S
        num_gpus = options.num_gpus
        if num_gpus < 0:
            num_gpus = 1 if ray.cluster_resources().get("GPU") else 0
        self._resources = {"GPU": num_gpus, "CPU": options.num_cpus}
        self._class = ray.remote(
            num_gpus=num_gpus,
            num_cpus=options.num_cpus,
            max_restarts=options.max_restarts,
            max_task_retries=0,  # a retry would wait for this very actor
            scheduling_strategy="SPREAD",
            concurrency_groups={"progress": 1},
        )(ShardActor)

    @property
    def busy(self) -> list[_Actor]:
        """Those that fill a shard."""
        return [actor for actor in self._actors if actor.plan is not None]

    @property
    def placed(self) -> bool:
        """Whether any has a process."""
        return any(actor.node for actor in self._actors)

    @property
    def idle(self) -> list[_Actor]:
        """Those that wait for a shard."""
        return [actor for actor in self._actors if actor.task is None]

    def resize(self, useful: int) -> None:
        """Add actors up to `useful` ones, if the cluster has room."""
        if time.monotonic() - self._looked < GROW_S:
            return
        self._looked = time.monotonic()
        wanted = self._options.num_actors or max(1, self._num_fitting())
        for _ in range(len(self._actors), min(wanted, useful)):
            self._actors.append(_Actor(self._class.remote(*self._arguments)))

    def _num_fitting(self) -> int:
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        needs = {name: need for name, need in self._resources.items() if need}
        return sum(
            min(int(node.get(name, 0) / need + 1e-6) for name, need in needs.items())
            for node in nodes
        )

    def finished(self, timeout: float) -> list[_Actor]:
        """Those whose task has ended, however; waits so long for a first one."""
        tasks = {actor.task: actor for actor in self._actors if actor.task is not None}
        if not tasks:
            return []
        ready, _ = self._ray.wait(list(tasks), timeout=timeout)
        ready, _ = self._ray.wait(list(tasks), num_returns=len(tasks), timeout=0)
        return [tasks[task] for task in ready]

    def scored(self) -> int:
        """Targets of all shards in progress, as of a moment ago."""
        for actor in self.busy:
            if actor.asked is None:
                ask = actor.handle.scored.options(concurrency_group="progress")
                actor.asked = ask.remote()
            elif self._ray.wait([actor.asked], timeout=0)[0]:
                with contextlib.suppress(self._ray.exceptions.RayError):
                    actor.scored = self._ray.get(actor.asked)
                actor.asked = None
        return sum(actor.scored for actor in self.busy)

    def is_restarted(self, error: Exception) -> bool:
        """Whether Ray brings an actor back that ended so."""
        return not isinstance(error, self._ray.exceptions.ActorDiedError)

    def wanted(self) -> str:
        """What an actor needs and what there is."""
        needs = ", ".join(f"{need:g} {name}" for name, need in self._resources.items() if need)
        there = self._ray.cluster_resources()
        found = ", ".join(f"{there.get(name, 0):g} {name}" for name in self._resources)
        return (
            f"each needs {needs} on one node, the cluster has {found} in all, other jobs' included"
        )

    def drop(self, actor: _Actor) -> None:
        """End an actor for good."""
        self._actors.remove(actor)
        self._ray.kill(actor.handle)

    def close(self) -> None:
        """End all of them."""
        for actor in list(self._actors):
            with contextlib.suppress(self._ray.exceptions.RayError):
                self.drop(actor)


def import_ray() -> Any:
    """The ray module. Raises EngineError if it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise EngineError(f"executor ray needs Ray ({error}): pip install '.[ray]'") from error
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
    if local.path and Path(local.path).expanduser().is_dir():
        local = dataclasses.replace(local, path=os.path.abspath(teacher.model_path))
    if local.tokenizer and Path(local.tokenizer).expanduser().is_dir():
        tokenizer = os.path.abspath(os.path.expanduser(local.tokenizer))
        local = dataclasses.replace(local, tokenizer=tokenizer)
    return dataclasses.replace(config, output=writer.store.path(""), teacher=local)


@contextlib.contextmanager
def _named_errors() -> Iterator[None]:
    """Say on which node an error arose, in a kind of exception that every process can unpickle."""
    try:
        yield
    except CLEAN as error:
        kind = next(kind for kind in CLEAN if isinstance(error, kind))
        raise kind(f"node {_node_name()}: {error}") from error


def _node_name() -> str:
    import ray

    return f"{socket.gethostname()} ({ray.get_runtime_context().get_node_id()[:8]})"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
