"""Dumps that several files of this folder begin with."""

import dataclasses
from pathlib import Path

import pytest

from decant.teacher_dump import (
    DumpConfig,
    dump,
)
from tests.support.dumps import (
    HALF,
    failing_after,
)


@pytest.fixture
def config(dump_config: DumpConfig, tmp_path: Path) -> DumpConfig:
    """The config of `cache`, into a directory that is not there yet."""
    return dataclasses.replace(dump_config, output=str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def half_done(dump_config: DumpConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `config` with some of its shards committed. Never write to it."""
    path = tmp_path_factory.mktemp("half") / "cache"
    with failing_after(HALF), pytest.raises(RuntimeError):
        dump(dataclasses.replace(dump_config, output=str(path)))
    return path
