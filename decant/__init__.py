"""Offline distillation: a teacher's distributions in files, and students trained from the files.

    from decant import CacheReader, CacheStream, DumpConfig, TrainConfig, dump, train

A name is loaded when it is first used, so that `import decant` costs nothing. All code is below
`decant`: beside it a project may have a `storage` or a `schemas` of its own.
"""

from typing import TYPE_CHECKING, Any

from decant.lazy import lazily

if TYPE_CHECKING:
    from decant.schemas.manifest import Manifest
    from decant.schemas.sequence import ScoredSequence
    from decant.storage.cache.integrity import verify
    from decant.storage.cache.reader import CacheReader
    from decant.storage.cache.writer import CacheWriter
    from decant.student_train.config.run import TrainConfig
    from decant.student_train.data.stream import CacheStream
    from decant.student_train.loop import train
    from decant.student_train.losses.divergences import sparse_divergence
    from decant.student_train.losses.fused import fused_linear_divergence
    from decant.student_train.losses.targets import SparseTargets
    from decant.teacher_dump.config import DumpConfig
    from decant.teacher_dump.job.run import dump

    __version__: str
else:
    _load, _names = lazily(
        __name__,
        {
            "CacheReader": "decant.storage.cache.reader",
            "CacheStream": "decant.student_train.data.stream",
            "CacheWriter": "decant.storage.cache.writer",
            "DumpConfig": "decant.teacher_dump.config",
            "Manifest": "decant.schemas.manifest",
            "ScoredSequence": "decant.schemas.sequence",
            "SparseTargets": "decant.student_train.losses.targets",
            "TrainConfig": "decant.student_train.config.run",
            "dump": "decant.teacher_dump.job.run",
            "fused_linear_divergence": "decant.student_train.losses.fused",
            "sparse_divergence": "decant.student_train.losses.divergences",
            "train": "decant.student_train.loop",
            "verify": "decant.storage.cache.integrity",
        },
    )

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return _version()
        return _load(name)

    def __dir__() -> list[str]:
        return sorted({*_names(), "__version__"})


__all__ = [
    "CacheReader",
    "CacheStream",
    "CacheWriter",
    "DumpConfig",
    "Manifest",
    "ScoredSequence",
    "SparseTargets",
    "TrainConfig",
    "__version__",
    "dump",
    "fused_linear_divergence",
    "sparse_divergence",
    "train",
    "verify",
]


def _version() -> str:
    """The installed version, or that there is none: the code is used from where it lies."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("decant")
    except PackageNotFoundError:
        return "not installed"
