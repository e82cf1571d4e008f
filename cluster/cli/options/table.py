"""All commands, in the order of `tramontane --help`."""

from cluster.cli.options.adapter_rows import ADAPTER_COMMANDS
from cluster.cli.options.batch_rows import BATCH_COMMANDS
from cluster.cli.options.bench_rows import BENCH
from cluster.cli.options.check_rows import DOCTOR, PLAN
from cluster.cli.options.eval_rows import EVAL
from cluster.cli.options.keys_rows import KEYS_COMMANDS
from cluster.cli.options.operate_rows import DOWN, DRAIN, STATUS
from cluster.cli.options.serve_rows import GENERATE, SERVE

DESCRIPTION = "Serves Mistral-family models on a Ray cluster."
COMMANDS = (
    SERVE,
    STATUS,
    DRAIN,
    DOWN,
    *ADAPTER_COMMANDS,
    *BATCH_COMMANDS,
    *KEYS_COMMANDS,
    DOCTOR,
    PLAN,
    BENCH,
    EVAL,
    GENERATE,
)
# First word of commands of two words -> (help, description).
FAMILIES = {
    "adapters": (
        "load and unload LoRA adapters of a running server, with canaries",
        "Loads and unloads LoRA adapters of a running server, on all of its replicas.",
    ),
    "batch": (
        "answer every line of a file, exactly once",
        "Answers every line of a file exactly once, whatever is interrupted on the way.",
    ),
    "keys": (
        "create, list and revoke API keys",
        "Creates, lists and revokes the API keys that clients send. A running server reloads the file when it changes.",
    ),
}
