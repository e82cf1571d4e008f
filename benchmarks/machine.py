"""Measures what the machine can do at most: the denominators of the ratios in these tables."""

import platform
import time
from pathlib import Path

import torch


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    model = "unknown CPU"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = f"{names[0]}, {len(names)} cores" if names else model
    return f"{model}, {platform.system()}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of summing an array far larger than any cache, the best of several runs."""
    x = torch.ones(128 * 2**20, dtype=torch.float32, device=device)
    best = 0.0
    for _ in range(6):
        _synchronize(device)
        began = time.perf_counter()
        x.sum()
        _synchronize(device)
        best = max(best, x.numel() * x.element_size() / (time.perf_counter() - began))
    return best


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a large matrix product, the best of several runs."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(4):
        _synchronize(device)
        began = time.perf_counter()
        a @ b
        _synchronize(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - began))
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
