"""The tokenizer of a teacher: what its `tokenizer.json` says, whatever class transformers takes.

Classes of transformers may build a tokenizer anew from the vocabulary, with a normaliser and
pre-tokenizer of their own. Where a `tokenizer.json` exists, it is what the teacher was trained
with, so it decides. Knows nothing of models but the number of their output rows.
"""

import logging
from pathlib import Path
from typing import Any

import tokenizers
import xxhash

from decant.schemas import TokenizerInfo, tokenizer_fingerprint
from decant.schemas.tokenizer import first_difference, has_fingerprint
from decant.storage import Store
from decant.storage.cache import paths
from decant.storage.files.scratch import scratch_folder

log = logging.getLogger(__name__)

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
MOST_ADDED = 50
"""Added tokens that are looked at between words, in each of the probes' places."""


def load_tokenizer(
    source: str,
    *,
    trust_remote_code: bool = False,
    where: str = "",
    gguf_file: str = "",
) -> Any:
    """The tokenizer of a directory or of a hub id: a transformers tokenizer.

    With a `tokenizer.json`, its backend is that file, and the files beside it add the names of
    special tokens, the chat template and further added tokens. Without one it is what
    transformers makes of the others, or of `gguf_file` in that directory. `where` is what errors
    call it.
    Raises ValueError if there is none, or if it cannot be brought to agree with its file.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    where = where or source
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if gguf_file:
        options["gguf_file"] = gguf_file
    theirs, problem = None, ""
    try:
        theirs = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # whatever a damaged tokenizer may raise
        problem = f"{error}".strip().partition("\n")[0]
    try:
        file = None if gguf_file else _tokenizer_json(source)
        if file is None or (trust_remote_code and _is_custom(theirs)):
            if theirs is None:
                raise ValueError(problem)
            return theirs
        exact = tokenizers.Tokenizer.from_file(str(file))
        exact.no_truncation()
        exact.no_padding()
        ours = PreTrainedTokenizerFast.from_pretrained(source, **options)
        _set_backend(ours, exact)
        if theirs is not None:
            _name_special_tokens(ours, theirs)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ValueError(
            f"no tokenizer in {where}: {error}; set teacher.tokenizer to its path, or to none "
            "if the source holds input_ids"
        ) from error
    _refuse_unfaithful(ours, exact, where)
    if theirs is None:
        log.warning(
            "%s: transformers cannot load it (%s); its tokenizer.json is used", where, problem
        )
    elif difference := first_difference(ours, theirs):
        log.warning(
            "%s: transformers (%s) reads it otherwise than its tokenizer.json, which is used: %s "
            "(file vs transformers)",
            where,
            type(theirs).__name__,
            difference,
        )
    return ours


def save_tokenizer(store: Store, tokenizer: Any | None, *, new: bool = False) -> TokenizerInfo:
    """Keep the tokenizer's files in the cache, so that a student needs no other copy.

    Raises FileExistsError if it must be `new` and other files are there, ValueError if what is
    written would be read as another tokenizer.
    """
    if tokenizer is None:
        return TokenizerInfo(fingerprint="", files={})
    fingerprint = tokenizer_fingerprint(tokenizer)
    files = {}
    with scratch_folder() as folder:
        tokenizer.save_pretrained(folder)
        _refuse_other_copy(tokenizer, folder, fingerprint)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                name = path.relative_to(folder).as_posix()
                data = path.read_bytes()
                store.publish(f"{paths.TOKENIZER}/{name}", data, new=new)
                files[name] = xxhash.xxh3_128(data).hexdigest()
    return TokenizerInfo(fingerprint=fingerprint, files=files)


def shared_vocab_size(tokenizer: Any | None, rows: int, teacher: str) -> int:
    """Ids that both the tokenizer and the teacher's output layer have.

    Ids beyond the rows may only be added tokens, such as an image's, or a padding that came later:
    texts seldom hold them, and a record that does is named when it is read. Raises ValueError if
    others are.
    """
    if tokenizer is None:
        return rows
    vocab: dict[str, int] = tokenizer.get_vocab()
    beyond = {token: index for token, index in vocab.items() if index >= rows}
    if not beyond:
        return max(vocab.values()) + 1
    if not beyond.keys() <= {str(token) for token in tokenizer.added_tokens_decoder.values()}:
        raise ValueError(
            f"the tokenizer has ids up to {max(beyond.values())}, the teacher {teacher} only {rows}"
            " output rows: they do not belong together"
        )
    log.info(
        "%s has %d output rows, its tokenizer %d added tokens beyond them (%s): a record that "
        "holds one is refused",
        teacher,
        rows,
        len(beyond),
        ", ".join(sorted(beyond, key=lambda token: beyond[token])[:5]),
    )
    return min(rows, max(vocab.values()) + 1)


def _tokenizer_json(source: str) -> Path | None:
    """The file in a directory or in the hub's cache; None if there is none."""
    from transformers.utils import cached_file

    found = cached_file(
        source,
        "tokenizer.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


def _is_custom(tokenizer: Any) -> bool:
    """Whether its class is code that came with it."""
    return type(tokenizer).__module__.startswith("transformers_modules")


def _set_backend(tokenizer: Any, exact: tokenizers.Tokenizer) -> None:
    """Give the tokenizer the file's own backend, with the tokens that its other files add."""
    known = {token.content for token in exact.get_added_tokens_decoder().values()}
    for index, token in sorted(tokenizer.added_tokens_decoder.items()):
        if token.content not in known:
            exact.add_tokens([token])
            if exact.token_to_id(token.content) != index:
                raise ValueError(
                    f"the files beside tokenizer.json add {token.content!r} as id {index}, where "
                    f"the next free id of tokenizer.json is {exact.token_to_id(token.content)}"
                )
    if tokenizer.backend_tokenizer.to_str() != exact.to_str():
        exact.encode_special_tokens = tokenizer.split_special_tokens
        tokenizer._tokenizer = exact


def _name_special_tokens(ours: Any, theirs: Any) -> None:
    """Take the names of special tokens that only a class knows, if the file has such tokens."""
    vocab = ours.get_vocab()
    for name in SPECIAL:
        token = getattr(theirs, name, None)
        if getattr(ours, name, None) is None and token is not None and str(token) in vocab:
            setattr(ours, name, str(token))


def _refuse_unfaithful(ours: Any, exact: tokenizers.Tokenizer, where: str) -> None:
    """Raise ValueError if the tokenizer and its file differ, on probes or added tokens."""

    class File:
        backend_tokenizer = exact

    tokens = [token.content for token in exact.get_added_tokens_decoder().values()]
    between = tuple(f"a {token} b{token}c" for token in tokens[:MOST_ADDED])
    difference = first_difference(ours, File()) or first_difference(ours, File(), between)
    if difference:
        raise ValueError(
            f"the tokenizer of {where} cannot be loaded as its tokenizer.json says: {difference} "
            "(loaded vs file); load it with transformers, repair it, and save it to a directory of "
            "its own for teacher.tokenizer"
        )


def _refuse_other_copy(tokenizer: Any, folder: str, fingerprint: str) -> None:
    """Raise ValueError unless `AutoTokenizer` makes the same tokenizer of the saved files."""
    from transformers import AutoTokenizer

    copy = AutoTokenizer.from_pretrained(folder)
    if has_fingerprint(copy, fingerprint):
        return
    difference = first_difference(tokenizer, copy)
    if difference or tokenizer.get_vocab() != copy.get_vocab():
        raise ValueError(
            "the tokenizer does not survive saving and loading: "
            f"{difference or 'its vocabulary differs'} (loaded vs saved copy); save it with "
            "save_pretrained to a directory, repair it there, and name that as teacher.tokenizer"
        )
