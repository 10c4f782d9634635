"""How the shards of a dump are shared out: workers, or the actors of a Ray cluster."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults through vars()
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


@dataclass(frozen=True, kw_only=True)
class ShareConfig:
    """Who fills the shards. The cache is the same whoever does."""

    executor: Literal["local", "ray"] = "local"
    """Who fills the shards: this process, or actors of a Ray cluster."""
    worker_index: int = 0
    """Which of several workers this one is, from 0."""
    num_workers: int = 1
    """Processes that fill this cache together, each its share of the shards."""
    retry_rejected: bool = False
    """Score the shards again that lack sequences which the teacher could not score."""
    extend: bool = False
    """Add the records of the source to the final cache at output, as new shards of it."""
    on_known: Literal["refuse", "skip", "keep"] = "refuse"
    """extend: what becomes of sequences whose sample id the cache has already."""
    ray: RayConfig = field(default_factory=RayConfig)
    """The actors of executor ray."""

    def __post_init__(self) -> None:
        if self.executor == "local" and self.ray != RayConfig():
            raise ValueError(
                "ray.* have no effect with executor local: add --executor ray, or executor: ray"
            )
        if self.on_known != "refuse" and not self.extend:
            raise ValueError("on_known has no effect without extend")
        if self.executor == "ray" and self.num_workers != 1:
            raise ValueError("num_workers has no effect with executor ray, which counts its actors")
