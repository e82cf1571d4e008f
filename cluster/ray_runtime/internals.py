"""Every private part of Ray that this project uses, in one place. pyproject.toml pins Ray to exactly the version this was tested with.

When the pin moves, check each function here: none of these parts has a stable interface. tests/test_pins.py holds the pin.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Waiting for a prestarted worker can block forever: Ray 2.60 does not notice when that worker dies as it starts.
# A worker that dies as it starts is given up after 30 s; Ray's 60 s are as long as the controller is waited for.
# Nobody looks up tasks here, and their events would be sent every second.
_SYSTEM_CONFIG = {
    "prestart_worker_first_driver": False,
    "worker_register_timeout_seconds": 30,
    "task_events_report_interval_ms": 0,
}
_DASHBOARD_NICENESS = 10
# Each is a process that takes half a percent of a core for as long as Ray runs. Without those for Ray Serve, Data and Train.
_DASHBOARD_MODULES = ("NodeHead", "ReportHead", "StateHead", "EventHead", "JobHead", "MetricsHead", "UsageStatsHead")


def start_options(folder: Path, *, object_store: Path) -> dict[str, Any]:
    """Arguments of `ray.init` for a cluster of our own whose files lie in `folder`, and its shared memory in `object_store`.

    Relies on `_temp_dir`, `_plasma_directory` and `_system_config`.
    """
    return {"_temp_dir": str(folder), "_plasma_directory": str(object_store), "_system_config": _SYSTEM_CONFIG}


def listen_on_loopback_only() -> None:
    """For a cluster of our own, before it starts: every port of Ray listens on 127.0.0.1, and no name is resolved to find an address.

    This is how Ray runs on macOS and Windows, where it has no clusters. Relies on a variable's name and on `ray_constants`.
    """
    from ray._private import ray_constants

    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"  # for the processes that Ray starts
    ray_constants.ENABLE_RAY_CLUSTER = False


@contextlib.contextmanager
def dashboard_on_its_own() -> Iterator[None]:
    """Around `ray.init`: it starts the dashboard and goes on, instead of waiting for it for two seconds. See `dashboard_address`.

    Relies on `services.start_api_server`, which starts it with `start_ray_process` and looks for the address with `_internal_kv_get` until
    it is there, and on the command's option for modules.
    """
    from ray._private import services
    from ray.experimental import internal_kv

    start, start_process, get = services.start_api_server, services.start_ray_process, internal_kv._internal_kv_get

    def start_with_modules(command: list[str], *args: Any, **options: Any) -> Any:
        started = start_process([*command, f"--modules-to-load={','.join(_DASHBOARD_MODULES)}"], *args, **options)
        # It shares the cores with the start of everything that serves, and later with the ranks.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, started.process.pid, _DASHBOARD_NICENESS)
        return started

    def start_only(*args: Any, **options: Any) -> Any:
        services.start_ray_process = start_with_modules
        internal_kv._internal_kv_get = lambda *_, **__: b""
        try:
            return start(*args, **options)
        finally:
            services.start_ray_process, internal_kv._internal_kv_get = start_process, get

    services.start_api_server = start_only
    try:
        yield
    finally:
        services.start_api_server = start


def dashboard_address() -> str | None:
    """HOST:PORT of this cluster's dashboard; None before it is up. Relies on `ray_constants` and on the driver's GCS client.

    Raises RayError or RuntimeError when Ray does not answer.
    """
    from ray._private import ray_constants
    from ray._private.worker import global_worker

    gcs, namespace = global_worker.gcs_client, ray_constants.KV_NAMESPACE_DASHBOARD
    found = gcs.internal_kv_get(ray_constants.DASHBOARD_ADDRESS.encode(), namespace)
    if not found:
        return None
    # As Ray itself does, for processes that join.
    gcs.internal_kv_put(b"webui:url", found, True, namespace)
    return str(found.decode())


def available_resources() -> Mapping[str, Mapping[str, float]]:
    """Node id -> its free resources. Relies on `ray._private.state`."""
    from ray._private.state import available_resources_per_node

    return available_resources_per_node()


def draining_nodes() -> Mapping[str, int]:
    """Node id -> when it ends, in milliseconds since 1970, 0 when unknown. Relies on `ray._private.state`.

    Raises RayError or RuntimeError when Ray does not answer.
    """
    from ray._private.state import state

    return state.get_draining_nodes()


def drain_node(node_id: str, reason: str, *, deadline: float) -> tuple[bool, str]:
    """Tells Ray that the node is preempted at `deadline` (time.time()). Returns whether Ray accepted it and, if not, why.

    Relies on the driver's GCS client and on the autoscaler's protocol buffers. Raises RayError or RuntimeError.
    """
    from ray._private.worker import global_worker
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    kind = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = global_worker.gcs_client.drain_node(node_id, kind, reason, int(deadline * 1000))
    return bool(accepted), str(why)


def session_folder() -> str:
    """Where the Ray of this node keeps its files. Relies on the worker's node object."""
    from ray._private.worker import global_worker

    return str(global_worker.node.get_temp_dir_path())


class KeyValueStore:
    """Bytes in Ray's control store, which outlive every actor. Relies on `ray.experimental.internal_kv`."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace

    def put(self, key: str, value: bytes) -> None:
        """Replaces the value."""
        from ray.experimental.internal_kv import _internal_kv_put

        _internal_kv_put(key.encode(), value, overwrite=True, namespace=self.namespace.encode())

    def get(self, key: str) -> bytes | None:
        """None for a key that is not there."""
        from ray.experimental.internal_kv import _internal_kv_get

        return _internal_kv_get(key.encode(), namespace=self.namespace.encode())

    def delete(self, key: str) -> None:
        """Idempotent."""
        from ray.experimental.internal_kv import _internal_kv_del

        _internal_kv_del(key.encode(), namespace=self.namespace.encode())
