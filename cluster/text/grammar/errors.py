"""Why a schema or a grammar cannot be used."""


class GrammarError(Exception):
    """`message` follows the parameter's name; `remedy` is what to do, or None."""

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
