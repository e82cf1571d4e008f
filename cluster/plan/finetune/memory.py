"""The memory of one GPU that fine-tunes a model with LoRA, and the arithmetic of a step. Knows no price and no recipe's options.

As examples/finetune/finetune.py does it: the base is frozen, in bfloat16 or in 8 or 4 bits; adapters beside every matrix of a layer, their
gradients and Adam's two moments are in float32; of each layer only the input is kept, and backward computes the layer again (gradient
checkpointing).
"""

from dataclasses import dataclass

from cluster.plan.gpus import GIB, Gpu
from workers.config import EngineConfig, ModelConfig, Quantization
from workers.device.model_bytes import num_parameters, weight_bytes

ADAPTER_BYTES = 16  # of a parameter: itself, its gradient and two moments, in float32
# The CUDA context with the cuBLAS workspace, and what the allocator keeps in pieces. Assumed: only a run on the GPU can measure it.
CUDA_BYTES = GIB
FLOPS_PER_WEIGHT = 6  # of a token: forward, once more in backward, and the gradient of the inputs; the base's own gradient is not needed


@dataclass(frozen=True, kw_only=True)
class Training:
    """A step computes `batch_size` conversations of `max_length` tokens at a time."""

    rank: int
    batch_size: int
    max_length: int

    @property
    def num_tokens(self) -> int:
        return self.batch_size * self.max_length


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes. kept: the inputs of all layers. most: of the largest part that is computed at a time, a layer or the logits."""

    weights: int
    adapters: int
    kept: int
    most: int
    cuda: int

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.kept + self.most + self.cuda


def training_memory(model: ModelConfig, training: Training, quantization: Quantization | None) -> TrainingMemory:
    """Raises ConfigError for a model that cannot be quantised."""
    base = EngineConfig(model_path="", model=model, device="cuda", dtype="bfloat16", quantization=quantization)
    tokens = training.num_tokens
    return TrainingMemory(
        weights=weight_bytes(base),
        adapters=ADAPTER_BYTES * num_adapter_parameters(model, training.rank),
        kept=model.num_hidden_layers * tokens * model.hidden_size * 2,
        most=max(_layer_bytes(model, training, quantization), _logits_bytes(model, tokens)),
        cuda=CUDA_BYTES,
    )


def num_adapter_parameters(model: ModelConfig, rank: int) -> int:
    """A matrix of n inputs and m outputs has n + m for each rank. Mistral 7B with rank 16: 41,943,040."""
    hidden, inner = model.hidden_size, model.intermediate_size
    queries, keys = (n * model.head_dim for n in (model.num_attention_heads, model.num_key_value_heads))
    each = 2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + inner)
    return model.num_hidden_layers * rank * each


def tokens_per_s(model: ModelConfig, gpu: Gpu) -> float:
    """At best: the arithmetic of the base at the GPU's rate."""
    base = EngineConfig(model_path="", model=model, device="cuda", dtype="bfloat16")
    return gpu.flops_per_s / (FLOPS_PER_WEIGHT * num_parameters(base))


def _layer_bytes(model: ModelConfig, training: Training, quantization: Quantization | None) -> int:
    """What backward keeps of a layer that it computes again: of each token some 16 vectors as wide as the model (norms in float32, the
    residual stream, what attention takes and gives), 6 as wide as its inner layer, and the inputs of the adapters' second matrices.
    """
    queries, keys = (n * model.head_dim for n in (model.num_attention_heads, model.num_key_value_heads))
    values = 16 * model.hidden_size + 6 * model.intermediate_size + 3 * (queries + 2 * keys) + 7 * training.rank
    # The plain numbers of one quantised matrix, made for a product.
    plain = 0 if quantization is None else model.hidden_size * model.intermediate_size * 6
    return training.num_tokens * values * 2 + plain


def _logits_bytes(model: ModelConfig, tokens: int) -> int:
    """In bfloat16 and float32, their log-softmax, and the gradient of both."""
    return tokens * model.vocab_size * (2 + 4 + 4 + 4)
