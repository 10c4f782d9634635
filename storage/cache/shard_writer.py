"""Write one shard: sequences in plan order into row groups, then its file, then its record."""

import os
import socket
import time
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from decant.schemas import (
    CommitRecord,
    FormatError,
    Manifest,
    Rejected,
    RowGroup,
    ScoredSequence,
    ShardPlan,
    shard_schema,
)
from decant.storage.cache import paths
from decant.storage.cache import rows as rows_codec
from decant.storage.cache.carried import Carried, refuse_changed
from decant.storage.cache.checks import check_sequence
from decant.storage.cache.logprobs import Measured, decoding_errors
from decant.storage.cache.numbering import Fitter
from decant.storage.cache.parquet import DENSE, byte_range, extent, parquet_options
from decant.storage.cache.rejected import one_line, without_targets
from decant.storage.files.sealed import publish_json
from decant.storage.files.store import Store

ROW_GROUP_ROWS = 16_384
"""A row group is closed before it would grow beyond this, but never below half of it."""
ROW_GROUP_BYTES = 1 << 24
"""The same in bytes of ids and log probs before compression: fewer rows where K is large."""


class ShardWriter:
    """Writes the sequences of one shard, in plan order, into one Parquet file."""

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        plan: ShardPlan,
        *,
        replace: bool = False,
        row_group_rows: int = ROW_GROUP_ROWS,
        carried: Carried | None = None,
    ) -> None:
        """Prepare; nothing is touched before the context is entered.

        With `carried` the sequences to come are decoded ones of caches of the same layout: their
        values are stored with the bytes that they had there.
        """
        self._carried = carried
        self._store, self._manifest, self._plan = store, manifest, plan
        self._replace = replace
        self._file, self._record_file = (
            (paths.renewed_shard(plan.shard), paths.renewed_record(plan.shard))
            if replace
            else (paths.shard(plan.shard), paths.record(plan.shard))
        )
        self._layout = manifest.layout
        row_bytes = 2 * self._layout.slots + sum(self._layout.logprob_columns.values())
        self._group_rows = min(row_group_rows, ROW_GROUP_BYTES // max(row_bytes, 1))
        self._buffer: list[ScoredSequence] = []
        self._buffered_rows = 0
        self._groups: list[tuple[int, int, int]] = []  # rows, sequences, targets
        self._rejected: list[Rejected] = []
        self._fitter = Fitter(self._layout) if self._layout.ranked else None
        self._kl_error, self._logprob_error = Measured(), Measured()
        self.bytes_written = 0
        """Size of the shard file, once committed."""
        self.logprob_error: tuple[float | None, float | None] = None, None
        """Mean and largest of the record, once committed."""

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        self._staging = self._store.staged(self._file)
        self._path = self._staging.__enter__()
        try:
            schema = shard_schema(self._layout)
            dense = self._plan.num_targets >= DENSE * self._plan.num_tokens
            self._parquet = pq.ParquetWriter(self._path, schema, **parquet_options(schema, dense))
        except BaseException as error:
            self._staging.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def write(self, sequence: ScoredSequence) -> None:
        """Append one sequence. Raises FormatError naming the sample if it is not valid."""
        precision = self._layout.precision if self._carried else "f32"
        check_sequence(sequence, self._layout, precision=precision)
        length = len(sequence.input_ids)
        if (
            self._buffered_rows + length > self._group_rows
            and self._buffered_rows >= self._group_rows // 2
        ):
            self._flush()
        self._buffer.append(sequence)
        self._buffered_rows += length

    def reject(
        self,
        sample_id: str,
        input_ids: NDArray[np.int32],
        is_target: NDArray[np.bool_],
        reason: str,
        messages: str | None = None,
    ) -> None:
        """Append a sequence that the teacher cannot score: its rows are kept, its targets lost.

        `input_ids` and `is_target` [L] are what was to be scored; `reason` is cut to one line of
        REASON_LENGTH characters. Raises FormatError if the cache is of a version before 3, which
        cannot say so, or if the tokens are not valid.
        """
        reason = one_line(reason)
        if self._manifest.format_version < 3:
            raise FormatError(
                f"{self._store.url} was started in format version {self._manifest.format_version}, "
                f"which has no place for a rejected sequence, but sample {sample_id} cannot be "
                f"scored ({reason}): take it out of the source and dump into another output"
            )
        is_target = np.asarray(is_target, np.bool_)
        if is_target.shape != (len(input_ids),) or is_target[:1].any():
            raise FormatError(
                f"sample {sample_id}: is_target must be bool [{len(input_ids)}] with token 0 "
                f"false, found shape {is_target.shape}, token 0 {is_target[:1]}"
            )
        ids = np.asarray(input_ids, np.int32)
        nothing = without_targets(sample_id, ids, messages, self._layout)
        self.write_rejected(nothing, int(is_target.sum()), reason)

    def write_rejected(self, sequence: ScoredSequence, targets: int, reason: str) -> None:
        """Append a sequence without targets, as many of which were lost, for a reason of one line.

        Raises FormatError if it is not valid.
        """
        done = sum(group[1] for group in self._groups) + len(self._buffer)
        rejected = Rejected(
            sequence=self._plan.first_sequence + done,
            sample_id=sequence.sample_id,
            targets=targets,
            reason=reason,
        )
        self.write(sequence)
        self._rejected.append(rejected)

    def _flush(self) -> None:
        first = self._plan.first_sequence + sum(group[1] for group in self._groups)
        scored = sum(s.num_targets for s in self._buffer)
        numbering = None
        if self._fitter:
            ids = np.concatenate([s.token_ids for s in self._buffer])
            written = sum(group[2] for group in self._groups)
            numbering = self._fitter.choose(ids, self._plan.num_targets - written)
        decoded = self._carried is not None
        table = rows_codec.encode(self._buffer, first, self._layout, numbering, decoded=decoded)
        self._parquet.write_table(table, row_group_size=len(table))
        if decoded:
            refuse_changed(self._buffer, rows_codec.decode(table, self._layout, numbering))
        elif self._layout.has_logprobs and self._layout.precision != "f32":
            stored = rows_codec.decode(table, self._layout, numbering).logprobs
            assert stored is not None
            given = [s.logprobs for s in self._buffer if s.logprobs is not None]
            kl_error, logprob_error = decoding_errors(np.concatenate(given), stored)
            self._kl_error.add(kl_error)
            self._logprob_error.add(logprob_error)
        self._groups.append((len(table), len(self._buffer), scored))
        self._buffer, self._buffered_rows = [], 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Commit, unless an exception passes or the counts differ from the plan.

        A shard that has a commit record by now is another process's: ours is dropped, unless it is
        to replace it; then an earlier replacement's record goes first, so that both always agree.
        """
        try:
            if error is None and self._buffer:
                self._flush()
            if self._fitter:
                self._parquet.add_key_value_metadata(self._fitter.to_footer())
            self._parquet.close()
            if error is None:
                record = self._record()
        except BaseException as failure:
            self._staging.__exit__(type(failure), failure, failure.__traceback__)
            raise
        if error is None and self._replace:
            self._store.remove(self._record_file)
        elif error is None and self._store.exists(self._record_file):
            theirs = FileExistsError("another process has committed this shard meanwhile")
            self._staging.__exit__(FileExistsError, theirs, None)  # removes ours
            return
        self._staging.__exit__(kind, error, trace)  # publishes the shard, or removes it
        if error is None:
            fields = record.to_json(self._manifest.format_version)
            publish_json(self._store, self._record_file, fields)
            self.bytes_written = record.bytes
            self.logprob_error = record.logprob_error_mean, record.logprob_error_max

    def _record(self) -> CommitRecord:
        plan = self._plan
        rows, sequences, targets = (sum(g[i] for g in self._groups) for i in range(3))
        found = (sequences, rows, targets)
        lost = sum(entry.targets for entry in self._rejected)
        expected = (plan.num_sequences, plan.num_tokens, plan.num_targets - lost)
        if found != expected:
            raise FormatError(
                f"shard {plan.shard}: (sequences, tokens, targets) written {found}, "
                f"planned {expected}"
            )
        metadata = pq.read_metadata(self._path)
        with pa.memory_map(str(self._path)) as source:
            whole = memoryview(source.read_buffer())
            groups = []
            for i, (num_rows, num_sequences, num_targets) in enumerate(self._groups):
                data = byte_range(whole, *extent(metadata.row_group(i)))
                groups.append(
                    RowGroup(rows=num_rows, sequences=num_sequences, targets=num_targets, data=data)
                )
            end = groups[-1].data.offset + groups[-1].data.length if groups else 0
            measured = self._layout.has_logprobs and self._manifest.format_version >= 4
            said = self._carried or Carried(
                kl_error_mean=self._kl_error.mean(targets),
                kl_error_max=self._kl_error.largest,
                logprob_error_mean=self._logprob_error.mean(targets) if measured else None,
                logprob_error_max=self._logprob_error.largest if measured else None,
                seconds=round(time.monotonic() - self._start, 3),
                worker=f"{socket.gethostname()}:{os.getpid()}",
            )
            return CommitRecord(
                shard=plan.shard,
                cache_id=self._manifest.cache_id,
                first_sequence=plan.first_sequence,
                num_sequences=sequences,
                rows=rows,
                targets=targets,
                rejected=tuple(self._rejected),
                bytes=len(whole),
                xxh3_128=xxhash.xxh3_128(whole).hexdigest(),
                row_groups=tuple(groups),
                footer=byte_range(whole, end, len(whole)),
                kl_error_mean=said.kl_error_mean,
                kl_error_max=said.kl_error_max,
                logprob_error_mean=said.logprob_error_mean,
                logprob_error_max=said.logprob_error_max,
                seconds=said.seconds,
                worker=said.worker,
            )
