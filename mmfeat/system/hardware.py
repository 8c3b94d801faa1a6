"""The machine: cores, and the device and the arithmetic that `auto` stands for."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from pathlib import Path

from mmfeat.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda", "mps")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # parameters of mallopt(3)

ENGINES = ("local", "ray")


def resolve_device(device: str = "auto") -> str:
    """The torch device: `auto` is CUDA, then Apple's MPS, then the CPU."""
    import torch

    _check_device(device)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: torch sees no CUDA device here; use --device cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("--device mps: torch sees no Apple GPU here; use --device cpu")
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def gpus_seen() -> list[str]:
    """The kinds of GPU that torch sees; none before torch is imported, since advice is not worth the import."""
    if (torch := sys.modules.get("torch")) is None:
        return []
    kinds = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    return [kind for kind, is_available in kinds.items() if is_available()]


def resolve_dtype(dtype: str = "auto", device: str = "auto", convolutional: bool = False) -> str:
    """The arithmetic: `auto` is bfloat16 on hardware that computes in bfloat16, else float32, until a trial decides.

    Convolutional models lose too much in bfloat16 (a pretrained MobileNet: cosine 0.991 for the worst of 400
    photos, 0.99998 in float16), so for such models `auto` is float16 on CUDA and float32 elsewhere.
    On a machine without a GPU, torch is not imported, which keeps a warm rerun short.
    """
    _check_device(device)
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: use one of {', '.join(DTYPES)}")
    if dtype != "auto":
        return dtype
    if device.startswith(("auto", "cuda")) and _has_nvidia_driver():
        import torch

        if torch.cuda.is_available():
            if convolutional:
                return "float16"
            return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if _cpu_has_bfloat16() and not convolutional else "float32"


def fast_half(device: str = "auto") -> str:
    """The half precision that is fast on a device, which a trial may choose: float16 on CUDA; float32 for none."""
    exact = resolve_dtype("auto", device, convolutional=True)
    return exact if exact != "float32" else resolve_dtype("auto", device)


def resolve_products(products: str = "auto", device: str = "auto") -> str:
    """The arithmetic of matrix products in training: `auto` is bfloat16 on a processor that has it, else float32."""
    _check_device(device)
    if products not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"--products {products}: use one of auto, float32, bfloat16")
    gpu = device not in ("auto", "cpu") or (device == "auto" and _has_nvidia_driver())
    automatic = "bfloat16" if _cpu_has_bfloat16() and not gpu else "float32"
    return automatic if products == "auto" else products


def _check_device(device: str) -> None:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise ConfigError(f"--device {device}: use one of {', '.join(DEVICES)} (or cuda:N)")


def cpu_count() -> int:
    """The number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _has_nvidia_driver() -> bool:
    """Whether NVIDIA's driver is there, asked without torch; Windows and its Linux (WSL) have no file in /proc."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _cpu_has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def keep_freed_memory(arenas: int = 0) -> None:
    """Have the C library keep freed memory, up to a gigabyte a piece, for the next tensor of that size.

    Otherwise the library returns large pieces to the system, which clears the pieces again for every activation of
    every batch: half of a convolutional model's time on a CPU. Without glibc nothing happens.

    Threads share so many `arenas`, if any are given: of a thread's own arena, memory always goes back.
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        for setting in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            library.mallopt(setting, 1 << 30)
        if arenas:
            library.mallopt(_M_ARENA_MAX, arenas)


def has_onednn() -> bool:
    """Whether torch has the linear layer of oneDNN, which on AMD's processors takes half the time of BLAS."""
    import torch

    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def peak_memory() -> int:
    """The most bytes that this process has held; 0 where the system does not say."""
    with contextlib.suppress(OSError, StopIteration):  # `getrusage` counts the process that started this one, too
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def check_engine(name: str, ray_address: str | None = None) -> None:
    """Raise `ConfigError` for an unknown engine, and for the address of a cluster that the engine does not use."""
    if name not in ENGINES:
        raise ConfigError(f"--engine {name}: use one of {', '.join(ENGINES)}")
    if ray_address is not None and name != "ray":
        raise ConfigError(f"--ray-address {ray_address}: only --engine ray uses a cluster; add it, or leave this out")
