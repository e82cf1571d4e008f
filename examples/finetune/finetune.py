"""Fine-tunes a model with LoRA on conversations, and writes an adapter in PEFT's format. One file: read it, copy it, change it.

    pip install 'tramontane[finetune]'
    python examples/finetune/finetune.py MODEL data.jsonl --output out --steps 300
    python examples/finetune/finetune.py MODEL data.jsonl --output out --merge merged      # afterwards: a checkpoint to serve

A line of the data: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}. The conversation is written
with the chat template that `tramontane serve` would use for MODEL, such as [INST] for Mistral's, and only the answers count for the loss.
Every --save-every steps the state goes to the output folder; the same command goes on from there after any interruption, on the same data
in the same order.

`tramontane plan MODEL --finetune` says what fits on which GPU. --quantize keeps the base in the form of `tramontane serve --quantization`,
so that the adapter learns beside the very weights that will serve it; gradients pass through them (as in QLoRA: Dettmers et al., 2023).
"""

import argparse
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from transformers import AutoModelForCausalLM

from cluster.text.chat.template import Message
from cluster.text.load import load_text
from workers.quant.at_load import round_to_groups

IGNORED = -100  # torch's index for labels that do not count
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Example:
    """labels: the ids of the answers, and IGNORED elsewhere."""

    ids: list[int]
    labels: list[int]


def read_examples(path: Path, folder: Path, *, vocab_size: int, chat_template: str, max_length: int) -> list[Example]:
    """Raises SystemExit for a line that is not a conversation. Conversations longer than `max_length` tokens are cut at the end."""
    num_cut = 0
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
        if all(label == IGNORED for label in labels[:max_length]):
            num_cut += 1
        else:
            examples.append(Example(ids[:max_length], labels[:max_length]))
    if num_cut:
        print(f"{num_cut} conversations have no answer within --max-length {max_length} tokens, and are left out.")
    if not examples:
        raise SystemExit(f"{path} has no conversations from which to learn.")
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


class Product(torch.autograd.Function):
    """x @ weight.T, where backward makes the plain numbers of the weight again instead of keeping them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: "QuantizedLinear") -> torch.Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.weight.to(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad @ ctx.layer.weight.to(grad.dtype), None


class QuantizedLinear(nn.Linear):
    """A frozen matrix in the form of `tramontane serve --quantization`: whole numbers of 8 or 4 bits, with a scale for each 32 of them."""

    def __init__(self, linear: nn.Linear, num_bits: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.num_bits = linear.in_features, linear.out_features, num_bits
        self.bias = linear.bias
        rounded = round_to_groups(linear.weight.detach(), num_bits=num_bits)
        pairs = rounded.values.unflatten(1, (-1, 2))
        packed = rounded.values if num_bits == 8 else (pairs[..., 0] & 15) | (pairs[..., 1] << 4)
        self.register_buffer("values", packed)
        self.register_buffer("scales", rounded.scales)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        values = self.values
        if self.num_bits == 4:  # shifts of signed bytes keep the sign
            values = torch.stack((values << 4 >> 4, values >> 4), dim=-1).flatten(1)
        return (values.unflatten(1, (self.scales.shape[1], -1)) * self.scales.float()[..., None]).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return Product.apply(x, self)


def gguf_file(model: str) -> Path | None:
    """MODEL as a GGUF file, or the one in its folder."""
    path = Path(model)
    found = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    return found[0] if found else None


def load_base(model: str, dtype: Any) -> Any:
    file = gguf_file(model)
    if file is None:
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)


def load_model(args: argparse.Namespace, device: str, dtype: torch.dtype) -> Any:
    """The base, frozen, with fresh adapters in float32."""
    base = load_base(args.model, dtype)
    if args.quantize:
        # Not a head that is the embedding, as in `serve`.
        matrices = [
            (name, module)
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear) and module.weight is not base.get_input_embeddings().weight
        ]
        for name, module in matrices:
            base.set_submodule(name, QuantizedLinear(module, 8 if args.quantize == "int8" else 4))
    if device == "cuda":
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
    precision = ("bfloat16" if device == "cuda" else "float32") if args.precision == "auto" else args.precision
    model = load_model(args, device, getattr(torch, precision))
    examples = read_examples(
        args.data,
        Path(args.tokenizer or gguf_file(args.model) or args.model),
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
    settings = {name: getattr(args, name) for name in ("rank", "alpha", "quantize", "seed", "batch_size")}
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        if changed := [name for name, value in settings.items() if state["settings"][name] != value]:
            raise SystemExit(
                f"{args.output} has a training with --{changed[0].replace('_', '-')} {state['settings'][changed[0]]}. "
                "Give the same options to go on with it, or another --output."
            )
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
                with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
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
                adapter = get_peft_model_state_dict(model)
                save(model, {**state, "adapter": adapter, "settings": settings}, args.output)
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

    width = max(1, len(losses) // 25)
    smooth = [sum(losses[max(0, i - width) : i + 1]) / min(width + 1, i + 1) for i in range(len(losses))]
    pyplot.figure(figsize=(7, 4))
    pyplot.plot(losses, color="0.8", label="loss")
    pyplot.plot(smooth, label=f"mean of {width + 1} steps")
    pyplot.xlabel("step")
    pyplot.ylabel("loss of the answers, nats a token")
    pyplot.legend()
    pyplot.savefig(path, dpi=120, bbox_inches="tight")


def merge(args: argparse.Namespace) -> None:
    """Adds the adapter to the weights, and copies what belongs to the text: a checkpoint of its own."""
    import shutil

    from peft import PeftModel

    if gguf_file(args.model) is not None:
        raise SystemExit(
            "A GGUF file is not merged. Serve the adapter beside it: tramontane serve MODEL --lora NAME=OUTPUT"
        )
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    PeftModel.from_pretrained(base, args.output).merge_and_unload().save_pretrained(args.merge)
    for path in Path(args.tokenizer or args.model).iterdir():
        if path.name.startswith(("tokenizer", "special_tokens", "added_tokens", "chat_template", "tekken")):
            shutil.copy(path, args.merge / path.name)
    print(f"Serve it with: tramontane serve {args.merge}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="folder of a checkpoint, GGUF file, or an id on the Hugging Face Hub with --tokenizer")
    add("data", type=Path, help="JSONL of conversations")
    add("--output", type=Path, required=True, help="folder of the adapter and of the state")
    add("--tokenizer", help="folder with the tokenizer and the chat template, if it is not MODEL")
    add("--chat-template", default="auto", help="as of `tramontane serve`")
    add("--steps", type=int, default=300)
    add("--batch-size", type=int, default=4, help="conversations in memory at a time")
    add("--accumulate", type=int, default=4, help="batches for each step")
    add("--max-length", type=int, default=1024, help="tokens of a conversation")
    add("--lr", type=float, default=2e-4)
    add("--rank", type=int, default=16)
    add("--alpha", type=int, help="default: twice the rank")
    add("--quantize", choices=("int8", "int4"), help="keep the base in 8 or 4 bits")
    # Adapters and their sums stay in float32.
    add(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: bfloat16 on a GPU, else float32",
    )
    add("--save-every", type=int, default=50)
    add("--seed", type=int, default=0)
    add("--merge", type=Path, help="do not train: write base and adapter as one checkpoint to this folder")
    args = parser.parse_args()
    if args.merge is not None:
        merge(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
