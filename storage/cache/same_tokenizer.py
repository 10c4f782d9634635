"""Do the ids of two caches mean the same? By fingerprint, else by the tokenizers they keep."""

from decant.schemas import FormatError, SameIds
from decant.schemas.same_tokenizer import Unlike, compare
from decant.schemas.strict import UnfitError
from decant.schemas.tokenizer import has_fingerprint
from decant.storage.cache.reader import CacheReader
from decant.storage.cache.tokenizer_files import TokenizerFiles


def same_ids(ours: CacheReader, theirs: CacheReader) -> SameIds:
    """What else differs between the tokenizers of two caches whose ids mean the same.

    Raises FormatError, with the first difference where the caches keep their tokenizers, if an id
    below either's vocabulary means something else.
    """
    one, other = ours.manifest.tokenizer, theirs.manifest.tokenizer
    if one.fingerprint == other.fingerprint:
        return SameIds(more={}, differences=())
    apart = (
        f"{theirs.url} has another tokenizer ({other.fingerprint or 'none: ready ids'}) than "
        f"{ours.url} ({one.fingerprint or 'none: ready ids'})"
    )
    if not (one.files and other.files):
        raise UnfitError(apart)
    try:
        files = [TokenizerFiles.of_cache(reader) for reader in (ours, theirs)]
    except FormatError:
        raise
    except ValueError as error:  # a tokenizer without tokenizer.json
        raise UnfitError(f"{apart}, and the two cannot be compared: {error}") from error
    if has_fingerprint(files[0], other.fingerprint) or has_fingerprint(files[1], one.fingerprint):
        return SameIds(more={}, differences=())
    size = max(reader.manifest.shared_vocab_size for reader in (ours, theirs))
    try:
        return compare(*files, vocab_size=size)
    except Unlike as error:
        raise UnfitError(f"{apart}: {error}") from error
