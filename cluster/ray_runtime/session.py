"""Starts a Ray of our own or joins one, and cleans up after it. Knows Ray's settings; knows no replicas.

A Ray we start serves this machine only: token authentication on, all ports on loopback, no usage reports, its files in a temporary
folder that is removed with it.
"""

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cluster.ray_runtime.folder import MARK, RayFolder, make_folder, sweep
from cluster.ray_runtime.internals import (
    dashboard_address,
    dashboard_on_its_own,
    listen_on_loopback_only,
    start_options,
)
from cluster.ray_runtime.start_watch import RayLateError, watched
from cluster.ray_runtime.surroundings import WANTED_OPEN_FILES, check_open_files, check_surroundings, ray_parent
from cluster.system.descriptors import raise_limit
from workers.errors import ConfigError

log = logging.getLogger(__name__)

T = TypeVar("T")
SHUTDOWN_TIMEOUT_S = 5.0
REACH_TIMEOUT_S = 5.0
DASHBOARD_POLL_S = 0.05
OBJECT_STORE_BYTES = 100 * 2**20  # tokens do not travel through Ray; this is near the smallest it accepts


@dataclass(kw_only=True)
class RayCluster:
    """A connection to Ray. `folder` is set when the cluster is ours. Then `dashboard_url` is None until `find_dashboard` finds it."""

    dashboard_url: str | None
    folder: RayFolder | None

    @property
    def is_ours(self) -> bool:
        return self.folder is not None

    def find_dashboard(self, timeout_s: float) -> None:
        """Waits for the dashboard of a cluster of ours, which starts while others do. After that time, `dashboard_url` stays None."""
        deadline = time.monotonic() + timeout_s
        while self.is_ours and self.dashboard_url is None:
            if (address := dashboard_address()) is not None:
                self.dashboard_url = f"http://{address}"
            elif time.monotonic() > deadline:
                log.warning("Ray's dashboard has not started. Its log, dashboard.log, says why.")
                return
            else:
                time.sleep(DASHBOARD_POLL_S)

    def num_gpus(self) -> int:
        import ray

        return int(ray.cluster_resources().get("GPU", 0))

    def run_on_cpu_nodes(self, function: Callable[[], T], *, timeout_s: float) -> list[tuple[str, T | None]]:
        """See nodes.run_on_cpu_nodes."""
        from cluster.ray_runtime.nodes import run_on_cpu_nodes  # late: it imports Ray

        return run_on_cpu_nodes(function, timeout_s=timeout_s)

    def close(self) -> None:
        """Disconnects; ends every process of a cluster of our own. Idempotent."""
        _end_ray(self.folder)


def connect(address: str | None, *, namespace: str, num_cpus: int = 1, log_to_driver: bool = True) -> RayCluster:
    """Joins the cluster at `address`, or starts one on this machine with `num_cpus` CPU slots. Raises ConfigError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's default of 15 lets anything else on a busy machine hold up the ranks, and with them every stream.
    os.environ.setdefault("RAY_worker_niceness", "0")
    sweep(Path(ray_parent(os.environ)[0]))  # first: what a killed command left may be what fills the disk
    if address is None:
        folder = _start(namespace=namespace, num_cpus=num_cpus, log_to_driver=log_to_driver)
        return RayCluster(dashboard_url=None, folder=folder)
    dashboard = _join(address, namespace=namespace, log_to_driver=log_to_driver)
    return RayCluster(dashboard_url=f"http://{dashboard}" if dashboard else None, folder=None)


def _start(*, namespace: str, num_cpus: int, log_to_driver: bool) -> RayFolder:
    """The new cluster's folder. A Ray that is late is started once more: on a machine that is busy for a moment nobody has to come back."""
    try:
        return _start_once(namespace=namespace, num_cpus=num_cpus, log_to_driver=log_to_driver)
    except RayLateError:
        log.warning("One of Ray's processes was not up in the time that Ray gives it. Starting Ray once more.")
        return _start_once(namespace=namespace, num_cpus=num_cpus, log_to_driver=log_to_driver)


def _start_once(*, namespace: str, num_cpus: int, log_to_driver: bool) -> RayFolder:
    surroundings = check_surroundings(object_store_bytes=OBJECT_STORE_BYTES)
    sweep(surroundings.parent)
    os.environ.pop("RAY_ADDRESS", None)  # it would make ray.init join another cluster
    ensure_token()
    # Otherwise Ray's log monitor looks for new files ten times a second, not twice.
    os.environ.setdefault("RAY_LOG_MONITOR_MANY_FILES_THRESHOLD", "0")
    folder = make_folder(surroundings.parent)
    os.environ[MARK] = str(folder.path)
    import ray

    listen_on_loopback_only()
    try:
        with watched(folder.path), dashboard_on_its_own():
            ray.init(
                num_cpus=num_cpus,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                namespace=namespace,
                log_to_driver=log_to_driver,
                logging_level=logging.CRITICAL,  # `watched` says in one sentence what goes wrong
                **start_options(folder.path, object_store=surroundings.object_store or folder.path),
            )
        logging.getLogger("ray").setLevel(logging.ERROR)
    except BaseException:
        _end_ray(folder)
        raise
    return folder


def _join(address: str, *, namespace: str, log_to_driver: bool) -> str | None:
    """The dashboard's HOST:PORT."""
    check_open_files(raise_limit(WANTED_OPEN_FILES))
    _check_reachable(address)
    import ray

    try:
        return ray.init(
            address, namespace=namespace, log_to_driver=log_to_driver, logging_level=logging.ERROR
        ).dashboard_url
    except BaseException as e:
        _end_ray(None)
        if not isinstance(e, Exception):
            raise
        # Ray raises a dozen unrelated types here, all for the same reason.
        raise ConfigError(
            f"The Ray cluster at {address} could not be joined: {e}",
            remedy="Check that it runs the same version of Ray and that its token is in RAY_AUTH_TOKEN or ~/.ray/auth_token.",
            param="--ray-address",
        ) from e


def _check_reachable(address: str) -> None:
    """Ray itself would try a dead address for minutes. Leaves addresses other than HOST:PORT to Ray. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_TIMEOUT_S).close()
    except (OSError, OverflowError) as e:
        raise ConfigError(
            f"Nothing answers at the Ray address {address} ({e}).",
            remedy="Run `ray start --head` there, or correct the address.",
            param="--ray-address",
        ) from e


def token_path() -> Path | None:
    """Where the dashboard's token can be read, when it is in a file."""
    if os.environ.get("RAY_AUTH_MODE") != "token" or "RAY_AUTH_TOKEN" in os.environ:
        return None
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def ensure_token() -> None:
    """Makes a token if there is none: Ray's ports listen on every interface, and a client that needs no token can run code."""
    if os.environ.setdefault("RAY_AUTH_MODE", "token") != "token" or "RAY_AUTH_TOKEN" in os.environ:
        return
    path = token_path()
    assert path is not None, "token mode without a token in the environment reads it from a file"
    if path.is_file():
        return
    # Ray would write this file itself, but readable by everyone on the machine.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
            f.write(secrets.token_hex(32))
    except OSError as e:
        log.info("%s cannot be written (%s): Ray's token lives in the environment of this process only.", path, e)
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _end_ray(folder: RayFolder | None) -> None:
    """Shuts Ray down in order; where the processes and files are ours, also ends and removes what is left.

    A service manager may have signalled all processes at once; without its control store `ray.shutdown` waits for a minute.
    """
    with _undisturbed():
        _shut_down_and_kill(folder)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignores SIGINT and SIGTERM: a second one would leave processes running, and the work in here is bounded in time."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _shut_down_and_kill(folder: RayFolder | None) -> None:
    import ray

    thread = threading.Thread(target=ray.shutdown, name="ray-shutdown", daemon=True)
    thread.start()
    thread.join(SHUTDOWN_TIMEOUT_S)
    if folder is not None:
        folder.end()
