"""Summary and classification: a summary of each text, and which of some labels fits. The grammar allows no other word than the labels.

python examples/use_cases/summarize.py message.txt other.txt
"""

from pathlib import Path

from connection import ask, words

LABELS = ("complaint", "question", "praise")
SAMPLES = ("My parcel has been on its way for two weeks. Nobody answers my emails.", "Do you deliver to Norway?")


def main() -> None:
    texts = [Path(name).read_text() for name in words()] or SAMPLES
    for text in texts:
        summary = ask(f"Summarize in one sentence:\n\n{text}", max_tokens=60)
        label = ask(
            f"Is this a complaint, a question or praise?\n\n{text}",
            max_tokens=8,
            extra_body={"structured_outputs": {"choice": list(LABELS)}},
        )
        print(f"{label}: {summary}")


if __name__ == "__main__":
    main()
