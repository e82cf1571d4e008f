"""Retrieval: finds the paragraphs of local files that are closest to a question, by /v1/embeddings, and answers from them.

python examples/use_cases/ask_files.py "How do I stop the server?" docs/*.md
"""

from pathlib import Path

import numpy as np
from connection import ask, connect, first_model, words

NUM_BEST = 3
MAX_CHARACTERS = 1000
BATCH = 32


def embed(texts: list[str]) -> np.ndarray:
    """[len(texts), size], each of length 1."""
    client, _ = connect()
    model = first_model(client)  # adapters change answers; likeness is the base model's
    rows = []
    for start in range(0, len(texts), BATCH):
        answer = client.embeddings.create(model=model, input=texts[start : start + BATCH], encoding_format="float")
        rows += [item.embedding for item in answer.data]
    vectors = np.array(rows)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def main() -> None:
    question, *names = words() or ["What is this folder about?"]
    paths = [Path(name) for name in names] or sorted(Path(__file__).parent.glob("*.py"))
    pieces = [
        f"{path.name}: {piece.strip()[:MAX_CHARACTERS]}"
        for path in paths
        for piece in path.read_text().split("\n\n")
        if piece.strip()
    ]
    likeness = embed(pieces) @ embed([question])[0]
    best = [pieces[i] for i in np.argsort(-likeness)[:NUM_BEST]]
    for piece in best:
        print(f"[{piece.splitlines()[0][:80]}]")
    context = "\n\n".join(best)
    print(ask(f"Answer from this text only.\n\n{context}\n\nQuestion: {question}"))


if __name__ == "__main__":
    main()
