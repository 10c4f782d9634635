"""Files of other tools that are no tables: known distributions in each one's own layout."""

import base64
import io
import itertools
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from tests.support.foreign import K, Known, V


def json_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    """One object per line."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def float32(values: NDArray[np.float64]) -> list[float]:
    return [float(v) for v in values.astype(np.float32)]


def lists_with_label(record: Known) -> list[list[tuple[int, float]]]:
    """Of every token but the first: the actual token, then the K most probable ids."""
    lists = []
    for j, label in enumerate(record.input_ids[1:]):
        top = np.argsort(-record.dense[j])[:K].tolist()
        ids = [label, *(i for i in top if i != label)]
        lists.append(list(zip(ids, float32(record.dense[j, ids]), strict=True)))
    return lists


def vllm_outputs(records: list[Known]) -> list[dict[str, Any]]:
    """`prompt_logprobs` as the server and the engine give them, the tokens beside."""
    return [
        {
            "prompt_token_ids": record.input_ids,
            "prompt_logprobs": [
                None,
                *(
                    {
                        str(i): {"logprob": v, "rank": rank + 1, "decoded_token": f"t{i}"}
                        for rank, (i, v) in enumerate(entries)
                    }
                    for entries in lists_with_label(record)
                ),
            ],
        }
        for record in records
    ]


def vllm_flat(records: list[Known]) -> list[dict[str, Any]]:
    """The same as `FlatLogprobs` holds them."""
    lines = []
    for record in records:
        lists: list[list[tuple[int, float]]] = [[], *lists_with_label(record)]
        ends = np.cumsum([len(entries) for entries in lists]).tolist()
        flat = list(itertools.chain(*lists))
        logprobs = {
            "start_indices": [0, *ends[:-1]],
            "end_indices": ends,
            "token_ids": [i for i, _ in flat],
            "logprobs": [v for _, v in flat],
            "ranks": [1] * len(flat),
        }
        lines.append({"prompt_token_ids": record.input_ids, "prompt_logprobs": logprobs})
    return lines


def vllm_chosen(records: list[Known]) -> list[dict[str, Any]]:
    """Answers of the completions API, in a choice each, as the batch runner writes them."""
    return [
        {
            "id": f"batch-{i}",
            "custom_id": str(i),
            "response": {"status_code": 200, "body": {"id": "x", "choices": [output]}},
        }
        for i, output in enumerate(vllm_outputs(records))
    ]


def trl_sequences(records: list[Known], prompt: int = 1) -> dict[str, Any]:
    """Request and answer of /get_sequence_logprobs/, as JSON lists."""
    lists = [lists_with_label(record)[prompt - 1 :] for record in records]
    return {
        "sequences": [record.input_ids for record in records],
        "prompt_lengths": [prompt] * len(records),
        "temperature": 1.0,
        "logprobs": [[[v for _, v in entries] for entries in of] for of in lists],
        "logprob_token_ids": [[[i for i, _ in entries] for entries in of] for of in lists],
    }


def trl_binary(records: list[Known], prompt: int = 1) -> dict[str, Any]:
    """The same in base64: padded to the longest, the actual tokens' own values beside."""
    lengths = [len(record.input_ids) - prompt for record in records]
    shape = (len(records), max(lengths), K)
    values, ids = np.full(shape, -np.inf, "<f4"), np.zeros(shape, "<i4")
    actual = np.full((*shape[:2], 1), -np.inf, "<f4")
    for i, record in enumerate(records):
        top_ids, top = record.top()
        values[i, : lengths[i]], ids[i, : lengths[i]] = top[prompt - 1 :], top_ids[prompt - 1 :]
        own = record.dense[np.arange(len(record.dense)), record.input_ids[1:]]
        actual[i, : lengths[i], 0] = own[prompt - 1 :]

    def text(array: NDArray) -> str:
        return base64.b64encode(array.tobytes()).decode()

    return {
        "sequences": [record.input_ids for record in records],
        "prompt_lengths": [prompt] * len(records),
        "shape": list(shape),
        "completion_lengths": lengths,
        "logprobs_b64": text(values),
        "token_ids_b64": text(ids),
        "actual_logprobs_b64": text(actual),
        "actual_token_ids_b64": text(np.zeros((*shape[:2], 1), "<i4")),
    }


def trl_generated(records: list[Known], prompt: int = 1) -> dict[str, Any]:
    """An answer of /generate/."""
    answer = trl_sequences(records, prompt)
    sequences = answer.pop("sequences")
    del answer["prompt_lengths"]
    return {
        "prompt_ids": [tokens[:prompt] for tokens in sequences],
        "completion_ids": [tokens[prompt:] for tokens in sequences],
        **answer,
    }


def tinker_prompts(records: list[Known]) -> list[dict[str, Any]]:
    """Sample responses with the top K of the prompt and the actual tokens' own log probs."""
    lines = []
    for record in records:
        pairs = [list(zip(*lists, strict=True)) for lists in zip(*record.top(), strict=True)]
        own = record.dense[np.arange(len(record.dense)), record.input_ids[1:]]
        lines.append(
            {
                "prompt": {"chunks": [{"type": "encoded_text", "tokens": record.input_ids}]},
                "sequences": [{"stop_reason": "length", "tokens": [1], "logprobs": [-0.5]}],
                "prompt_logprobs": [None, *float32(own)],
                "topk_prompt_logprobs": [None, *pairs],
            }
        )
    return lines


def tinker_sampled(records: list[Known], prompt: int = 4) -> list[dict[str, Any]]:
    """The same, of which all but the first tokens were sampled."""
    lines = []
    for line in tinker_prompts(records):
        tokens = line["prompt"]["chunks"][0]["tokens"]
        own, lists = line["prompt_logprobs"], line["topk_prompt_logprobs"]
        answer = {
            "tokens": tokens[prompt:],
            "logprobs": own[prompt:],
            "topk_logprobs": lists[prompt:],
        }
        lines.append(
            {
                "prompt": tokens[:prompt],
                "response": {
                    "sequences": [answer],
                    "prompt_logprobs": own[:prompt],
                    "topk_prompt_logprobs": lists[:prompt],
                },
            }
        )
    return lines


def same_length(records: list[Known]) -> list[Known]:
    """All cut to the even length of the shortest, and one token more."""
    length = min(len(record.dense) for record in records) // 2 * 2
    return [Known(r.input_ids[: length + 1], r.dense[:length]) for r in records]


def megatron_tars(
    folder: Path,
    records: list[Known],
    *,
    cp: int = 1,
    dp: int = 1,
    batch: int = 1,
    dtype: torch.dtype = torch.float16,
    nucleus: float | None = None,
    per_tar: int = 1,
) -> Path:
    """Tars of cp x dp ranks, one microbatch of `batch` samples for each in an iteration."""
    folder.mkdir()
    per_iteration = dp * batch
    iterations = len(records) // per_iteration
    meta = json.dumps({"hash": "0", "saver": {"k": K, "p": nucleus}}).encode()
    for c, d in itertools.product(range(cp), range(dp)):
        members: list[tuple[int, bytes]] = []
        for i in range(iterations):
            first = i * per_iteration + d * batch
            tensors = [_top(r, dtype, nucleus) for r in records[first : first + batch]]
            values, ids = (torch.stack([t[j] for t in tensors], dim=1) for j in (0, 1))
            chunks = len(values) // (2 * cp)
            parts = [slice(n * chunks, (n + 1) * chunks) for n in (c, 2 * cp - 1 - c)]
            values, ids = (torch.cat([t[part] for part in parts]) for t in (values, ids))
            buffer = io.BytesIO()
            saved = {
                "values": [values],
                "indices_low": [(ids & 0xFFFF).to(torch.uint16)],
                "bit_17": [(ids >> 16).to(torch.bool)],
            }
            torch.save(saved, buffer)
            members.append((i + 1, zstandard.ZstdCompressor().compress(buffer.getvalue())))
        for start in range(0, iterations, per_tar):
            run = members[start : start + per_tar]
            with tarfile.open(folder / f"cp{c}_dp{d}__{run[-1][0]}.tar", "w") as tar:
                for name, data in [("_meta.json", meta), *((f"{n}.pt.zst", b) for n, b in run)]:
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def _top(
    record: Known, dtype: torch.dtype, nucleus: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    ids, values = (torch.tensor(lists) for lists in record.top())
    if nucleus is not None:
        p = values.double().exp()
        beyond = p.cumsum(-1) - p >= nucleus
        values, ids = values.masked_fill(beyond, -1e3), ids.masked_fill(beyond, -1)
    return values.to(dtype), ids


def kld_base(path: Path, records: list[Known], *, chunks: int | None = None) -> Path:
    """llama.cpp's file of these records: one chunk each, its second half scored."""
    n_ctx = len(records[0].input_ids)
    first, width = n_ctx // 2, 2 * ((V + 1) // 2)
    with path.open("wb") as file:
        file.write(b"_logits_")
        file.write(
            np.array([n_ctx, V, len(records) if chunks is None else chunks], "<i4").tobytes()
        )
        file.write(np.array([r.input_ids for r in records], "<i4").tobytes())
        for record in records:
            for dense in record.dense[first : n_ctx - 1].astype(np.float32):
                low = max(dense.min(), dense.max() - np.float32(16))
                scale = (dense.max() - low) / np.float32(65535)
                codes = np.zeros(width, "<u2")
                codes[:V] = np.where(dense > low, np.rint((dense - low) / scale), 0)
                file.write(np.array([scale, low], "<f4").tobytes() + codes.tobytes())
    return path
