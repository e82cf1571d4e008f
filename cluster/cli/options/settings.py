"""From parsed arguments to configuration: an EngineConfig and a ServeConfig, checked and complete before anything starts.

Knows the defaults that depend on the model and the device. Knows no Ray and no torch.
"""

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.cli.options.option import Option
from cluster.cli.options.rows.adapters import LORA_ENGINE_ROWS
from cluster.cli.options.rows.serve import SERVE
from cluster.cli.options.rows.shared import ENGINE_ROWS, TENSOR_PARALLEL_SIZE
from cluster.config.checkpoint_kinds import check_kind
from cluster.config.dtype import Cpus, choose_dtype, keeps_more_in_float32, keeps_narrow, stored_dtype, this_machine
from cluster.config.engine import MAX_DEFAULT_MODEL_LEN, Device, default_block_size
from cluster.config.sampling_defaults import read_sampling_defaults
from cluster.config.serve import ServeConfig
from workers.checkpoint.model_config import load_model_config
from workers.config import EngineConfig, ModelConfig
from workers.device.sizes import CPU, DEVICE_SIZES, SMALLEST_GPU, decide
from workers.errors import ConfigError


def settings_of(config: type, args: Namespace, options: Iterable[Option]) -> dict[str, Any]:
    """Field name -> value, for every option that fills a field of `config`. What `args` lacks, or has as None, is the row's default."""
    settings: dict[str, Any] = {}
    for option in options:
        if option.fills is not None and option.fills.config is config:
            value = getattr(args, option.dest, None)
            settings |= option.fills.values(option.default if value is None else value)
    return settings


def serve_config(
    args: Namespace, folder: Path, model_name: str, *, device: Device, cpus: Cpus = this_machine
) -> ServeConfig:
    """cpus: as in `engine_config`. Raises ConfigError with the message for the user."""
    settings = settings_of(ServeConfig, args, SERVE.options)
    settings["engine"], settings["dtype_reason"] = engine_config(args, folder, device=device, cpus=cpus)
    settings["model_name"] = args.served_model_name or model_name
    settings["sampling_defaults"] = read_sampling_defaults(folder, settings["generation_config"])
    return ServeConfig(**settings)


def serve_defaults() -> dict[str, Any]:
    """Every field of ServeConfig that an option of `serve` fills, as it is without the option; not the engine and the model's name."""
    defaults = settings_of(ServeConfig, Namespace(), SERVE.options)
    del defaults["model_name"]
    return defaults


def engine_config(
    args: Namespace, folder: Path, *, device: Device, cpus: Cpus = this_machine
) -> tuple[EngineConfig, str | None]:
    """One replica's engine, and why --dtype auto has chosen its dtype, if there is a reason to name.

    cpus: those of the machines on which ranks may run. Raises ConfigError.
    """
    check_kind(folder)
    model = _with_end_tokens(load_model_config(folder), folder)
    max_model_len = args.max_model_len
    if max_model_len is None:
        max_model_len = min(model.max_position_embeddings, MAX_DEFAULT_MODEL_LEN)
    elif max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {max_model_len} is more than the model supports.",
            remedy=f"Use at most {model.max_position_embeddings}.",
            param="--max-model-len",
        )
    settings = settings_of(EngineConfig, args, (*ENGINE_ROWS, *LORA_ENGINE_ROWS, TENSOR_PARALLEL_SIZE))
    settings["enable_lora"] |= bool(getattr(args, "lora", None))
    given = {name: getattr(args, name, None) for name in DEVICE_SIZES}
    stored = model.dtype if device == "cuda" else stored_dtype(folder, model)
    keeps_more = keeps_more_in_float32(model)
    dtype = choose_dtype(args.dtype, device=device, stored=stored, cpus=cpus, keeps_more=keeps_more)
    sizes = decide(CPU if device == "cpu" else SMALLEST_GPU, **given)
    settings |= {
        "model_path": str(folder),
        "tokenizer_path": _tokenizer_path(folder),
        "model": model,
        "device": device,
        "dtype": dtype.dtype,
        "narrow_weights": keeps_narrow(dtype.dtype, device=device, stored=stored, model=model),
        "max_model_len": max_model_len,
        "block_size": args.block_size or default_block_size(settings["attention_backend"]),
        "max_num_seqs": sizes.max_num_seqs,
        "max_num_batched_tokens": sizes.max_num_batched_tokens,
        # The rest is for the ranks, which see their GPU.
        "sized_by_device": () if device == "cpu" else tuple(name for name, value in given.items() if value is None),
    }
    return EngineConfig(**settings), dtype.reason


def _with_end_tokens(model: ModelConfig, folder: Path) -> ModelConfig:
    """The tokenizer's end token ends an answer too. Raises ConfigError."""
    if model.layout == "mistral":
        return model
    from cluster.text.end_tokens import tokenizer_end_tokens  # late, like the tokenizer below

    more = [i for i in tokenizer_end_tokens(folder) if i < model.vocab_size]
    return replace(model, eos_token_ids=tuple(dict.fromkeys([*model.eos_token_ids, *more])))


def _tokenizer_path(folder: Path) -> str | None:
    from cluster.text.tokenizer_file import find_tokenizer  # late: refusing an option does not need SentencePiece

    try:
        return str(find_tokenizer(folder))
    except ConfigError:  # loading the text raises it again; requests with token ids work without
        return None
