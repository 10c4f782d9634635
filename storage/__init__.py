"""Moves scored sequences to and from disk; verifies and inspects what is there. No models here."""

from storage.codec import Rows
from storage.files import Busy, Store
from storage.reader import CacheReader, RowGroupRef
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
    "VerifyReport",
    "verify",
]
