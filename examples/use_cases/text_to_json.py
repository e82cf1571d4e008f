"""Text to JSON: takes fields out of a text. The server lets the model write only what fits the schema, so the result can always be read.

python examples/use_cases/text_to_json.py "Ida Berg from Volta orders 3 lamps"
"""

import json

from connection import ask, words

SCHEMA = {
    "type": "object",
    "properties": {
        "customer": {"type": "string", "maxLength": 60},
        "company": {"type": ["string", "null"], "maxLength": 60},
        "product": {"type": "string", "maxLength": 60},
        "quantity": {"type": "integer", "minimum": 0, "maximum": 100000},
    },
    "required": ["customer", "company", "product", "quantity"],
    "additionalProperties": False,
}


def main() -> None:
    text = " ".join(words()) or "Ida Berg from Volta orders 3 lamps."
    answer = ask(
        f"Write the order in this text as JSON.\n\n{text}",
        max_tokens=300,
        response_format={"type": "json_schema", "json_schema": {"name": "order", "schema": SCHEMA}},
    )
    print(json.dumps(json.loads(answer), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
