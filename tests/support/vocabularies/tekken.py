"""Small tekken vocabularies in the format of tekken.json: the first pieces of Mistral's own, with the special tokens of a version.

mistral-common reads them as it reads the real file, which has 131,072 tokens and takes a second. Ids differ from the real one's: there are
SPECIAL special tokens instead of 1,000 before the pieces.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import mistral_common

NUM_PIECES = 3000
NUM_SPECIAL = 40
_FILE = Path(mistral_common.__file__).parent / "data" / "tekken_240718.json"
_UP_TO_V7 = [
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *(
        "[/TOOL_RESULTS]",
        "[TOOL_CALLS]",
        "[IMG]",
        "<pad>",
        "[IMG_BREAK]",
        "[IMG_END]",
        "[PREFIX]",
        "[MIDDLE]",
        "[SUFFIX]",
    ),
    *("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
]
# At their places in the files of Mistral Small 3.2 (v11) and Magistral (v13).
_LATER = {32: "[ARGS]", 33: "[CALL_ID]", 34: "[THINK]", 35: "[/THINK]"}
_SETTINGS = {36: "[MODEL_SETTINGS]", 37: "[/MODEL_SETTINGS]"}


def write_tekken(folder: Path, version: str, *, num_pieces: int = NUM_PIECES, **fields: Any) -> Path:
    """tekken.json in `folder`, which is made if missing. Up to v7 the special tokens are those that mistral-common knows by heart.

    fields: of the file, in addition. Returns the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = version in ("v1", "v2", "v3", "v7")
    config = {
        "pattern": _real()["config"]["pattern"],
        "num_vocab_tokens": num_pieces,
        "default_vocab_size": num_pieces + NUM_SPECIAL,
        "default_num_special_tokens": NUM_SPECIAL,
        "version": version,
    }
    special = {} if known else {"special_tokens": _special_tokens(_LATER | (_SETTINGS if version == "v15" else {}))}
    content = {"config": config, "vocab": _real()["vocab"][:num_pieces]} | special | fields
    (folder / "tekken.json").write_text(json.dumps(content))
    return folder


def _special_tokens(later: dict[int, str]) -> list[dict[str, Any]]:
    names = [*_UP_TO_V7, *(later.get(i, f"<SPECIAL_{i}>") for i in range(len(_UP_TO_V7), NUM_SPECIAL))]
    return [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)]


@cache
def _real() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(_FILE.read_text())
    return value
