"""What is said when Ray starts or is joined, and in which order: where the ranks compute is known before it is said."""

import io

import pytest

from cluster.cli.launch.device import Choice
from cluster.cli.launch.ray import OWN_CLUSTER_PLACEMENT_TIMEOUT_S, open_ray, spec_of
from cluster.cli.options.parser import make_parser
from cluster.cli.options.settings import serve_config
from cluster.config.checkpoint_location import resolve_model
from cluster.ray_runtime import session
from cluster.terminal.phases import Console

PATIENCE_S = 1800.0


class Cluster:
    def __init__(self, num_gpus: int) -> None:
        self.is_closed = False
        self.num_gpus = lambda: num_gpus

    def run_on_cpu_nodes(self, function, *, timeout_s):
        assert timeout_s < 60.0
        return [("10.0.0.1", function()), ("10.0.0.2", None)]

    def close(self) -> None:
        self.is_closed = True


def configuring(*options: str):
    args = make_parser().parse_args(["serve", *options])
    return lambda device, cpus=lambda: (): serve_config(args, *resolve_model(None), device=device, cpus=cpus)


@pytest.mark.parametrize(
    ("options", "num_gpus", "device", "said"),
    [
        # Decided before: see test_device.py.
        ([], 8, "cpu", ["Tramontane", "float32, because no node", "Starting Ray"]),
        (["--dtype", "bfloat16"], 8, "cpu", ["Tramontane", "Starting Ray"]),
        (["--ray-address", "h:1", "-tp", "2"], 1, "cuda", ["Joining Ray", "Tramontane"]),
        (
            ["--ray-address", "h:1"],
            0,
            "cpu",
            ["Joining Ray", "Tramontane", "No node of the Ray cluster has a GPU", "float32, because node 10.0.0"],
        ),
    ],
)
def test_the_headline_names_the_device_that_was_decided(monkeypatch, options, num_gpus, device, said):
    cluster, stream, configure = Cluster(num_gpus), io.StringIO(), configuring(*options)
    monkeypatch.setattr(session, "connect", lambda *_, **__: cluster)
    config = configure("cpu")
    with open_ray(Console(stream), config, Choice(device="cpu"), requested="auto", configure=configure) as (
        opened,
        decided,
    ):
        assert opened is cluster and decided.engine.device == device
    assert cluster.is_closed
    lines = stream.getvalue().splitlines()
    assert [line.strip().startswith(words) for line, words in zip(lines, said, strict=True)] == [True] * len(said), (
        lines
    )
    assert lines[said.index("Tramontane")].endswith(f" on {device}")


@pytest.mark.parametrize(
    ("options", "own_cluster", "expected"),
    [
        ([], True, OWN_CLUSTER_PLACEMENT_TIMEOUT_S),
        (["--ray-address", "h:1"], False, PATIENCE_S),
        (["--ray-address", "h:1", "--placement-timeout", "7"], False, 7.0),
        (["--ray-address", "h:1", "--placement-timeout", "inf"], False, None),
    ],
)
def test_how_long_a_replica_waits_for_nodes(options, own_cluster, expected):
    config = configuring(*options)("cpu")
    assert spec_of(config, own_cluster=own_cluster).placement_timeout_s == expected
