"""Moves scored sequences to and from disk; verifies and inspects what is there. No models here.

A name is loaded when it is first used: the command line's help needs none of them.
"""

from typing import TYPE_CHECKING

from decant.lazy import lazily

if TYPE_CHECKING:
    from decant.storage.cache.given_messages import GivenMessages
    from decant.storage.cache.index import RowGroupRef
    from decant.storage.cache.integrity import VerifyReport, verify
    from decant.storage.cache.migration import migrate
    from decant.storage.cache.reader import CacheReader
    from decant.storage.cache.rows import Rows, StoredRows
    from decant.storage.cache.shard_writer import ShardWriter
    from decant.storage.cache.writer import CacheWriter
    from decant.storage.files.store import Busy, Store
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "Busy": "decant.storage.files.store",
            "CacheReader": "decant.storage.cache.reader",
            "CacheWriter": "decant.storage.cache.writer",
            "GivenMessages": "decant.storage.cache.given_messages",
            "RowGroupRef": "decant.storage.cache.index",
            "Rows": "decant.storage.cache.rows",
            "ShardWriter": "decant.storage.cache.shard_writer",
            "Store": "decant.storage.files.store",
            "StoredRows": "decant.storage.cache.rows",
            "VerifyReport": "decant.storage.cache.integrity",
            "migrate": "decant.storage.cache.migration",
            "verify": "decant.storage.cache.integrity",
        },
    )

__all__ = [
    "Busy",
    "CacheReader",
    "CacheWriter",
    "GivenMessages",
    "RowGroupRef",
    "Rows",
    "ShardWriter",
    "Store",
    "StoredRows",
    "VerifyReport",
    "migrate",
    "verify",
]
