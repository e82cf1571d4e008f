"""How an adapter's files reach a rank: as a folder on the controller's node, and on other nodes through Ray's object store.

Knows folders and bytes; the reference to them is Ray's.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class AdapterContent:
    """One revision: its folder on the node `node_id`; None: on every node. `files`: for ranks elsewhere, a list with a reference in Ray's
    object store to the contents by file name, or an empty list.
    """

    revision: str
    folder: str
    node_id: str | None = None
    files: Sequence[Any] = ()


def bring(
    content: AdapterContent,
    here: str,
    *,
    load: Callable[[str, str], None],
    fetch: Callable[[Any], Mapping[str, bytes]],
) -> None:
    """On a rank: loads the adapter from the folder if that is on this node, or else from a copy that is gone afterwards."""
    if content.node_id in (None, here):
        load(content.revision, content.folder)
        return
    with tempfile.TemporaryDirectory(prefix="adapter-") as folder:
        for name, data in fetch(content.files[0]).items():
            (Path(folder) / name).write_bytes(data)
        load(content.revision, folder)
