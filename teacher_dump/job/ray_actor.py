"""One Ray actor: an engine that fills shards."""

import contextlib
import logging
import socket
import time
from collections.abc import Iterator

from decant.storage import CacheWriter
from decant.storage.cache import paths
from decant.teacher_dump.config import DumpConfig
from decant.teacher_dump.engines import Engine
from decant.teacher_dump.engines.quiet import quiet_transformers
from decant.teacher_dump.job.fill import fill_shard, is_done, open_teacher
from decant.teacher_dump.teacher import describe_teacher, fingerprint_like, hash_weights

CLAIM_POLL_S, CLAIM_WAIT_S = 0.5, 600.0
"""How often, and how long, an actor asks for a shard that another process holds."""


CLEAN = (ValueError, OSError, ImportError, RuntimeError)
"""What the command line shows as one line; travels from an actor as its plain kind and text."""


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
        quiet_transformers()
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
        if fingerprint_like(ours, theirs) != theirs:
            raise ValueError(
                f"{teacher.model_path or teacher.info.name} has fingerprint {ours} here, but the "
                f"cache's teacher has {theirs}: copy the same files to every node"
            )
        return writer, open_teacher(self._config, teacher)


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
