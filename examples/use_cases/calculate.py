"""Arithmetic with a tool: the model asks for a calculation, this program does it, and the model answers with the result.

    python examples/use_cases/calculate.py "What is 1234 times 5678?"

Needs a model whose chat template has tools, such as Mistral-7B-Instruct-v0.3 or the demo model. SmolLM2 has none. The tool is forced, so a
small model uses it as well.
"""

import ast
import json
import operator

from connection import connect, words
from openai import BadRequestError

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
TOOL = {
    "type": "function",
    "function": {
        "name": "calculate",
        "description": "Computes an expression of numbers with + - * / and parentheses.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "pattern": r"^[0-9][0-9+*/() .-]{0,40}$"}},
            "required": ["expression"],
        },
    },
}


def evaluate(expression: str) -> float:
    """Raises ValueError for anything else than numbers, + - * / and parentheses."""

    def value(node: ast.expr) -> float:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        raise ValueError(f"{expression} is not an expression of numbers")

    try:
        return value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, OverflowError) as e:
        raise ValueError(f"{expression} cannot be computed: {e}") from e


def main() -> None:
    client, model = connect()
    messages = [{"role": "user", "content": " ".join(words()) or "What is 1234 times 5678?"}]
    try:
        first = client.chat.completions.create(
            model=model,
            messages=messages,
            tools=[TOOL],
            tool_choice={"type": "function", "function": {"name": "calculate"}},
            max_tokens=100,
            seed=1,
        )
    except BadRequestError as e:
        raise SystemExit(f"{e.message}\nModels with tools are the demo model and Mistral's since v0.3.") from e
    message = first.choices[0].message
    messages.append(message.model_dump(exclude_none=True))
    for call in message.tool_calls or []:
        expression = json.loads(call.function.arguments)["expression"]
        try:
            result = str(evaluate(expression))
        except ValueError as e:
            result = str(e)
        print(f"{expression} = {result}")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    answer = client.chat.completions.create(model=model, messages=messages, tools=[TOOL], max_tokens=100, seed=1)
    print(answer.choices[0].message.content)


if __name__ == "__main__":
    main()
