"""Moves scored sequences to and from disk; verifies and inspects what is there. No models here."""

from decant.storage.cache.index import RowGroupRef
from decant.storage.cache.integrity import VerifyReport, verify
from decant.storage.cache.migration import migrate
from decant.storage.cache.reader import CacheReader
from decant.storage.cache.rows import Rows, StoredRows
from decant.storage.cache.writer import CacheWriter, ShardWriter
from decant.storage.files.store import Busy, Store

__all__ = [
    "Busy",
    "CacheReader",
    "CacheWriter",
    "RowGroupRef",
    "Rows",
    "ShardWriter",
    "Store",
    "StoredRows",
    "VerifyReport",
    "migrate",
    "verify",
]
