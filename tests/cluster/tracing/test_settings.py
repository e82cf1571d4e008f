"""Which collector the option and the environment name, and what is refused."""

import pytest

from cluster.tracing.settings import tracing_config
from workers.errors import ConfigError
from workers.tracing.settings import TracingConfig

URL = "http://host:4318"


@pytest.mark.parametrize(
    ("option", "environ", "url"),
    [
        (None, {}, None),
        (URL, {}, f"{URL}/v1/traces"),
        (f"{URL}/", {}, f"{URL}/v1/traces"),
        (f"{URL}/otlp/v1/traces", {}, f"{URL}/otlp/v1/traces"),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": f"{URL}/otlp/"}, f"{URL}/otlp/v1/traces"),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, None),
        (
            None,
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{URL}/x"},
            f"{URL}/x",
        ),
        (URL, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://a"}, f"{URL}/v1/traces"),
        (URL, {"OTEL_SDK_DISABLED": "True"}, None),
        (URL, {"OTEL_TRACES_EXPORTER": "none"}, f"{URL}/v1/traces"),
        (None, {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": URL}, None),
    ],
)
def test_where_traces_go(option, environ, url):
    config = tracing_config(option, environ)
    assert (None if config is None else config.url) == url


def test_the_other_variables_travel_to_gateways_and_ranks():
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": URL,
        "OTEL_EXPORTER_OTLP_HEADERS": "k=v",
        "OTEL_SERVICE_NAME": "",
        "PATH": "/",
    }
    assert tracing_config(None, environ) == TracingConfig(
        url=f"{URL}/v1/traces", environ=(("OTEL_EXPORTER_OTLP_HEADERS", "k=v"),)
    )


@pytest.mark.parametrize(
    ("option", "environ", "words"),
    [
        ("host:4318", {}, "--otlp-endpoint is not the address"),
        ("grpc://host:4317", {}, "4318"),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "host"}, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is not"),
        (URL, {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=http/protobuf"),
        (URL, {"OTEL_TRACES_EXPORTER": "zipkin"}, "over OTLP only"),
    ],
)
def test_what_cannot_be_is_refused_with_a_way_out(option, environ, words):
    with pytest.raises(ConfigError) as refused:
        tracing_config(option, environ)
    assert words in f"{refused.value} {refused.value.remedy}"
