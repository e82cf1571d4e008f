"""Chat in the terminal: keeps the conversation, and shows answers as they come. An empty line ends it.

python examples/use_cases/chat.py
"""

from connection import connect


def main() -> None:
    client, model = connect()
    messages: list[dict[str, str]] = []
    while True:
        try:
            question = input("you> ").strip()
        except EOFError:
            break
        if not question:
            break
        messages.append({"role": "user", "content": question})
        answer = ""
        print("model> ", end="")
        for event in client.chat.completions.create(model=model, messages=messages, max_tokens=300, stream=True):
            if event.choices:
                part = event.choices[0].delta.content or ""
                answer += part
                print(part, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
