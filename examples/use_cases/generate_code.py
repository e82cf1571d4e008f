"""Code generation: writes a function for a description, token by token as it comes.

python examples/use_cases/generate_code.py "a function that counts the vowels in a text"
"""

from connection import connect, words


def main() -> None:
    wanted = " ".join(words()) or "a function that counts the vowels in a text"
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
