"""How many bytes a rank needs for its weights, rotary table and KV cache: arithmetic on an EngineConfig, the same as the engine's.

Layer shapes as in workers/model. Knows no device, no file and no torch.
"""

from workers.config import DTYPE_BYTES, QUANTIZATION_GROUP_BYTES, QUANTIZATION_GROUP_SIZE, EngineConfig


def num_parameters(config: EngineConfig) -> int:
    """The number of parameters of one rank. Every rank has all norms; everything else is divided, the vocabulary rounded up."""
    model = config.model
    norms = (2 * model.num_hidden_layers + 1) * model.hidden_size
    return num_layer_weights(config) + norms + vocabulary_weights(config) * (1 if model.tie_word_embeddings else 2)


def num_layer_weights(config: EngineConfig) -> int:
    """The elements of the matrices in all layers of one rank."""
    model, size = config.model, config.tensor_parallel_size
    heads = (2 * model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim  # q, o; k, v
    return model.num_hidden_layers * (model.hidden_size * (heads + 3 * model.intermediate_size) // size)


def vocabulary_weights(config: EngineConfig) -> int:
    """The elements of one rank's embedding, and of its output head."""
    return -(-config.model.vocab_size // config.tensor_parallel_size) * config.model.hidden_size


def weight_bytes(config: EngineConfig) -> int:
    """Bytes of one rank's parameters.

    Quantized, 32 weights of a matrix take 34 bytes (int8) or 18 (int4), and embedding, norms and a tied head stay in the dtype: a 7B model
    of 7,248,023,552 parameters takes 29.0 GB in float32, 14.5 in bfloat16, 7.8 with int8 and 4.3 with int4.
    """
    itemsize = DTYPE_BYTES[config.dtype]
    matrices = num_layer_weights(config)
    if not config.model.tie_word_embeddings:
        matrices += vocabulary_weights(config)
    return (num_parameters(config) - matrices) * itemsize + matrix_bytes(config, matrices)


def matrix_bytes(config: EngineConfig, num_weights: int) -> int:
    """Bytes of so many elements of matrices, in the form that `config` keeps them in."""
    if config.quantization is None:
        return num_weights * DTYPE_BYTES[config.dtype]
    return num_weights // QUANTIZATION_GROUP_SIZE * QUANTIZATION_GROUP_BYTES[config.quantization]


def rotary_bytes(config: EngineConfig) -> int:
    """Bytes of the table of cosines and sines: float32, one row per position, on every rank."""
    return config.max_model_len * 2 * config.model.head_dim * 4


def cpu_kv_cache_bytes(config: EngineConfig) -> int:
    """Bytes of one CPU rank's KV cache when it is full, with the null block: as workers/kv_cache/tensors.py allocates it."""
    num_blocks = config.num_kv_blocks
    if num_blocks is None:
        num_blocks = max(0, config.num_kv_blocks_within(config.kv_cache_bytes))
    return (num_blocks + 1) * config.kv_block_bytes
