"""Fine-tunes a model with LoRA on conversations, and writes an adapter in PEFT's format. One file: read it, copy it, change it.

    pip install -c constraints.txt -e '.[finetune]'
    python examples/finetune/finetune.py MODEL data.jsonl --output out --steps 300
    python examples/finetune/finetune.py MODEL data.jsonl --output out --merge merged      # afterwards: a checkpoint to serve

A line of the data: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}. The conversation is written
with the chat template that `tramontane serve` would use for MODEL, such as [INST] for Mistral's, and only the answers count for the loss.
Every --save-every steps, and when Ctrl-C or SIGTERM ends it, a checkpoint goes to the output folder. The same command goes on from the
last one, on the same data in the same order.

`tramontane plan MODEL --finetune` says what fits on which GPU. --quantize keeps the base in the form of `tramontane serve --quantization`,
so that the adapter learns beside the very weights that will serve it; gradients pass through them (as in QLoRA: Dettmers et al., 2023).
"""

import argparse
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from cluster.text.chat.template import Message
from cluster.text.load import load_text
from workers.quant.trainable import quantize_linears

IGNORED = -100  # torch's index for labels that do not count
PADDING = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# input_ids, labels: the ids of the answers, and IGNORED elsewhere, and attention_mask.
Example = dict[str, list[int]]


def read_examples(path: Path, folder: Path, *, vocab_size: int, chat_template: str, max_length: int) -> list[Example]:
    """Raises SystemExit for a line that is not a conversation. Conversations longer than `max_length` tokens are cut at the end."""
    text = load_text(folder, chat_template=chat_template, model_vocab_size=vocab_size)
    print(f"Chat template: {text.choice}")
    examples, num_cut = [], 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            messages = [Message(m["role"], m["content"]) for m in json.loads(line)["messages"]]
        except (ValueError, KeyError, TypeError) as e:
            why = f"is not a conversation: {e!r}. Each line needs 'messages' with role and content."
            raise SystemExit(f"{path}, line {number} {why}") from e
        ids: list[int] = []
        labels: list[int] = []
        for i, message in enumerate(messages):
            if message.role == "assistant":
                prompt = text.chat_template.encode(messages[:i]).token_ids
                # What comes before this answer does not count again; templates may write it a little differently than before.
                labels = [*labels[: len(prompt)], *[IGNORED] * max(0, len(prompt) - len(labels))]
                answer = [*text.tokenizer.encode_continuation(message.content), text.tokenizer.eos_token_id]
                ids, labels = [*prompt, *answer], [*labels, *answer]
        if not ids:
            raise SystemExit(f"{path}, line {number} has no message of role 'assistant', from which to learn.")
        ids, labels = ids[:max_length], labels[:max_length]
        if all(label == IGNORED for label in labels):
            num_cut += 1
        else:
            examples.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)})
    if num_cut:
        print(f"{num_cut} conversations have no answer within --max-length {max_length} tokens, and are left out.")
    if not examples:
        raise SystemExit(f"{path} has no conversations from which to learn.")
    return examples


def collate(examples: list[Example]) -> dict[str, torch.Tensor]:
    """A batch, as long as its longest example."""

    def padded(name: str) -> torch.Tensor:
        return pad_sequence([torch.tensor(e[name]) for e in examples], batch_first=True, padding_value=PADDING[name])

    return {name: padded(name) for name in PADDING}


def gguf_file(model: str) -> Path | None:
    """MODEL as a GGUF file, or the one in its folder."""
    path = Path(model)
    found = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    return found[0] if found else None


def load_model(args: argparse.Namespace, dtype: torch.dtype) -> Any:
    """The base, frozen, with fresh adapters in float32."""
    file = gguf_file(args.model)
    folder, name = (args.model, None) if file is None else (file.parent, file.name)
    base = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=dtype)
    if args.quantize:
        # Not a head that is the embedding, as in `serve`.
        quantize_linears(base, num_bits=8 if args.quantize == "int8" else 4, but=base.get_input_embeddings().weight)
    base.config.use_cache = False
    torch.manual_seed(args.seed)
    alpha = args.alpha or 2 * args.rank
    config = LoraConfig(r=args.rank, lora_alpha=alpha, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def last_checkpoint(args: argparse.Namespace) -> Path | None:
    """The newest whole one: trainer_state.json is written last. Raises SystemExit if it was made with other options."""
    settings = {name: getattr(args, name) for name in ("rank", "alpha", "quantize", "seed", "batch_size")}
    kept = args.output / "settings.json"
    whole = [path.parent for path in args.output.glob("checkpoint-*/trainer_state.json")]
    if not whole:
        args.output.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(settings))
        return None
    before = json.loads(kept.read_text())
    if changed := [name for name, value in settings.items() if before[name] != value]:
        what = f"{args.output} has a training with --{changed[0].replace('_', '-')} {before[changed[0]]}."
        raise SystemExit(f"{what} Give the same options to go on with it, or another --output.")
    return max(whole, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


class Bar(ProgressCallback):
    """The loss stands beside the bar instead of on a line for each step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if self.training_bar is not None and logs is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")


class Interrupts(TrainerCallback):
    """Ctrl-C, or SIGTERM as from a cloud that takes the node back: the step that runs ends, and a checkpoint is written."""

    def __init__(self) -> None:
        self.found = False
        signal.signal(signal.SIGINT, self.note)
        signal.signal(signal.SIGTERM, self.note)

    def note(self, number: int, frame: Any) -> None:
        self.found = True
        signal.signal(number, signal.SIG_DFL)
        print("\nStopping after this step. Again: at once, without a checkpoint.", flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save |= self.found
        control.should_training_stop |= self.found


def train(args: argparse.Namespace) -> None:
    checkpoint = last_checkpoint(args)
    if checkpoint is not None and step_of(checkpoint) >= args.steps:
        for path in checkpoint.glob("adapter_*"):
            shutil.copy(path, args.output)
        print(f"{args.output} has its {step_of(checkpoint)} steps already. For more, give a larger --steps.")
        return
    if checkpoint is not None:
        print(f"Going on from step {step_of(checkpoint)}.")
    on_gpu = torch.cuda.is_available()
    precision = ("bfloat16" if on_gpu else "float32") if args.precision == "auto" else args.precision
    model = load_model(args, getattr(torch, precision))
    tokenizer, vocab_size = Path(args.tokenizer or gguf_file(args.model) or args.model), model.config.vocab_size
    limits = {"vocab_size": vocab_size, "max_length": args.max_length}
    examples = read_examples(args.data, tokenizer, chat_template=args.chat_template, **limits)
    learning = {"learning_rate": args.lr, "warmup_steps": max(1, args.steps // 20), "bf16": precision == "bfloat16"}
    schedule = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    batches = {"per_device_train_batch_size": args.batch_size, "gradient_accumulation_steps": args.accumulate}
    memory = {"gradient_checkpointing": on_gpu, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    device = {"use_cpu": not on_gpu, "dataloader_pin_memory": on_gpu, "remove_unused_columns": False}
    saving = {"output_dir": str(args.output), "save_steps": args.save_every, "save_total_limit": 1}
    logging = {"logging_steps": 1, "logging_nan_inf_filter": False, "report_to": "none"}
    options: dict[str, Any] = learning | schedule | batches | memory | device | saving | logging
    settings = TrainingArguments(max_steps=args.steps, seed=args.seed, **options)
    trainer = Trainer(model, settings, data_collator=collate, train_dataset=examples, callbacks=[Interrupts()])
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.state.global_step < args.steps:
        raise SystemExit(f"Stopped at step {trainer.state.global_step}. The same command goes on from there.")
    trainer.save_model(str(args.output))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    plot(losses, args.output / "loss.png")
    print(f"Loss {losses[0]:.3f} -> {losses[-1]:.3f}. The adapter is in {args.output}.")


def plot(losses: list[float], path: Path) -> None:
    width = max(1, len(losses) // 25)
    smooth = [sum(losses[max(0, i - width) : i + 1]) / min(width + 1, i + 1) for i in range(len(losses))]
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot(losses, color="0.8", label="loss")
    axes.plot(smooth, label=f"mean of {width + 1} steps")
    axes.set(xlabel="step", ylabel="loss of the answers, nats a token")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def merge(args: argparse.Namespace) -> None:
    """Adds the adapter to the weights, and copies what belongs to the text: a checkpoint of its own."""
    if gguf_file(args.model) is not None:
        raise SystemExit("A GGUF file is not merged. Serve the adapter beside it: serve MODEL --lora NAME=OUTPUT")
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
    add("--output", type=Path, required=True, help="folder of the adapter and of the checkpoints")
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
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on GPUs only")
    add("--save-every", type=int, default=50)
    add("--seed", type=int, default=0)
    add("--merge", type=Path, help="do not train: write base and adapter as one checkpoint to this folder")
    args = parser.parse_args()
    (train if args.merge is None else merge)(args)


if __name__ == "__main__":
    main()
