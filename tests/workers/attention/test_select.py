"""Which attention backend is chosen, and that the reason is said."""

import logging

import pytest
import torch
from support.native import native_library

from workers.attention import flash, select
from workers.attention.select import select_backend
from workers.errors import ConfigError
from workers.kernels.usable import why_triton_cannot_run
from workers.native.library import NoNativeLibrary

SHAPE = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "sliding_window": None}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU on which both kernels run."""
    monkeypatch.setattr(select, "why_triton_cannot_run", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


def choose(device, *, dtype=torch.bfloat16, block_size=16, **changes):
    selection = select_backend(device=device, dtype=dtype, block_size=block_size, **{**SHAPE, **changes})
    return selection.backend.name, selection.reason


def test_the_cpu_uses_the_compiled_kernel(monkeypatch):
    monkeypatch.setattr(select, "load_library", lambda: native_library("avx2"))
    assert choose(CPU) == ("native", "it is the first choice on the CPU")


def test_without_compiled_kernels_the_cpu_uses_the_specification(monkeypatch):
    monkeypatch.setattr(select, "load_library", lambda: NoNativeLibrary(reason="They are not built."))
    reason = "native cannot run: there are no compiled kernels (They are not built)"
    assert choose(CPU) == ("sdpa", reason)
    with pytest.raises(ConfigError, match=r"The attention backend native cannot run: there are no compiled kernels"):
        choose(CPU, choice="native")


def test_triton_is_first_on_cuda(gpu):
    assert choose(CUDA, dtype=torch.float32, head_dim=80) == ("triton", "it is the first choice on CUDA")


def test_flash_is_second(gpu, monkeypatch, caplog):
    monkeypatch.setattr(select, "why_triton_cannot_run", lambda device: "it is not installed")
    name, reason = choose(CUDA, block_size=256)
    assert name == "flash"
    assert "triton cannot run: it is not installed" in reason
    assert reason in caplog.text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32, "block_size": 256}, "float16 or bfloat16"),
        ({"block_size": 16}, "multiple of 256, not 16"),
        ({"block_size": 256, "head_dim": 100}, "multiple of 8"),
        ({"block_size": 256, "kv_cache_dtype": "int8"}, "does not read keys and values in int8"),
    ],
)
def test_a_fallback_to_the_specification_is_a_warning_with_both_reasons(gpu, changes, reason, monkeypatch, caplog):
    monkeypatch.setattr(select, "why_triton_cannot_run", lambda device: "its launcher does not start: no C compiler")
    assert choose(CUDA, **changes)[0] == "sdpa"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "no C compiler" in record.message and reason in record.message and "slow" in record.message


def test_the_interpreter_does_not_run_on_a_gpu():
    """These tests turn it on; with it, a GPU's tensors would be computed on the host."""
    assert "TRITON_INTERPRET" in (why_triton_cannot_run(CUDA) or "")


def test_a_release_of_torch_without_paged_attention_is_refused(gpu, monkeypatch):
    monkeypatch.setattr(flash, "varlen_attn", lambda query, key, value, cu_seq_q, *, scale=None: query)  # as in 2.11
    obstacle = select.flash_obstacle(torch.bfloat16, block_size=256, head_dim=128)
    assert obstacle is not None and "lacks block_table, seqused_k, num_splits, enable_gqa" in obstacle


@pytest.mark.parametrize("changes", [{"head_dim": 264}, {"num_heads": 128, "num_kv_heads": 1}])
def test_what_triton_does_not_take(gpu, changes):
    with pytest.raises(ConfigError, match="triton cannot run: it needs") as caught:
        choose(CUDA, choice="triton", **changes)
    assert caught.value.param == "--attention-backend"


@pytest.mark.parametrize("name", ["triton", "flash", "sdpa"])
def test_an_option_names_the_backend(gpu, name):
    assert choose(CUDA, block_size=256, choice=name) == (name, "--attention-backend names it")


@pytest.mark.parametrize("name", ["triton", "flash"])
def test_a_named_kernel_that_cannot_run_is_an_error(name):
    with pytest.raises(ConfigError, match=f"{name} cannot run: it needs a CUDA device"):
        choose(CPU, choice=name)
    assert choose(CPU, choice="sdpa")[0] == "sdpa"


def test_deterministic_attention_is_tritons_or_none(gpu, monkeypatch):
    assert choose(CUDA, deterministic=True)[0] == "triton"
    assert choose(CPU, deterministic=True)[0] in ("native", "sdpa"), "both are"
    monkeypatch.setattr(select, "why_triton_cannot_run", lambda device: "it is not installed")
    with pytest.raises(ConfigError, match=r"--deterministic cannot work: .* and it is not installed"):
        choose(CUDA, block_size=256, deterministic=True)
