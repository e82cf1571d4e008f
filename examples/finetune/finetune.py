"""Fine-tunes a model with LoRA on conversations, and writes an adapter in PEFT's format. One file: read it, copy it, change it.

    pip install 'tramontane[finetune]'
    python examples/finetune/finetune.py MODEL data.jsonl --output out --steps 300
    python examples/finetune/finetune.py MODEL data.jsonl --output out --merge merged      # afterwards: a checkpoint to serve

A line of the data: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}. The conversation is written
with the chat template that `tramontane serve` would use for MODEL, and only the answers count for the loss. Every --save-every steps the
state goes to the output folder; the same command goes on from there after any interruption, on the same data in the same order.

Memory for Mistral 7B on one GPU of 24 GB: 14.5 GB of weights in bfloat16, 0.7 GB for 42 M parameters of LoRA of rank 16 with gradients and
Adam's state in float32, and with gradient checkpointing about 3 GB of activations for 4 x 1,024 tokens. --quantize keeps the weights in
4 bits: 4.1 GB (QLoRA: Dettmers et al., 2023).
"""

import argparse
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM

from cluster.text.chat.template import Message
from cluster.text.load import load_text

IGNORED = -100  # torch's index for labels that do not count
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Example:
    """labels: the ids of the answers, and IGNORED elsewhere."""

    ids: list[int]
    labels: list[int]


def read_examples(path: Path, folder: Path, *, vocab_size: int, chat_template: str, max_length: int) -> list[Example]:
    """Raises SystemExit for a line that is not a conversation. Conversations longer than `max_length` tokens are cut at the end."""
    text = load_text(folder, chat_template=chat_template, model_vocab_size=vocab_size)
    print(f"Chat template: {text.choice}")
    examples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            messages = [Message(m["role"], m["content"]) for m in json.loads(line)["messages"]]
        except (ValueError, KeyError, TypeError) as e:
            raise SystemExit(
                f"{path}, line {number} is not a conversation: {e!r}. Each line needs 'messages' with role and content."
            ) from e
        ids: list[int] = []
        labels: list[int] = []
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt = text.chat_template.encode(messages[:i]).token_ids
            # What comes before this answer does not count again; templates may write it a little differently than before.
            ids, labels = [*prompt], [*labels[: len(prompt)], *[IGNORED] * max(0, len(prompt) - len(labels))]
            answer = [*text.tokenizer.encode_continuation(message.content), text.tokenizer.eos_token_id]
            ids += answer
            labels += answer
        if not ids:
            raise SystemExit(f"{path}, line {number} has no message of role 'assistant', from which to learn.")
        examples.append(Example(ids[:max_length], labels[:max_length]))
    if not examples:
        raise SystemExit(f"{path} has no conversations.")
    return examples


def batches(examples: list[Example], size: int, *, seed: int, start: int, device: str) -> Any:
    """Endless, in an order that depends on the seed only; from number `start` on. A batch is padded to its longest example."""
    number = 0
    for epoch in range(1 << 30):
        order = random.Random(seed * 1_000_003 + epoch).sample(range(len(examples)), len(examples))
        for begin in range(0, len(order), size):
            if number >= start:
                chosen = [examples[i] for i in order[begin : begin + size]]
                width = max(len(e.ids) for e in chosen)
                rows = [
                    (e.ids + [0] * (width - len(e.ids)), e.labels + [IGNORED] * (width - len(e.ids)), len(e.ids))
                    for e in chosen
                ]
                mask = torch.arange(width)[None] < torch.tensor([n for *_, n in rows])[:, None]
                yield {
                    "input_ids": torch.tensor([ids for ids, *_ in rows], device=device),
                    "labels": torch.tensor([labels for _, labels, _ in rows], device=device),
                    "attention_mask": mask.long().to(device),
                }
            number += 1


def load_model(args: argparse.Namespace, device: str) -> Any:
    """The base with fresh adapters. In 4 bits, only the adapters are in bfloat16."""
    options: dict[str, Any] = {"dtype": torch.bfloat16 if device == "cuda" else torch.float32}
    if args.quantize:
        if device != "cuda":
            raise SystemExit("--quantize needs a GPU, because bitsandbytes does.")
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
        )
    base = AutoModelForCausalLM.from_pretrained(args.model, **options)
    if args.quantize:
        base = prepare_model_for_kbit_training(base)
    elif device == "cuda":
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
    base.config.use_cache = False
    torch.manual_seed(args.seed)
    config = LoraConfig(
        r=args.rank, lora_alpha=args.alpha or 2 * args.rank, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    return get_peft_model(base, config).to(device)


def train(args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(args, device)
    folder = Path(args.tokenizer or args.model)
    examples = read_examples(
        args.data,
        folder,
        vocab_size=model.config.vocab_size,
        chat_template=args.chat_template,
        max_length=args.max_length,
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    # Linear warm-up, then half a cosine down to a tenth.
    warmup = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1.0, (s + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * min(1.0, s / max(1, args.steps)))),
    )
    losses: list[float] = []
    state_path = args.output / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        set_peft_model_state_dict(model, state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        losses = state["losses"]
        print(f"Going on from step {len(losses)}.")
    source = batches(examples, args.batch_size, seed=args.seed, start=len(losses) * args.accumulate, device=device)
    model.train()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("training", total=args.steps, completed=len(losses))
        while len(losses) < args.steps:
            parts = []
            for _ in range(args.accumulate):
                with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
                    loss = model(**next(source)).loss
                (loss / args.accumulate).backward()
                parts.append(loss.item())
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(sum(parts) / len(parts))
            progress.update(bar, advance=1, description=f"loss {losses[-1]:.3f}")
            if len(losses) % args.save_every == 0 or len(losses) == args.steps:
                state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "losses": losses}
                save(model, {**state, "adapter": get_peft_model_state_dict(model)}, args.output)
    plot(losses, args.output / "loss.png")
    print(f"Loss {losses[0]:.3f} -> {losses[-1]:.3f}. The adapter is in {args.output}.")


def save(model: Any, state: dict[str, Any], folder: Path) -> None:
    """The state first, under another name: an interruption leaves the last one whole."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "state.pt.part"
    torch.save(state, partial)
    partial.replace(folder / "state.pt")
    model.save_pretrained(folder)


def plot(losses: list[float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    width = max(1, len(losses) // 50)
    smooth = [
        sum(losses[max(0, i - width) : i + 1]) / len(losses[max(0, i - width) : i + 1]) for i in range(len(losses))
    ]
    pyplot.figure(figsize=(7, 4))
    pyplot.plot(losses, color="0.8", label="loss")
    pyplot.plot(smooth, label=f"mean of {width + 1} steps")
    pyplot.xlabel("step")
    pyplot.ylabel("loss of the answers, nats a token")
    pyplot.legend()
    pyplot.tight_layout()
    pyplot.savefig(path, dpi=120)


def merge(args: argparse.Namespace) -> None:
    """Adds the adapter to the weights, and copies what belongs to the text: a checkpoint of its own."""
    import shutil

    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    PeftModel.from_pretrained(base, args.output).merge_and_unload().save_pretrained(args.merge)
    for path in Path(args.tokenizer or args.model).iterdir():
        if path.name.startswith(("tokenizer", "special_tokens", "added_tokens", "chat_template", "tekken")):
            shutil.copy(path, args.merge / path.name)
    print(f"Serve it with: tramontane serve {args.merge}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a checkpoint, or an id on the Hugging Face Hub with --tokenizer")
    parser.add_argument("data", type=Path, help="JSONL of conversations")
    parser.add_argument("--output", type=Path, required=True, help="folder of the adapter and of the state")
    parser.add_argument("--tokenizer", help="folder with the tokenizer and the chat template, if it is not MODEL")
    parser.add_argument("--chat-template", default="auto", help="as of `tramontane serve`")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=4, help="conversations in memory at a time")
    parser.add_argument("--accumulate", type=int, default=4, help="batches for each step")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of a conversation")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=int, help="default: twice the rank")
    parser.add_argument("--quantize", action="store_true", help="keep the base in 4 bits (CUDA)")
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--merge", type=Path, help="do not train: write base and adapter as one checkpoint to this folder"
    )
    args = parser.parse_args()
    if args.merge is not None:
        merge(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
