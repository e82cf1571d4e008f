"""How many bytes a rank needs for its weights, rotary table and KV cache: arithmetic on an EngineConfig, the same as the engine's.

Layer shapes as in workers/model. Knows no device, no file and no torch.
"""

import math

from workers.config import DTYPE_BYTES, QUANTIZATION_GROUP_BYTES, QUANTIZATION_GROUP_SIZE, EngineConfig


def num_parameters(config: EngineConfig) -> int:
    """The number of parameters of one rank. Every rank has all norms; everything else is divided, the vocabulary rounded up."""
    model = config.model
    norms = (2 * model.num_hidden_layers + 1) * model.hidden_size
    vocabulary = vocabulary_weights(config) * (1 if model.tie_word_embeddings else 2)
    return num_layer_weights(config) + num_biases(config) + norms + vocabulary


def num_biases(config: EngineConfig) -> int:
    """Of one rank: those of what it computes a part of are divided, and every rank has the whole of those added to a sum over ranks."""
    model, size, biases = config.model, config.tensor_parallel_size, 0
    if model.attention_bias:
        heads = model.num_attention_heads // size + 2 * model.kv_heads_per_rank(size)
        biases += heads * model.head_dim + model.hidden_size
    if model.mlp_bias:
        biases += 2 * model.intermediate_per_rank(size) + model.hidden_size
    return model.num_hidden_layers * biases


def num_layer_weights(config: EngineConfig) -> int:
    """The elements of the matrices in all layers of the rank with the most."""
    model, size = config.model, config.tensor_parallel_size
    heads = 2 * model.num_attention_heads // size + 2 * model.kv_heads_per_rank(size)  # q, o; k, v
    each = heads * model.head_dim + 3 * model.intermediate_per_rank(size)
    return model.num_hidden_layers * model.hidden_size * each


def vocabulary_weights(config: EngineConfig) -> int:
    """The elements of one rank's embedding, and of its output head."""
    return -(-config.model.vocab_size // config.tensor_parallel_size) * config.model.hidden_size


def weight_bytes(config: EngineConfig) -> int:
    """Bytes of one rank's parameters.

    With narrow weights, only embedding and norms take more in float32 than in bfloat16: a 7B model takes 14.8 GB.

    Quantized, 32 weights of a matrix take 34 bytes (int8) or 18 (int4), and embedding, norms and a tied head stay in the dtype: a 7B model
    of 7,248,023,552 parameters takes 29.0 GB in float32, 14.5 in bfloat16, 7.8 with int8 and 4.3 with int4.
    """
    layers, head = num_layer_weights(config), 0 if config.model.tie_word_embeddings else vocabulary_weights(config)
    others = (num_parameters(config) - layers - head) * DTYPE_BYTES[config.dtype]
    return others + matrix_bytes(config, layers) + (head_bytes(config) if head or has_own_head(config) else 0)


def matrix_bytes(config: EngineConfig, num_weights: int) -> int:
    """Bytes of so many elements of the layers' matrices, in the form that `config` keeps them in."""
    if config.quantization is not None:
        return num_weights // QUANTIZATION_GROUP_SIZE * QUANTIZATION_GROUP_BYTES[config.quantization]
    stored = config.model.stored
    itemsize = dense_itemsize(config)
    bits = None if stored is None else stored.layer_bits if config.device == "cpu" else stored.file_bits
    if stored is None or bits is None:
        return num_weights * itemsize
    return math.ceil(num_weights * (bits / 8 + stored.dense_share * itemsize))


def dense_itemsize(config: EngineConfig) -> int:
    """Bytes of an element of a matrix that is not quantized. A table that rows are looked up in, and norms, are in the dtype."""
    return DTYPE_BYTES["bfloat16"] if config.narrow_weights else DTYPE_BYTES[config.dtype]


def has_own_head(config: EngineConfig) -> bool:
    """Whether a tied head is kept in its stored form, next to the table of plain numbers that looking up tokens needs."""
    stored = config.model.stored
    return config.model.tie_word_embeddings and stored is not None and stored.head_bits is not None


def head_bytes(config: EngineConfig) -> int:
    """Bytes of one rank's output head, beside the embedding. A tied one is quantized only where the checkpoint's embedding is."""
    num_weights, stored = vocabulary_weights(config), config.model.stored
    if config.quantization is not None and not config.model.tie_word_embeddings:
        return matrix_bytes(config, num_weights)
    bits = None if stored is None else stored.head_bits
    return num_weights * dense_itemsize(config) if bits is None else math.ceil(num_weights * bits / 8)


def rotary_bytes(config: EngineConfig) -> int:
    """Bytes of the table of cosines and sines: float32, one row per position, on every rank. Queries may have a factor in each row."""
    model = config.model
    return config.max_model_len * (2 * model.head_dim + (model.query_scaling is not None)) * 4


def lora_tables(config: EngineConfig) -> list[tuple[int, tuple[int, ...]]]:
    """The linear layers of one decoder layer on one rank, as adapters see them: inputs, and the outputs of each matrix that it joins."""
    model, size = config.model, config.tensor_parallel_size
    hidden, intermediate = model.hidden_size, model.intermediate_per_rank(size)
    q, kv = model.num_attention_heads // size * model.head_dim, model.kv_heads_per_rank(size) * model.head_dim
    return [(hidden, (q, kv, kv)), (q, (hidden,)), (hidden, (intermediate, intermediate)), (intermediate, (hidden,))]


def lora_bytes(config: EngineConfig) -> int:
    """Bytes of the slots for adapters on one rank of a GPU, each as large as the largest adapter; as TritonLoraTable allocates them.

    A slot for rank 64 of a 7B model has, in each layer, 64 x 81,920 numbers: in bfloat16 10.5 MB, times 32 layers 336 MB, and 8 slots
    2.7 GB. On the CPU adapters are read where they lie on the host.
    """
    if not config.enable_lora or config.device != "cuda":
        return 0
    tables = lora_tables(config)
    values = sum(config.max_lora_rank * (inputs + n) for inputs, outputs in tables for n in outputs)
    matrices = sum(len(outputs) for _, outputs in tables)
    # Where the numbers of each matrix begin, its rank and its scale; and once where its columns begin and the last ones end.
    slot_bytes = values * DTYPE_BYTES[config.dtype] + matrices * 16
    return config.model.num_hidden_layers * (config.max_loras * slot_bytes + (matrices + len(tables)) * 4)


def cpu_kv_cache_bytes(config: EngineConfig) -> int:
    """Bytes of one CPU rank's KV cache when it is full, with the null block: as workers/kv_cache/tensors.py allocates it."""
    num_blocks = config.num_kv_blocks
    if num_blocks is None:
        num_blocks = max(0, config.num_kv_blocks_within(config.kv_cache_bytes))
    return (num_blocks + 1) * config.kv_block_bytes
