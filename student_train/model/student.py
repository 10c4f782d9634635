"""Load or make the student and its tokenizer, and check that both fit the cache."""

import difflib
import logging
from pathlib import Path
from typing import Any

import torch
import xxhash
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from decant.schemas.strict import UnfitError
from decant.storage import CacheReader, Store
from decant.storage.cache import kept_tokenizer, paths
from decant.storage.files.scratch import scratch_folder
from decant.student_train.config.student import StudentConfig
from decant.student_train.model.cut import cut
from decant.student_train.model.tokenizer import (
    agreed_tokenizer,
    as_fingerprinted,
    follow_tokenizer,
    tokens_more,
)

OLDER_NAMES = (
    *("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq"),
    *("rotary_pct", "rotary_emb_base"),
)
"""What transformers takes besides a configuration's fields: it makes rope_parameters of them."""
SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff"),
)
"""Generation settings that have an effect with do_sample alone."""
BEAMS = ("early_stopping", "length_penalty")
"""Generation settings that have an effect with several beams alone."""
FINGERPRINTED = 1024
"""Numbers of each tensor that a fingerprint looks at."""

log = logging.getLogger(__name__)


def load_tokenizer(reader: CacheReader) -> Any | None:
    """The teacher's tokenizer as kept in the cache; None if it was dumped from ready ids.

    The files are data: none of their code runs, whatever the student's may. One whose class is code
    is what its `tokenizer.json` says. Raises ValueError if that is not there, or cannot be read.
    """
    files = reader.manifest.tokenizer.files
    if not files:
        return None
    store = Store(reader.url)
    with scratch_folder() as folder:
        kept_tokenizer.unpack(store, reader.manifest, Path(folder))
        try:
            tokenizer = _as_data(folder)
        except Exception as error:  # whatever transformers and tokenizers raise on any bytes
            raise ValueError(
                f"the tokenizer in {reader.url}/{paths.TOKENIZER} cannot be loaded: {error}"
            ) from error
        return as_fingerprinted(tokenizer, folder, reader.manifest.tokenizer.fingerprint)


def _as_data(folder: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" not in str(error) or not (Path(folder) / "tokenizer.json").is_file():
            raise
    return PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)


def load_student(
    config: StudentConfig,
    reader: CacheReader,
    seed: int,
    *,
    aligned: tuple[Any, int] | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, Any | None]:
    """The student and the tokenizer to save with it; `options` are for `from_pretrained`.

    `aligned` are the student's own tokenizer and its vocabulary, where it need not be the cache's.

    Raises FormatError with the first differing tokens if a pretrained student's tokenizer is not
    the cache's, ValueError if the student cannot be built, or not all of its weights are there.
    """
    trusted = config.trust_remote_code
    if aligned:
        tokenizer = aligned[0]
    else:
        tokenizer = load_tokenizer(reader)
    dtype = getattr(torch, config.dtype)
    attention = {"attn_implementation": config.attention} if config.attention else {}
    torch.manual_seed(seed)
    if not config.config:
        path, revision = config.path, config.revision
        if config.from_teacher.is_given:
            path = config.from_teacher.path
            if not path:
                path, _, named = reader.manifest.teacher.name.partition("@")
                revision = revision or named
        where: dict[str, Any] = {"trust_remote_code": trusted, "revision": revision or None}
        student = _pretrained(path, dtype=dtype, **attention, **where, **options)
        if tokenizer is not None and not aligned:
            tokenizer = _agreed(tokenizer, config, path, reader, where)
        if config.from_teacher.is_given:
            torch.manual_seed(seed)
            student = cut(student, config.from_teacher.layers, config.from_teacher.keep)
        follow_tokenizer(student, tokenizer, path)
        return student, tokenizer
    if config.tokenizer and tokenizer is not None and not aligned:
        only_code = {"trust_remote_code": trusted}
        tokenizer = _agreed(tokenizer, config, "", reader, only_code)
    fields = dict(config.config)
    model_type = fields.pop("model_type")
    vocab_size = aligned[1] if aligned else reader.manifest.shared_vocab_size
    fields.setdefault("vocab_size", vocab_size)
    if tokenizer is not None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(tokenizer, name)  # may be an added one, beyond the student's rows
            if token is None or token < fields["vocab_size"]:
                fields.setdefault(name, token)
    try:
        _refuse_unknown(config.config, AutoConfig.for_model(model_type))
        settings = AutoConfig.for_model(model_type, **fields)
        student = AutoModelForCausalLM.from_config(settings, dtype=dtype, **attention)
    except (
        *(ValueError, TypeError, ImportError),
        *(StrictDataclassError, ArithmeticError, RuntimeError),  # transformers' and torch's checks
    ) as error:
        raise ValueError(f"student.config does not give a model: {error}") from error
    return student, tokenizer


def _agreed(
    tokenizer: Any, config: StudentConfig, path: str, reader: CacheReader, where: dict[str, Any]
) -> Any:
    """The tokenizer to save with a student that has one. Raises FormatError if it is another."""
    if config.tokenizer:
        path, where = config.tokenizer, {**where, "revision": None}
    try:
        own = AutoTokenizer.from_pretrained(path, **where)
    except (OSError, ValueError) as error:
        name = "tokenizer" if config.tokenizer else "path"
        raise ValueError(
            f"student.{name} {path} has no tokenizer to compare with the cache's: {error}"
        ) from error
    shared = reader.manifest.shared_vocab_size
    try:
        return agreed_tokenizer(tokenizer, own, path, reader.url, shared)
    except UnfitError as error:
        raise UnfitError(
            f"{error} Or train on what both tokenizers can say: tokenizer_mismatch: align"
        ) from error


def student_vocab_size(
    student: PreTrainedModel, tokenizer: Any | None, reader: CacheReader, tail: str
) -> int:
    """How many of the student's output rows its softmax is over: V of the loss.

    Those of the cache's shared vocabulary; and where the student's tokenizer has tokens that the
    cache's has not, theirs too, as the student may say them: the teacher's mass there is 0, and
    what the student gives them counts into its tail. Rows beyond, which no token has, are padding.
    With tail: uniform, which would spread the teacher's tail over them, they are left out.
    """
    shared = reader.manifest.shared_vocab_size
    if tail == "uniform" or not reader.manifest.tokenizer.files:
        return shared
    more = tokens_more(tokenizer, load_tokenizer(reader))
    rows = int(student.get_output_embeddings().weight.shape[0])
    return max(shared, min(more, rows))


def _pretrained(path: str, **options: Any) -> PreTrainedModel:
    """A student from a directory or the hub, with all of its weights."""
    if Path(path, "adapter_config.json").exists():
        raise ValueError(
            f"student.path {path} holds an adapter alone: merge it into its base first"
        )
    try:
        student, loading = AutoModelForCausalLM.from_pretrained(
            path,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, in one line
            **options,
        )
    except Exception as error:  # whatever a device, a weight file or an architecture may raise
        hint = ""
        if "trust_remote_code" in str(error):
            hint = ". If you have read that code and trust it: student.trust_remote_code: true"
        raise ValueError(f"student.path {path} cannot be loaded: {error}{hint}") from error
    if absent := absent_weights(loading):
        unused = sorted(loading["unexpected_keys"])
        beside = f"; they hold {unused[0]} instead, perhaps renamed" if unused else ""
        raise ValueError(
            f"student.path {path}: {len(absent)} tensors that its config.json asks for are not in "
            f"the weights, or have another shape there, first {absent[0]}{beside}. Copy the model "
            "again, or save it with the transformers class that its config.json names"
        )
    _mend_generation(student, path)
    return student


def absent_weights(loading: dict[str, Any]) -> list[str]:
    """Names of the weights of a model that was loaded that are not in its files as it needs them.

    `loading` is what `from_pretrained` says with `output_loading_info`; these weights are random.
    """
    unlike = [name for name, *_ in loading["mismatched_keys"]]
    return sorted({*loading["missing_keys"], *unlike})


def _mend_generation(student: PreTrainedModel, path: str) -> None:
    """Unset what has no effect in the generation settings: transformers would refuse to save them.

    Many published models say do_sample false beside a temperature.
    """
    settings = student.generation_config
    if settings is None:
        return
    unused = [*SAMPLING] if not settings.do_sample else []
    unused += [*BEAMS] if (settings.num_beams or 1) == 1 else []
    unused += [] if settings.return_dict_in_generate else settings.extra_output_flags
    unused += ["cache_implementation"] if settings.use_cache is False else []
    unused += ["pad_token_id"] if (settings.pad_token_id or 0) < 0 else []
    plain = GenerationConfig()
    removed = {}
    for name in unused:
        value, default = getattr(settings, name, None), getattr(plain, name, None)
        if value is not None and value != default:
            removed[name] = value
            setattr(settings, name, default)
    if removed:
        said = ", ".join(f"{name} {value}" for name, value in removed.items())
        log.info("generation settings of %s have no effect and are left out: %s", path, said)


def fingerprint(student: PreTrainedModel) -> str:
    """Of a student's weights: names, shapes, and the first numbers of each tensor."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(student.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        first = tensor.detach().flatten()[:FINGERPRINTED].cpu().contiguous()
        digest.update(first.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_savable(student: PreTrainedModel, tokenizer: Any | None) -> None:
    """Write what is small of a student into a folder that is dropped.

    Raises ValueError for what would fail at the end of a run: settings that transformers refuses.
    """
    parts = [student.config, student.generation_config, tokenizer]
    with scratch_folder() as folder:
        for part in parts:
            if part is None:
                continue
            try:
                part.save_pretrained(folder)
            except Exception as error:  # whatever a class of the model's own may raise
                raise ValueError(
                    f"the trained student could not be saved: its {type(part).__name__} is refused "
                    f"by transformers: {error}"
                ) from error


def plain_name(name: str) -> str:
    """The name of a weight without what torch.compile puts in between."""
    return name.replace("_orig_mod.", "")


def _refuse_unknown(fields: dict[str, Any], defaults: PreTrainedConfig) -> None:
    """Raise ValueError for names that the configuration would keep without any effect."""
    known = {*defaults.to_dict(), *defaults.attribute_map}
    for name in fields:
        if name not in known and name not in OLDER_NAMES and not hasattr(defaults, name):
            close = difflib.get_close_matches(name, known, n=1)
            meant = f", did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{type(defaults).__name__} has no field {name!r}{meant}")


def compile_layers(student: PreTrainedModel) -> None:
    """Compile the layers that repeat, in place, so that weights keep their names."""
    names = layer_classes(student)
    layers = [module for module in student.modules() if type(module).__name__ in names]
    for module in layers or [student.base_model]:
        module.compile()


def layer_classes(student: torch.nn.Module) -> list[str]:
    """Names of the classes of layers that repeat, as transformers knows them."""
    known = set(getattr(student, "_no_split_modules", None) or ())
    return sorted(known & {type(module).__name__ for module in student.modules()})
