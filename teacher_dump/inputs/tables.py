"""Rows of Parquet files and of Hugging Face datasets."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from decant.teacher_dump.inputs.config import SourceConfig
from decant.teacher_dump.inputs.files import is_saved
from decant.teacher_dump.inputs.records import Row, SourceError

PARQUET_BATCH_ROWS = 256


def parquet_rows(name: str, path: Path) -> Iterator[Row]:
    """Yield (id, place, fields) of each row of a Parquet file."""
    index = 0
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                for fields in batch.to_pylist():
                    yield f"{name}:{index}", f"{name} row {index}", fields
                    index += 1
    except (pa.ArrowException, OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the machine's word
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise SourceError(
            f"{path} is not readable as Parquet after {index} rows: {error}; write it again"
        ) from error
    if index == 0:
        raise SourceError(f"{path} is empty: expected at least one row; remove the file")


def hf_rows(config: SourceConfig) -> Iterator[Row]:
    """Yield (id, place, fields) of each row of a Hugging Face dataset."""
    index = -1
    for index, fields in enumerate(load_hf(config)):
        yield f"{config.split}:{index}", f"{config.path} split {config.split} row {index}", fields
    if index < 0:
        raise SourceError(f"{config.path} split {config.split} is empty: expected at least one row")


def load_hf(config: SourceConfig) -> Any:
    """The dataset that the configuration names. Raises SourceError if it cannot be loaded."""
    path = os.path.expanduser(config.path)
    try:
        import datasets

        if not is_saved(Path(path)):
            return datasets.load_dataset(path, config.subset or None, split=config.split)
        dataset = datasets.load_from_disk(path)
    except Exception as error:  # whatever a Hub client, a builder or a cache may raise
        raise SourceError(
            f"{config.path!r} (subset {config.subset!r}, split {config.split!r}) is neither a local"
            f" file nor a Hugging Face dataset that can be loaded: {error}; check the name"
        ) from error
    splits = list(dataset) if isinstance(dataset, datasets.DatasetDict) else ["train"]
    if config.subset or config.split not in splits:
        raise SourceError(
            f"{config.path} was saved with splits {splits} and no subsets: expected split, found"
            f" split={config.split!r}, subset={config.subset!r}"
        )
    return dataset[config.split] if isinstance(dataset, datasets.DatasetDict) else dataset
