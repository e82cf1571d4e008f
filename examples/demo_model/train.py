"""Trains the demo model: `make demo-model`, or `python examples/demo_model/train.py --steps 2600`.

Writes a Hugging Face checkpoint (config.json, model.safetensors in bf16, tokenizer.model.v3) and the model card next to
this file. The model is transformers' MistralForCausalLM, so the checkpoint does not depend on the engine that serves it.
Needs the `dev` extra and a CPU: about an hour on 2 cores.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from corpus import Document, documents
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM

HERE = Path(__file__).parent
VOCAB_SIZE = 4096
# The v3 control tokens in the order of Mistral's own v3 tokenizer; ids 0 to 2 are <unk>, <s>, </s>.
CONTROL_TOKENS = ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"]
CONTROL_TOKENS += ["[/TOOL_RESULTS]"]
BOS, EOS, INST, END_INST = 1, 2, 3, 4
SEQUENCE_TOKENS = 512
CONFIG = MistralConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    sliding_window=256,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    tie_word_embeddings=False,
    bos_token_id=BOS,
    eos_token_id=EOS,
)


def train_tokenizer(docs: list[Document], folder: Path) -> sentencepiece.SentencePieceProcessor:
    """A byte-fallback BPE vocabulary that keeps white space unchanged, because in Python it is syntax."""
    sentences = (line for doc in docs if not doc.held_out for line in _pieces_of(doc.text))
    with (folder / "tokenizer.model.v3").open("wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=f,
            vocab_size=VOCAB_SIZE,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            control_symbols=CONTROL_TOKENS,
            # A line break is always its own token, so a prompt that ends with "def f(n):" ends like training text.
            user_defined_symbols=["\n"],
            character_coverage=0.9995,
            minloglevel=2,
        )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model.v3"))


def _pieces_of(text: str, size: int = 2000) -> list[str]:
    # SentencePiece drops sentences over 4,192 bytes.
    return [text[i : i + size] for i in range(0, len(text), size)]


def encode(docs: list[Document], tokenizer: sentencepiece.SentencePieceProcessor) -> tuple[np.ndarray, np.ndarray]:
    """(training ids, held-out ids), each one flat array of documents in a row; chat turns in the v3 template."""
    parts: dict[bool, list[int]] = {False: [], True: []}
    for doc in docs:
        ids = [BOS]
        if doc.question is not None:
            ids += [INST, *tokenizer.encode(doc.question), END_INST]
        parts[doc.held_out] += [*ids, *tokenizer.encode(doc.text), EOS]
    return np.array(parts[False], dtype=np.int64), np.array(parts[True], dtype=np.int64)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, ids: np.ndarray) -> float:
    """Mean next-token cross-entropy in nats over consecutive windows of SEQUENCE_TOKENS."""
    windows = torch.from_numpy(ids[: len(ids) // SEQUENCE_TOKENS * SEQUENCE_TOKENS]).view(-1, SEQUENCE_TOKENS)
    model.eval()
    losses = [loss_of(model, batch).item() * len(batch) for batch in windows.split(8)]
    model.train()
    return sum(losses) / len(windows)


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def train(
    model: MistralForCausalLM, train_ids: np.ndarray, held_out: np.ndarray, *, num_steps: int, batch: int
) -> dict[str, float]:
    """Muon for the matrices, AdamW for the rest; warm-up, constant, then linear decay over the last 60 % of the steps."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n or "lm_head" in n]
    optimizers = {
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.05): 0.02,
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0): 3e-3,
    }
    rng = np.random.default_rng(0)
    began, losses = time.monotonic(), []
    for step in range(num_steps):
        scale = min(1.0, (step + 1) / 50, (1 - step / num_steps) / 0.6)
        offsets = rng.integers(0, len(train_ids) - SEQUENCE_TOKENS, batch)
        ids = torch.from_numpy(np.stack([train_ids[o : o + SEQUENCE_TOKENS] for o in offsets]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, lr in optimizers.items():
            optimizer.param_groups[0]["lr"] = lr * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            rate = (step + 1) * ids.numel() / (time.monotonic() - began)
            print(f"step {step + 1} loss {np.mean(losses[-50:]):.3f} {rate:.0f} tokens/s", flush=True)
        if (step + 1) % 500 == 0:
            print(f"held-out loss {held_out_loss(model, held_out):.3f}", flush=True)
    tokens = num_steps * batch * SEQUENCE_TOKENS
    return {"steps": num_steps, "tokens": tokens, "minutes": (time.monotonic() - began) / 60}


def save(model: MistralForCausalLM) -> None:
    model.save_pretrained(HERE)
    (HERE / "generation_config.json").unlink(missing_ok=True)
    # In bf16, as real Mistral checkpoints are.
    weights = {k: v.to(torch.bfloat16) for k, v in load_file(HERE / "model.safetensors").items()}
    save_file(weights, HERE / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((HERE / "config.json").read_text())
    config.update(dtype="bfloat16")
    (HERE / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_card(report: dict[str, float | str]) -> None:
    template = (HERE / "card_template.md").read_text()
    (HERE / "README.md").write_text(template.format(**report))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    torch.manual_seed(0)
    docs = documents()
    tokenizer = train_tokenizer(docs, HERE)
    train_ids, held_out = encode(docs, tokenizer)
    print(f"{len(train_ids):,} training tokens, {len(held_out):,} held out", flush=True)
    model = MistralForCausalLM(CONFIG)
    report: dict[str, float | str] = {}
    report |= train(model, train_ids, held_out, num_steps=args.steps, batch=args.batch)
    save(model)
    loss = held_out_loss(model.to(torch.bfloat16).float(), held_out)
    held_out_chars = sum(len(doc.text) + len(doc.question or "") for doc in docs if doc.held_out)
    report |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_char": loss / math.log(2) * len(held_out) / held_out_chars,
        "train_tokens": len(train_ids),
        "held_out_tokens": len(held_out),
        "python": platform.python_version(),
    }
    write_card(report)
    print(report, flush=True)


if __name__ == "__main__":
    main()
