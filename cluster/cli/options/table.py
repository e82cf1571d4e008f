"""All commands, in the order of `tramontane --help`."""

from cluster.cli.options.rows.adapters import ADAPTER_COMMANDS
from cluster.cli.options.rows.batch import BATCH_COMMANDS
from cluster.cli.options.rows.bench import BENCH
from cluster.cli.options.rows.check import DOCTOR, PLAN
from cluster.cli.options.rows.eval import EVAL
from cluster.cli.options.rows.generate import GENERATE
from cluster.cli.options.rows.keys import KEYS_COMMANDS
from cluster.cli.options.rows.operate import DOWN, DRAIN, STATUS
from cluster.cli.options.rows.serve import SERVE

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
