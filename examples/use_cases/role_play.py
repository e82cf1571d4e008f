"""Role-play: the system message gives the model a part, and the conversation stays in it.

python examples/use_cases/role_play.py "You are the keeper of a lighthouse in 1890."
"""

from connection import connect, words

LINES = ("Good evening! Who are you?", "What did you see last night?")


def main() -> None:
    part = " ".join(words()) or "You are the keeper of a lighthouse in 1890. You speak in short sentences."
    client, model = connect()
    messages = [{"role": "system", "content": part}]
    for line in LINES:
        messages.append({"role": "user", "content": line})
        answer = client.chat.completions.create(model=model, messages=messages, max_tokens=120, temperature=0.8, seed=1)
        text = answer.choices[0].message.content or ""
        messages.append({"role": "assistant", "content": text})
        print(f"you> {line}\nmodel> {text}")


if __name__ == "__main__":
    main()
