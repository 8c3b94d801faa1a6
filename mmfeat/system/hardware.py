"""What this machine can do: the device and the arithmetic that `auto` stands for."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path

from mmfeat.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda", "mps")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


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
    """The kinds of GPU that torch sees, as long as something imported it: advice alone is not worth that."""
    if (torch := sys.modules.get("torch")) is None:
        return []
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    return [name for name, available in there.items() if available()]


def resolve_dtype(dtype: str = "auto", device: str = "auto", convolutional: bool = False) -> str:
    """The arithmetic: `auto` is bfloat16 where the hardware computes in it, else float32.

    Convolutional models lose too much in bfloat16 (a pretrained MobileNet: cosine 0.991 for the worst of 400
    photos, 0.99998 in float16), so for them `auto` is float16 on CUDA and float32 elsewhere.
    A machine without a GPU is answered without importing torch, which keeps a warm rerun short.
    """
    _check_device(device)
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: use one of {', '.join(DTYPES)}")
    if dtype != "auto":
        return dtype
    if device.startswith(("auto", "cuda")) and Path("/proc/driver/nvidia/version").exists():
        import torch

        if torch.cuda.is_available():
            if convolutional:
                return "float16"
            return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if _cpu_has_bfloat16() and not convolutional else "float32"


def _check_device(device: str) -> None:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise ConfigError(f"--device {device}: use one of {', '.join(DEVICES)} (or cuda:N)")


def cpu_count() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def keep_freed_memory() -> None:
    """Have the C library keep memory that is freed, up to a gigabyte a piece, for the next tensor of that size.

    It would give large pieces back to the system, which clears them again for every activation of every batch: half of
    a convolutional model's time on a CPU. Where there is no glibc nothing happens.
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        for setting in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            library.mallopt(setting, 1 << 30)
