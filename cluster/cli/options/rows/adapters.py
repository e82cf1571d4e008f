"""The rows about adapters: those of `serve` and `generate`, and the commands `tramontane adapters ...`."""

from cluster.cli.options.option import Command, Group, argument, option, switch
from cluster.cli.options.rows.shared import JSON, URL_ROWS, engine_field, serve_field
from cluster.cli.options.values import parse_positive
from cluster.config.adapter_location import parse_lora

LORA_ENGINE_ROWS = (
    switch(
        "--enable-lora",
        fills=engine_field("enable_lora"),
        help="serve LoRA adapters, which can be loaded and unloaded while it runs; implied by --lora",
    ),
    option(
        "--max-loras",
        parse=parse_positive,
        metavar="N",
        fills=engine_field("max_loras"),
        help="adapters on the device at a time, so the most in one step; any number can be loaded",
    ),
    option(
        "--max-lora-rank",
        parse=parse_positive,
        metavar="N",
        fills=engine_field("max_lora_rank"),
        help="largest rank of an adapter, up to 256",
    ),
)
_LORA_HELP = "adapter to load: a PEFT folder or an id on the Hugging Face Hub"
LORA = option(
    "--lora",
    kind="list",
    parse=parse_lora,
    metavar="NAME=PATH_OR_HUB_ID",
    fills=serve_field("lora", convert=lambda values: tuple(values or ())),
    default=None,
    shown_default="",
    help=f"{_LORA_HELP}; requests name it as their model; may be repeated",
)
GENERATE_LORA = option(
    "--lora",
    kind="list",
    parse=parse_lora,
    metavar="NAME=PATH_OR_HUB_ID",
    default=None,
    help=f"{_LORA_HELP}; may be repeated, and the last one answers the prompt",
)
ADAPTERS = Group("adapters", (LORA, *LORA_ENGINE_ROWS))
GENERATE_ADAPTERS = Group("adapters", (GENERATE_LORA, *LORA_ENGINE_ROWS))
_NAME = argument("adapter", metavar="NAME", help="the adapter's name")

LIST = Command(
    name="adapters list",
    help="show the adapters and their revisions",
    description="Shows the adapters of a running server, their revisions and what each name serves.",
    run="cluster.cli.adapters.main:list_adapters",
    groups=(Group(None, (*URL_ROWS, JSON)),),
)
LOAD = Command(
    name="adapters load",
    help="load an adapter, or a new revision of one, on all replicas",
    description="Loads an adapter on all replicas of a running server, and returns when it serves. Under a name that is there already it "
    "makes a new revision: running streams end on the one that they began with.",
    run="cluster.cli.adapters.main:load",
    groups=(
        Group(
            None,
            (
                _NAME,
                argument("source", metavar="PATH_OR_HUB_ID", help="PEFT folder on the server's machine, or a Hub id"),
                option(
                    "--canary",
                    metavar="SHARE",
                    help="give only this share of new requests to the new revision, such as 10%, until `promote` or `rollback`",
                ),
                option(
                    "--base-model",
                    metavar="NAME",
                    help="served model that the adapter is for, on a server with several",
                    shown_default="the only one with adapters",
                ),
                *URL_ROWS,
            ),
        ),
    ),
)
UNLOAD = Command(
    name="adapters unload",
    help="unload an adapter",
    description="Unloads an adapter from all replicas. Running streams end on it.",
    run="cluster.cli.adapters.main:unload",
    groups=(Group(None, (_NAME, *URL_ROWS)),),
)
PROMOTE = Command(
    name="adapters promote",
    help="give all new requests to the canary",
    description="Makes the canary of an adapter its current revision. The one before stays loaded, for `rollback`.",
    run="cluster.cli.adapters.main:promote",
    groups=(Group(None, (_NAME, *URL_ROWS)),),
)
ROLLBACK = Command(
    name="adapters rollback",
    help="end the canary, or return to the revision before",
    description="Ends the canary of an adapter. Without a canary, the revision before the current one serves again.",
    run="cluster.cli.adapters.main:rollback",
    groups=(Group(None, (_NAME, *URL_ROWS)),),
)
ADAPTER_COMMANDS = (LIST, LOAD, UNLOAD, PROMOTE, ROLLBACK)
