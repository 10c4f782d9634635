"""A tiny Qwen2 as one GGUF file, as llama.cpp's converter writes it."""

import json
from pathlib import Path
from typing import Any

import torch


def save_gguf(path: Path, model: Any, tokenizer: Any, kind: str) -> Any:
    """Save a Qwen2 as one GGUF file; returns the model with the weights that the file holds."""
    import gguf

    quantised = gguf.GGMLQuantizationType[kind]
    settings = model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_block_count(settings.num_hidden_layers)
    writer.add_feed_forward_length(settings.intermediate_size)
    writer.add_head_count(settings.num_attention_heads)
    writer.add_head_count_kv(settings.num_key_value_heads)
    writer.add_rope_freq_base(settings.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(settings.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}" if kind != "F32" else "ALL_F32"])
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = sorted(data["model"]["vocab"], key=data["model"]["vocab"].__getitem__)
    vocabulary.append("<|endoftext|>")  # which Qwen2's tokenizers have
    vocabulary += [f"<pad{i}>" for i in range(settings.vocab_size - len(vocabulary))]
    special = {token["content"] for token in data["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in data["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, settings.num_hidden_layers)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            values = weight.numpy()
            target = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if values.ndim == 2:
                packed = gguf.quantize(values, quantised)
                weight.copy_(torch.from_numpy(gguf.dequantize(packed, quantised)))
                writer.add_tensor(target, packed, raw_dtype=quantised)
            else:
                writer.add_tensor(target, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
