"""Writes a checkpoint in Hugging Face's layout as GGUF files for llama.cpp, without its vocabulary. Knows tensor names, no speed.

    python gguf_files.py JOB      JOB: {"model": FOLDER, "types": ["F32", "BF16", "Q8_0", "Q4_0"]}

Runs in the peer's own environment. Quantized files come from llama.cpp's own function with its defaults.
"""

import ctypes
import json
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import timing

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def read_bf16(path: Path) -> dict[str, np.ndarray]:
    """Name -> uint16 bits of a bfloat16 tensor. numpy has no such type, so the safetensors header is read here."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    header_bytes = int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8 : 8 + header_bytes].tobytes())
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise SystemExit(f"{name} is {entry['dtype']}, not BF16.")
        begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
        tensors[name] = data[begin:end].view(np.uint16).reshape(entry["shape"])
    return tensors


def llama_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.weight"
    return f"{NAMES[stem]}.weight"


def interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of q or k in llama.cpp's order: it rotates neighbors, Hugging Face the two halves of a head."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write(folder: Path, target: Path, *, as_float: bool) -> None:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if as_float else gguf.LlamaFileType.MOSTLY_BF16)
    for name, bits in read_bf16(folder / "model.safetensors").items():
        if "q_proj" in name or "k_proj" in name:
            key = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            bits = interleaved(bits, config[key])
        if as_float or bits.ndim == 1:
            writer.add_tensor(llama_name(name), (bits.astype(np.uint32) << 16).view(np.float32))
        else:
            rows = np.ascontiguousarray(bits).view(np.uint8)
            writer.add_tensor(llama_name(name), rows, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, target: Path, file_type: str) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = 1
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{file_type}")
    if status := llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise SystemExit(f"llama_model_quantize returned {status} for {file_type}.")


def main() -> None:
    job = timing.read_job()
    folder = Path(job["model"])
    for file_type in job["types"]:
        target = folder / f"{file_type}.gguf"
        if target.exists():
            continue
        partial = target.with_suffix(".partial")
        if file_type in ("F32", "BF16"):
            write(folder, partial, as_float=file_type == "F32")
        else:
            quantize(folder / "F32.gguf", partial, file_type)
        partial.rename(target)
    timing.write_result({"types": job["types"]})


if __name__ == "__main__":
    main()
