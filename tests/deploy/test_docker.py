"""The Dockerfile: pins, build context and user, and its health check against a real application."""

import asyncio
import contextlib
import json
import os
import re
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path

from aiohttp.test_utils import TestServer
from support.cloud.deployments import DEPLOY, PINNED, PINS, PROJECT, ROOT, linter
from support.cloud.dockerfile import Instruction, context_files, instructions
from support.fakes.replica import FakeReplica, tokens
from support.servers.certificates import make_pair

from cluster.api.app import make_app
from cluster.cli.options.parser import make_parser
from cluster.router.router import Router
from cluster.system.net import is_loopback
from cluster.system.tls import load
from cluster.text.tokenizer import load_tokenizer
from workers.native.build import REQUIRE

DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
IGNORE = DEPLOY / "docker" / "Dockerfile.dockerignore"
ALL = instructions(DOCKERFILE)
FINAL = [i for i in ALL if i.stage == max(i.stage for i in ALL)]
KEY = "a-secret"
MAX_CONTEXT_BYTES = 20 * 2**20


def one(name: str, among: list[Instruction] = FINAL) -> str:
    (found,) = [i.value for i in among if i.name == name]
    return found


def tree() -> list[str]:
    names = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [f for f in folders if not f.startswith((".venv", ".git"))]
        names += [str((Path(folder) / name).relative_to(ROOT)) for name in files]
    return names


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([linter("hadolint"), str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_release_is_pinned() -> None:
    image = one("ARG", [i for i in ALL if i.stage == -1]).partition("=")[2]
    assert PINNED.fullmatch(image), f"{image} may be another one tomorrow"
    assert {i.words()[0] for i in ALL if i.name == "FROM"} == {"${PYTHON_IMAGE}"}
    python = tuple(map(int, re.search(r":(\d+)\.(\d+)", image).groups()))
    least = tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))
    assert python >= least
    extras = re.search(r'EXTRAS="([^"]*)"', " ".join(i.value for i in ALL if i.name == "ARG"))[1].split()
    asked = [*PROJECT["dependencies"], *(r for e in extras for r in PROJECT["optional-dependencies"][e])]
    for requirement in asked:
        name = re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()
        assert name in PINS, f"{name} is not in constraints.txt, so two builds may differ"
    assert any("-c constraints.txt" in i.value for i in ALL if i.name == "RUN")
    assert f'org.opencontainers.image.version="{PROJECT["version"]}"' in one("LABEL")


def test_triton_finds_a_compiler() -> None:
    """And Python's headers, which the base image has: it is not Debian's own Python."""
    installs = [i.value for i in FINAL if i.name == "RUN" and "apt-get install" in i.value]
    assert {"gcc", "libc6-dev"} <= {word for value in installs for word in value.split()}
    assert one("ARG", [i for i in ALL if i.stage == -1]).startswith("PYTHON_IMAGE=python:")


def test_the_wheel_has_the_kernels_for_cpus() -> None:
    """Or its build fails. Those of the host, for another C library, are not sent."""
    (stage,) = {i.stage for i in ALL if i.name == "RUN" and "pip wheel" in i.value}
    steps = [i for i in ALL if i.stage == stage]
    assert any("g++" in i.value.split() for i in steps if i.name == "RUN")
    assert one("ENV", steps) == f"{REQUIRE}=1"
    names = ["workers/native/cpp/build_mark.cpp", "workers/native/libtramontane_cpu_avx2.so"]
    assert context_files(ROOT, IGNORE, names) == names[:1]


def test_the_kernels_are_compiled_where_the_server_looks_for_them_and_may_add_some() -> None:
    folder = re.search(r"TRITON_CACHE_DIR=(\S+)", one("ENV"))[1]
    (made,) = [i.value for i in FINAL if i.name == "RUN" and "install -d" in i.value]
    assert folder in re.search(r"install -d -o tramontane [^&]*", made)[0].split()
    user, compiled = (
        next(n for n, i in enumerate(FINAL) if i.name == name and part in i.value)
        for name, part in (("USER", "1000"), ("RUN", "python -m "))
    )
    assert user < compiled, "the server could not write what root has made"
    assert find_spec(FINAL[compiled].value.split("python -m ")[1].split()[0]) is not None


def test_the_required_driver_is_the_one_torch_was_built_for() -> None:
    required = re.search(r'NVIDIA_REQUIRE_CUDA="?cuda>=(\d+\.\d+)', one("ENV"))[1]
    torch, built_for = re.search(
        r"torch (\d+\.\d+) is built for CUDA (\d+\.\d+):?", DOCKERFILE.read_text(encoding="utf-8")
    ).groups()
    assert required == built_for
    assert PINS["torch"].startswith(f"{torch}."), (
        "look up which CUDA the new torch is built for, and update the Dockerfile"
    )


def test_the_context_has_what_is_copied_and_little_else() -> None:
    names = context_files(ROOT, IGNORE, tree())
    copied = [i for i in ALL if i.name == "COPY" and "--from" not in i.value]
    sources = [source for i in copied for source in i.words()[:-1]]
    assert len(sources) > 5
    for source in sources:
        assert any(n == source or n.startswith(f"{source}/") for n in names), f"{source} is ignored, so COPY fails"
    for name in names:
        assert any(name == s or name.startswith(f"{s}/") for s in sources), f"{name} is sent and never copied"
        assert not name.endswith(".pyc")
    size = sum((ROOT / name).stat().st_size for name in names)
    assert size < MAX_CONTEXT_BYTES, f"the context has {size / 2**20:.0f} MiB"


def test_the_server_runs_without_root_and_drains_on_sigterm() -> None:
    assert one("USER") == "1000:1000"
    for name in ("ENTRYPOINT", "CMD"):
        assert isinstance(json.loads(one(name)), list), f"in its shell form {name} would keep SIGTERM from the server"
    entrypoint, command = json.loads(one("ENTRYPOINT")), json.loads(one("CMD"))
    assert entrypoint[-1] in PROJECT["scripts"]
    args = make_parser().parse_args(command)
    assert not is_loopback(args.host), "nobody could reach it from outside the container"
    assert one("EXPOSE") == str(args.port)


def test_commands_in_the_files_name_this_release() -> None:
    for path in (DOCKERFILE, DEPLOY / "docker" / "compose.yaml", DEPLOY / "kubernetes" / "tramontane.yaml"):
        named = set(re.findall(r"\btramontane:(\d+\.\d+\.\d+)", path.read_text()))
        assert named == {PROJECT["version"]}, f"{path.name} names {named}"


@contextlib.asynccontextmanager
async def serving(*replicas: FakeReplica, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    app = make_app(
        router=Router(replicas),
        tokenizer=load_tokenizer(ROOT / "examples" / "demo_model"),
        chat_template=None,
        model_name="demo",
        api_key=KEY,
    )
    server = TestServer(app, host="127.0.0.1", scheme="http" if tls is None else "https")
    await server.start_server(ssl=tls)
    try:
        yield f"{server.scheme}://{server.host}:{server.port}"
    finally:
        await server.close()


async def health(url: str, key: str | None) -> tuple[int, str]:
    """Exit code and output of the command in HEALTHCHECK."""
    (command,) = json.loads(one("HEALTHCHECK").partition("CMD ")[2])
    (source,) = [i.words()[0] for i in FINAL if i.name == "COPY" and i.words()[-1].endswith(f"/bin/{command}")]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(ROOT / source),
        url,
        stdout=asyncio.subprocess.PIPE,
        env={"http_proxy": "http://127.0.0.1:9"} | ({"TRAMONTANE_API_KEY": key} if key else {}),
    )
    output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


async def test_the_health_check_distinguishes_ready_and_not_ready(tmp_path: Path) -> None:
    async with serving(FakeReplica(tokens([42]), replica_id="r0")) as url:
        code, output = await health(url, KEY)
        assert code == 0 and '"r0"' in output, output
        code, output = await health(url, None)
        assert code == 0 and json.loads(output) == {"status": "ok"}, "without the key it is enough that it lives"
    code, output = await health(url, KEY)
    assert code == 1 and "refused" in output
    async with serving() as url:
        code, output = await health(url, KEY)
        assert code == 1 and json.loads(output)["status"] == "unavailable"
    async with serving(FakeReplica(tokens([42]), replica_id="r0"), tls=load(*make_pair(tmp_path, "host"))) as url:
        code, output = await health(url, KEY)
        assert code == 0 and '"r0"' in output, output
