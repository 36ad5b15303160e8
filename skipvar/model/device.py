"""What `auto` means for `model.device` and `model.dtype` on this machine (a cluster's device: `Cluster`). No torch."""

import os
from pathlib import Path
from typing import Literal

Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16"]

NATIVE_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16"})
"""Flags of x86 processors that multiply bfloat16 themselves: others emulate it, five times slower than float32."""


def has_gpu() -> bool:
    """Whether this process may see an NVIDIA GPU of this machine."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return False
    return any(path.name[len("nvidia") :].isdigit() for path in Path("/dev").glob("nvidia*"))


def find_device(name: Literal["auto"] | Device) -> Device:
    """cpu or cuda: `auto` is the GPU where this machine has one."""
    return ("cuda" if has_gpu() else "cpu") if name == "auto" else name


def find_dtype(name: Literal["auto"] | Dtype, device: Device) -> Dtype:
    """float32 or bfloat16: `auto` is bfloat16 on GPUs and on processors that have it natively."""
    if name != "auto":
        return name
    return "bfloat16" if device == "cuda" or NATIVE_BFLOAT16 & _cpu_flags() else "float32"


def _cpu_flags() -> frozenset[str]:
    """What this machine's processor can do, as Linux tells it; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), frozenset())
