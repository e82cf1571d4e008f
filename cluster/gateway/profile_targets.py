"""What a profile names in a gateway, besides the steps of its tasks. tests/cluster/gateway checks that all of it exists."""

from cluster.api.generation import answering
from cluster.api.server import body, sse
from cluster.replicas.client import ReplicaClient
from cluster.router.dispatcher import Dispatcher
from cluster.router.load_balancing.table import ReplicaTable
from cluster.text.output.output_text import OutputText
from cluster.text.tokenizer import Tokenizer
from workers.profile.targets import Target

GATEWAY_TARGETS = (
    # What waits: a row for each request.
    Target(sse, "stream", "stream"),
    Target(answering, "complete", "whole answer"),
    Target(Dispatcher, "assign", "queue"),
    # What computes.
    Target(body, "parse", "validate"),
    Target(Tokenizer, "encode_prompt", "tokenize"),
    Target(Tokenizer, "encode_rendered", "tokenize"),
    Target(ReplicaTable, "choose", "choose replica"),
    Target(ReplicaClient, "_receive", "frame"),
    Target(OutputText, "push", "detokenize"),
    Target(sse, "encode_event", "encode chunk"),
    Target(sse.TextEvents, "encode", "encode chunk"),
    Target(sse._Writer, "send", "write chunk"),
)
