"""The rows of `tramontane serve` about its HTTP server: the address, keys, TLS, and what it offers to clients."""

import os
from collections.abc import Sequence
from operator import not_
from pathlib import Path

from cluster.cli.options.option import Group, option, switch
from cluster.cli.options.rows.shared import CHAT_TEMPLATE, GENERATION_CONFIG, SERVED_NAME, absolute, serve_field
from cluster.cli.options.values import parse_positive
from cluster.config.platform import PLATFORM_ENV, PLATFORMS, Platform, recognize
from cluster.config.serve import API_KEY_ENV
from cluster.keys.file import API_KEYS_ENV
from cluster.system.files import has_files


def _platform(asked: str | None) -> Platform | None:
    return recognize(os.environ, asked=asked or "auto", has_files=has_files)


def _tuple(values: Sequence[str] | None) -> tuple[str, ...]:
    return tuple(values or ())


HTTP = Group(
    "HTTP",
    (
        option(
            "--host",
            fills=serve_field("host"),
            help="address to listen on; one that other machines can reach requires an API key",
        ),
        option("--port", parse=int, fills=serve_field("port"), help="port to listen on; 0 picks a free one"),
        option(
            "--api-key",
            metavar="KEY",
            env=API_KEY_ENV,
            fills=serve_field("api_key"),
            help="key that clients must send; the environment variable keeps it out of the process list",
        ),
        option(
            "--api-keys",
            parse=Path,
            metavar="FILE",
            env=API_KEYS_ENV,
            fills=serve_field("api_keys", convert=absolute),
            help="file of keys with limits, made by `tramontane keys create`; the server reloads it when it changes",
        ),
        option(
            "--tls-cert",
            parse=Path,
            metavar="FILE",
            fills=serve_field("tls_cert", convert=absolute),
            help="certificate chain in PEM format, for https; the server reloads it when it changes",
        ),
        option(
            "--tls-key",
            parse=Path,
            metavar="FILE",
            fills=serve_field("tls_key", convert=absolute),
            help="private key of --tls-cert",
        ),
        option(
            "--cors-origin",
            kind="list",
            metavar="ORIGIN",
            default=None,
            fills=serve_field("cors_origins", convert=_tuple),
            help="web origin whose pages may call the API; may be repeated",
        ),
        switch(
            "--public-health",
            fills=serve_field("public_health"),
            help="let /health/ready and /ping answer without a key, and then say no more than ready or not",
        ),
        option(
            "--platform",
            choices=("auto", "none", *PLATFORMS),
            env=PLATFORM_ENV,
            fills=serve_field("platform", convert=_platform),
            help="hosting platform whose port, paths and model to use where nothing else is given; auto: what the environment shows",
            shown_default="auto",
        ),
        switch("--no-embeddings", fills=serve_field("serves_embeddings", convert=not_), help="turn off /v1/embeddings"),
        switch(
            "--strict",
            fills=serve_field("strict"),
            help="refuse request fields that are unknown or have no effect, instead of naming them in X-Tramontane-Ignored",
        ),
        SERVED_NAME,
        CHAT_TEMPLATE,
        GENERATION_CONFIG,
        option(
            "--gateways",
            parse=parse_positive,
            metavar="N",
            fills=serve_field("num_gateways"),
            help="HTTP servers, including this one; the others run on other nodes where there are any",
        ),
    ),
)
