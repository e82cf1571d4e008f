"""`tramontane serve` in hostile surroundings, each in namespaces of its own: one sentence within seconds, or a server that works.

Needs root and `unshare`: a full /tmp or a machine without a network must not be those of the other tests. `make test` runs one surrounding
of each kind, `make test-attack` all.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.paths import ROOT
from support.servers.ports import is_loopback, listening
from support.servers.system_server import COMMAND, Server

CAN_UNSHARE = (
    shutil.which("unshare") is not None and not subprocess.run(["unshare", "-mn", "true"], check=False).returncode
)
pytestmark = pytest.mark.skipif(not CAN_UNSHARE, reason="needs root, or a user who may make namespaces")
FILL = "dd if=/dev/zero of={0}/f bs=1k count=100 2> /dev/null || true"
ENOUGH_S = 60.0  # a slow and busy machine; it takes 1 to 3 s
LONG = "a" * 73


def prefix(setup: str) -> list[str]:
    """What a command line begins with, to run it in namespaces of its own in which `setup` has run."""
    return ["unshare", "-mn", "bash", "-c", f'set -e; {setup}; exec "$@"', "setup"]


def refused(command: list[str], **environ: str) -> str:
    began = time.monotonic()
    done = subprocess.run(
        command, env={**os.environ, **environ}, capture_output=True, text=True, timeout=100, check=False
    )
    assert time.monotonic() - began < ENOUGH_S, f"it took too long to say: {done.stderr}"
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("tramontane: ")]
    assert len(said) == 1, done.stderr
    assert len(done.stderr.splitlines()) <= 4, f"more than headline, phase, one sentence and a note: {done.stderr}"
    return said[0]


REFUSED = [
    ("mount -t tmpfs -o size=64k t /tmp; " + FILL.format("/tmp"), {}, "/tmp is full: it has 0.0 MiB free", "set RAY_TMPDIR"),
    ("mount -t tmpfs -o ro t /mnt", {"TMPDIR": "/mnt"}, "TMPDIR, /mnt, is read-only", "Make it writable"),
    ("ip link set lo down", {}, "cannot connect to its own address 127.0.0.1", "ip link set lo up"),
]  # fmt: skip
REFUSED_TOO = [
    ("mount -t tmpfs -o size=1m t /tmp", {}, "/tmp is full: it has 1.0 MiB free", "Free 32 MiB there"),
    ("mount -t tmpfs -o nr_inodes=50 t /tmp", {}, "/tmp is full", "no room for more files"),
    ("mount -t tmpfs -o ro t /tmp", {}, "/tmp is read-only", "Make it writable"),
    ("mount -t tmpfs -o size=64k t /mnt; " + FILL.format("/mnt"), {"TMPDIR": "/mnt"}, "TMPDIR, /mnt, is full", "set RAY_TMPDIR"),
    ("mount -t tmpfs -o ro t /mnt", {"RAY_TMPDIR": "/mnt"}, "RAY_TMPDIR, /mnt, is read-only", "Make it writable"),
    ("true", {"RAY_TMPDIR": "/no/such"}, "RAY_TMPDIR, /no/such, does not exist", "Create it"),
    ("true", {"RAY_TMPDIR": f"/tmp/{LONG}"}, "RAY_TMPDIR is 78 bytes long", "at most 15 bytes"),
    ("ulimit -n 64", {}, "only 64 open files", "ulimit -n 65536"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("setup", "environ", "cause", "remedy"),
    [*REFUSED, *(pytest.param(*case, marks=pytest.mark.attack) for case in REFUSED_TOO)],
)
def test_serve_says_what_is_wrong_in_one_sentence(setup: str, environ: dict[str, str], cause: str, remedy: str) -> None:
    if setup.startswith("mount") and " t /tmp" in setup and ROOT.is_relative_to("/tmp"):
        pytest.skip("this checkout is in /tmp, which the command would not find")
    if "lo down" not in setup:
        setup = f"ip link set lo up; {setup}"
    said = refused([*prefix(setup), str(COMMAND), "serve", "--port", "0"], **environ)
    assert cause in said and remedy in said


@pytest.mark.attack
def test_batch_run_says_so_too(tmp_path: Path) -> None:
    lines = tmp_path / "in.jsonl"
    body = '{"model": "demo_model", "prompt": "x", "max_tokens": 1}'
    lines.write_text(f'{{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {body}}}\n')
    command = [str(COMMAND), "batch", "run", str(lines), "-o", str(tmp_path / "out.jsonl")]
    said = refused([*prefix("ip link set lo up; mount -t tmpfs -o ro t /mnt"), *command], TMPDIR="/mnt")
    assert "TMPDIR, /mnt, is read-only" in said


@pytest.mark.attack
def test_what_can_be_worked_with_is(tmp_path: Path) -> None:
    """No network and no name, few files at first, shared memory that is read-only, a long TMPDIR, and a non-ASCII path under LC_ALL=C."""
    model = tmp_path / "mod èle-日本"
    shutil.copytree(ROOT / "examples" / "demo_model", model)
    (tmp_path / "empty").write_text("")
    (tmp_path / LONG).mkdir()
    setup = "; ".join(
        [
            "ip link set lo up",
            f"mount --bind {tmp_path}/empty /etc/hosts",
            f"mount --bind {tmp_path}/empty /etc/resolv.conf",
            "mount -t tmpfs -o ro t /dev/shm",
            "ulimit -Sn 64",
        ]
    )
    environ = os.environ | {
        "LC_ALL": "C",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONUTF8": "0",
        "TMPDIR": f"{tmp_path}/{LONG}",
    }
    server = Server("--tensor-parallel-size", "2", str(model), prefix=prefix(setup), env=environ)
    try:
        pid = str(server.process.pid)
        inside = ["nsenter", "-t", pid, "-n", "curl", "-fsS", f"{server.url}/health/live"]
        done = subprocess.run(inside, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in server.output and model.name in server.output
        # Without shared memory the ranks use Gloo, whose rendezvous and connections listen too.
        assert [found for found in listening(server) if not is_loopback(found[1])] == []
    finally:
        server.kill()
    assert server.left_over() == []


# The home of Python itself may be one that only root can enter.
ANOTHER_UID = (
    "mkdir /tmp/p; mount --bind {home} /tmp/p; mount -t tmpfs t /root; chmod 755 /root; mkdir -p {home}; mount --move /tmp/p {home}; "
    "mkdir /tmp/u; chown 65534 /tmp/u"
).format(
    home=f"/root/{Path(sys.base_prefix).relative_to('/root').parts[0]}"
    if sys.base_prefix.startswith("/root/")
    else "/opt"
)
NO_SHARED_MEMORY = (
    "mount -t tmpfs t /mnt; for f in null zero full random urandom; do touch /mnt/$f; mount --bind /dev/$f /mnt/$f; done; "
    "ln -s /proc/self/fd /mnt/fd; mount --move /mnt /dev; ! test -e /dev/shm"
)
FULL = f"mount -t tmpfs -o size=64k t /mnt; {FILL.format('/mnt')}"
READ_ONLY = "mount -t tmpfs -o ro t /mnt"
ODD = "/tmp/a b-é日本"
AS_NOBODY = "setpriv --reuid 65534 --regid 65534 --clear-groups --no-new-privs"
# By name: what runs first in a mount namespace, the environment (None: unset), the last words before the command, options of `serve`.
HELD: dict[str, tuple[str, dict[str, str | None], str, tuple[str, ...]]] = {
    "HOME unset": ("true", {"HOME": None}, "", ()),
    "HOME read-only": (READ_ONLY, {"HOME": "/mnt"}, "", ()),
    # In a mount of its own: what is made there is gone with it.
    "HOME missing": ("mount -t tmpfs t /mnt", {"HOME": "/mnt/no/such"}, "", ()),
    "HOME of another user": (ANOTHER_UID, {"HOME": "/root"}, AS_NOBODY, ()),
    "another uid": (ANOTHER_UID, {"HOME": "/tmp/u"}, AS_NOBODY, ()),
    "no /dev/shm": (NO_SHARED_MEMORY, {}, "", ("--tensor-parallel-size", "2")),
    "256 descriptors": ("ulimit -n 256", {}, "", ()),
    "4 GB of address space": ("ulimit -v 4194304", {}, "", ()),
    "python -O": ("true", {"PYTHONOPTIMIZE": "1"}, "", ()),
    "default data directory full": (FULL, {"HOME": None, "XDG_DATA_HOME": "/mnt"}, "", ()),
    "blanks and Unicode": (
        f"mkdir -p '{ODD}/t'; cp -r {ROOT}/examples/demo_model '{ODD}/m è'; cd '{ODD}'",
        {"HOME": ODD, "TMPDIR": f"{ODD}/t"},
        "",
        (f"{ODD}/m è", "--data-dir", f"{ODD}/d à"),
    ),
}


@pytest.mark.attack
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", HELD)
def test_a_server_works_and_leaves_nothing(name: str) -> None:
    setup, changes, before, options = HELD[name]
    environ = {k: v for k, v in (os.environ | changes).items() if v is not None}
    # The namespace has a /tmp of its own, so that nothing of it is left and another user may write it.
    setup = f"mount -t tmpfs -o mode=1777 t /tmp; {setup}"
    server = Server(
        *options, prefix=["unshare", "-m", "bash", "-c", f'set -e; {setup}; exec {before} "$@"', "setup"], env=environ
    )
    try:
        model = json.loads(server.get("/v1/models")[1])["data"][0]["id"]
        status, body = server.post("/v1/completions", {"model": model, "prompt": "x", "max_tokens": 3})
        assert (status, json.loads(body)["usage"]["completion_tokens"]) == (200, 3)
        status, body = server.get("/v1/batches")
        assert status == 200 or json.loads(body)["error"]["message"].endswith("."), (
            "batches work, or say why they do not"
        )
        assert "Traceback" not in server.output
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 0, server.output
        assert server.left_over() == []
    finally:
        server.kill()


@pytest.mark.attack
@pytest.mark.parametrize(
    ("setup", "cause"),
    [(FULL, "No space left on device"), (READ_ONLY, "Read-only file system")],
    ids=["full", "read-only"],
)
def test_a_data_directory_that_was_asked_for_must_work(setup: str, cause: str) -> None:
    command = [
        "unshare",
        "-m",
        "bash",
        "-c",
        f'set -e; {setup}; exec "$@"',
        "setup",
        str(COMMAND),
        "serve",
        "--port",
        "0",
    ]
    said = refused([*command, "--data-dir", "/mnt/d"])
    assert f"/mnt/d cannot be written ({cause})" in said and "--no-batches" in said
