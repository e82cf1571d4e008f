"""From what a person names, a folder or a Hub id, to a checked copy in the store and its revision.

Reads the adapter's two files and no model. Blocking, and for a Hub id it downloads: call it on a thread.
"""

from pathlib import Path

from cluster.adapters.registry import check_name
from cluster.adapters.store import FILES, MAX_BYTES, AdapterStore, size_of
from cluster.config.adapter_location import resolve_adapter
from cluster.protocol.adapters import AdapterRevision
from workers.config import EngineConfig
from workers.errors import CheckpointError
from workers.lora.peft_folder import read_adapter
from workers.thread_priority import Breaks

WORK_SHARE = 0.25


def take_in(
    name: str, source: str, *, store: AdapterStore, engine: EngineConfig, share: float | None = None
) -> AdapterRevision:
    """Copies the adapter into the store, which holds it then, and says what it is.

    Changes of the source, even during this call, change no revision. Raises RequestError for the name, ConfigError for the place, and
    CheckpointError for the contents.
    """
    check_name(name)
    folder = resolve_adapter(source)
    if not all((folder / file).is_file() for file in FILES):
        read_adapter(folder, engine.model, max_rank=engine.max_lora_rank)  # says what is missing
        raise CheckpointError(f"{folder} is not an adapter: it needs {' and '.join(FILES)}.")
    if (num_bytes := size_of(folder)) > MAX_BYTES:
        raise CheckpointError(
            f"The adapter {source} has {num_bytes / 2**30:.1f} GiB; the limit is {MAX_BYTES / 2**30:g} GiB.",
            remedy="Save it in bfloat16, with a smaller rank or for fewer modules.",
        )
    staged = store.stage(folder)
    try:
        # The gateway's streams go on beside it.
        breaks = Breaks(WORK_SHARE)
        info = read_adapter(staged, engine.model, max_rank=engine.max_lora_rank, take_break=breaks)
    except CheckpointError as e:
        # The copy is nothing that the caller knows.
        message = e.message.replace(str(staged), str(folder))
        raise CheckpointError(message, remedy=e.remedy) from e
    else:
        store.keep(staged, info.digest)
    finally:
        store.discard(staged)
    return AdapterRevision(
        id=f"{name}@{info.digest}",
        name=name,
        source=str(folder) if Path(source).expanduser().is_dir() else source,
        digest=info.digest,
        rank=info.rank,
        num_bytes=info.num_bytes,
        share=share,
    )
