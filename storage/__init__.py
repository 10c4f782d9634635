"""Moves scored sequences to and from disk; verifies and inspects what is there. No models here."""

from storage.codec import Rows, StoredRows
from storage.files import Busy, Store
from storage.index import RowGroupRef
from storage.migrate import migrate
from storage.reader import CacheReader
from storage.verify import VerifyReport, verify
from storage.writer import CacheWriter, ShardWriter

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
