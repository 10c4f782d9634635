"""Ray actors that come and go."""

import contextlib
import time
from typing import Any

from decant.schemas import ShardPlan
from decant.teacher_dump.config import DumpConfig
from decant.teacher_dump.job.config import RayConfig
from decant.teacher_dump.job.ray_actor import ShardActor

GROW_S = 5.0
"""How often the driver looks whether the cluster has room for more actors."""


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
