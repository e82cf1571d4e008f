"""Makes data for a first adapter: messages to a shop, each with the desk that answers it, and a suite of other messages to evaluate with.

    python examples/finetune/make_data.py support        # support/train.jsonl and support/support.yaml

A message is put together from parts. No message of the suite is in the training data, but its parts are: the task is small on purpose, so
that even the demo model learns it in a minute.
"""

import argparse
import itertools
import json
import random
from pathlib import Path

import yaml

SYSTEM = "Which desk answers this message: billing, shipping, returns or repair?"
OPENINGS = ("Hello,", "Good morning,", "Hi there,", "Dear team,", "To whom it may concern:", "Hello again,")
PRODUCTS = (
    "lamp",
    "kettle",
    "chair",
    "radio",
    "desk",
    "camera",
    "clock",
    "heater",
    "mirror",
    "printer",
    "scale",
    "fan",
)
CLOSINGS = ("Thank you.", "Please help.", "Many thanks.", "I look forward to your answer.", "Kind regards.")
MATTERS = {
    "billing": (
        "the invoice for my {} has the wrong amount.",
        "I was charged twice for the {}.",
        "my card was declined when I paid for the {}.",
        "please send me a receipt for the {}.",
        "the price of the {} on my bill is too high.",
    ),
    "shipping": (
        "my {} has not arrived yet.",
        "where is the parcel with my {}?",
        "can you deliver the {} to another address?",
        "the tracking number of my {} does not work.",
        "the driver left the {} with a neighbor.",
    ),
    "returns": (
        "I want to send the {} back.",
        "the {} is not the color I ordered, so I do not want to keep it.",
        "how do I return the {}?",
        "I changed my mind about the {} and want my money back.",
        "you sent me two of the {}, and I only need one.",
    ),
    "repair": (
        "my {} does not switch on any more.",
        "a part of the {} broke after a week.",
        "the {} makes a strange noise.",
        "the {} gets very hot and smells.",
        "can somebody fix the {}?",
    ),
}


def messages(num: int, *, seed: int) -> list[tuple[str, str]]:
    """(message, desk) in random order, as many of each desk."""
    rng = random.Random(seed)
    found = []
    for desk, matters in MATTERS.items():
        every = list(itertools.product(OPENINGS, matters, PRODUCTS, CLOSINGS))
        for opening, matter, product, closing in rng.sample(every, num // len(MATTERS)):
            found.append((f"{opening} {matter.format(product)} {closing}", desk))
    rng.shuffle(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=400, help="conversations to learn from")
    parser.add_argument("--items", type=int, default=60, help="questions of the suite")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    every = messages(args.train + args.items, seed=args.seed)
    args.folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for message, desk in every[args.items :]:
        asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": message}]
        lines.append(json.dumps({"messages": [*asked, {"role": "assistant", "content": desk}]}))
    (args.folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    items = [
        {"id": f"message-{i}", "prompt": message, "max_tokens": 8, "check": {"exact": desk}}
        for i, (message, desk) in enumerate(every[: args.items])
    ]
    suite = {"name": args.folder.name, "system": SYSTEM, "items": items}
    (args.folder / f"{args.folder.name}.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))
    print(
        f"{len(lines)} conversations in {args.folder}/train.jsonl, {len(items)} questions in {args.folder}/{args.folder.name}.yaml"
    )


if __name__ == "__main__":
    main()
