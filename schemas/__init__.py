"""What crosses the disk: one scored sequence, the Arrow schema of a shard, the manifest.

Knows nothing of files, models or torch. `docs/format.md` is the normative text.
"""

from decant.schemas.arrow import NO_LOGPROBS, PRECISIONS, CompactCode, Layout, shard_schema
from decant.schemas.conversation import Conversation
from decant.schemas.distributions import Distributions
from decant.schemas.manifest import FORMAT_VERSION, Manifest, TeacherInfo, TokenizerInfo
from decant.schemas.same_tokenizer import SameIds, check_same_tokenizer
from decant.schemas.sequence import ScoredSequence
from decant.schemas.shards import (
    ByteRange,
    CommitRecord,
    Rejected,
    RowGroup,
    Segment,
    ShardPlan,
    Totals,
)
from decant.schemas.strict import FormatError, from_json, to_json
from decant.schemas.tokenizer import tokenizer_fingerprint
from decant.schemas.truncation import Truncation

__all__ = [
    "FORMAT_VERSION",
    "NO_LOGPROBS",
    "PRECISIONS",
    "ByteRange",
    "CommitRecord",
    "CompactCode",
    "Conversation",
    "Distributions",
    "FormatError",
    "Layout",
    "Manifest",
    "Rejected",
    "RowGroup",
    "SameIds",
    "ScoredSequence",
    "Segment",
    "ShardPlan",
    "TeacherInfo",
    "TokenizerInfo",
    "Totals",
    "Truncation",
    "check_same_tokenizer",
    "from_json",
    "shard_schema",
    "to_json",
    "tokenizer_fingerprint",
]
