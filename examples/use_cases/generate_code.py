"""Code generation: writes a function for a description, token by token as it comes.

python examples/use_cases/generate_code.py "a function that counts the vowels in a text"
"""

import sys

from connection import connect


def main() -> None:
    wanted = " ".join(sys.argv[1:]) or "a function that counts the vowels in a text"
    client, model = connect()
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": f"Write {wanted} in Python. Answer with the code only."}],
        max_tokens=200,
        temperature=0,
        stream=True,
    )
    for event in stream:
        if event.choices:
            print(event.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
