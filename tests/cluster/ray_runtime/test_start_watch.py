"""Ray's own reason for a start that failed: from the text of its logs, and from a process that ends or a time that passes."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from cluster.ray_runtime.folder import MARK
from cluster.ray_runtime.start_watch import REMEDY, failure, name_and_parent, read_logs, reason_of, watched
from workers.errors import ConfigError

STAMP = "[2026-11-30 06:03:55,834"
FATAL = f"{STAMP} C 8053 8053] (raylet) node_manager.cc:971: [Timeout] Exiting because this node manager is dead"
ERROR = f"{STAMP} E 8053 8053] (raylet) main.cc:12: No space left on device."
INFO = f"{STAMP} I 8053 8053] (raylet) main.cc:1: Started"
PYTHON = "2026-11-30 06:03:55,834\tERROR head.py:412 -- Permission denied: '/x'"


@pytest.mark.parametrize(
    ("logs", "expected"),
    [
        ({}, None),
        ({"raylet.out": INFO}, None),
        ({"raylet.out": f"{INFO}\n{FATAL}\n    *** StackTrace\n    a()\n"}, "[Timeout] Exiting because this node manager is dead."),
        ({"raylet.out": f"{FATAL}\n{ERROR}"}, "[Timeout] Exiting because this node manager is dead."),
        ({"raylet.out": ERROR, "gcs_server.out": FATAL}, "[Timeout] Exiting because this node manager is dead."),
        ({"raylet.out": f"{ERROR}\n{INFO}"}, "No space left on device."),
        ({"dashboard.log": f"{PYTHON}\nTraceback"}, "Permission denied: '/x'."),
    ],
)  # fmt: skip
def test_the_reason_is_the_last_fatal_line_or_error(logs: dict[str, str], expected: str | None) -> None:
    assert reason_of(logs) == expected


def test_the_failure_is_one_sentence_with_rays_reason() -> None:
    error = failure("Timed out waiting\nTraceback ...\n", {"raylet.out": ERROR})
    assert error.message == "Ray could not be started: Timed out waiting. Ray's log says: No space left on device."
    assert error.remedy == REMEDY
    assert len(failure("x" * 5000, {}).message) < 400
    ended = failure("The last 20 lines of /tmp/x/logs/dashboard.log (it contains the error message):\nx", {})
    assert ended.message == "Ray could not be started: its process dashboard ended."


def test_a_process_that_is_late_is_not_called_a_bug_of_ray() -> None:
    check = (
        "An unexpected system state has occurred. You have likely discovered a bug in Ray. Check failed: x.has_value() "
    )
    error = failure(
        "it ended", {"raylet.out": f"{STAMP} C 8 8] (raylet) a.cc:1: {check}Timed out waiting for file /tmp/x"}
    )
    assert "was not up in the time" in error.message and "bug" not in error.message
    assert "less busy" in (error.remedy or "")


def test_a_machine_that_resolves_no_name_is_told_so() -> None:
    error = failure("its process raylet ended", {}, has_names=False)
    assert "no name can be resolved on this machine" in error.message
    assert "/etc/nsswitch.conf" in (error.remedy or "")


def test_name_and_parent() -> None:
    assert name_and_parent("12 (a name) S 3 12 12 0") == ("a name", 3)
    assert name_and_parent("12 (a) b) c) S 3 12 12 0") == ("a) b) c", 3)


def test_the_reason_is_read_from_the_session(tmp_path: Path) -> None:
    logs = tmp_path / "session_latest" / "logs"
    logs.mkdir(parents=True)
    (logs / "raylet.out").write_text("x" * 100_000 + f"\n{FATAL}\n")
    with (
        pytest.raises(ConfigError, match=r"could not be started: it broke.*Exiting because this node"),
        watched(tmp_path),
    ):
        raise RuntimeError("it broke\nTraceback")
    assert list(read_logs(tmp_path)) == ["raylet.out"]


def test_a_core_process_that_ends_ends_the_start(tmp_path: Path) -> None:
    raylet = tmp_path / "raylet"
    shutil.copy(shutil.which("sleep") or "/bin/sleep", raylet)
    began = time.monotonic()
    process = subprocess.Popen([raylet, "1"], env={**os.environ, MARK: str(tmp_path)})
    try:
        with pytest.raises(ConfigError, match="its process raylet ended"), watched(tmp_path):
            time.sleep(60)
    finally:
        process.kill()
        process.wait()
    assert time.monotonic() - began < 10


def test_time_passes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not up within 0\.1 s"), watched(tmp_path, timeout_s=0.1):
        time.sleep(60)


def test_the_users_ctrl_c_is_the_users(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), watched(tmp_path):
        raise KeyboardInterrupt


def test_a_start_in_time_is_left_alone(tmp_path: Path) -> None:
    with watched(tmp_path, timeout_s=0.4):
        pass
    time.sleep(0.6)  # past the time limit: nothing is interrupted any more
