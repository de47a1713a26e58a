"""What the numbers were measured on: the machine and the versions, without importing any of the libraries.

Both dictionaries go verbatim into every result line, `doctor` prints them, and a result counts as already
measured only where both are equal. So they hold nothing that changes between two runs on one machine.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from compress.host.memory import total_memory_bytes
from compress.version import __version__

INSTRUCTION_SETS = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8",
    "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip
PACKAGES = (
    "torch", "transformers", "onnxruntime", "onnx", "numpy", "llama-cpp-python", "compressed-tensors",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """{cpu, cores, instruction_sets, memory_bytes, os}: cores are those that this process may use."""
    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "instruction_sets": instruction_sets(),
        "memory_bytes": total_memory_bytes(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Versions of Python, this package and the runtimes; one that is not installed is left out."""
    found = {"python": platform.python_version(), "compress": __version__}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def usable_cores() -> int:
    """Logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def instruction_sets() -> list[str]:
    """Those of `INSTRUCTION_SETS` that the processor reports; empty where the system does not tell."""
    words = set(_cpuinfo("flags").split()) | set(_cpuinfo("Features").split())
    if sys.platform == "darwin":
        intel = set(_sysctl("machdep.cpu.features").lower().split())
        words |= {"asimd", "asimddp"} if platform.machine() == "arm64" else intel
    return [name for name in INSTRUCTION_SETS if name in words]


def adds_products_in_32_bits() -> bool:
    """Whether the processor reports products of bytes added in 32 bits: x86's VNNI, ARM's dot product."""
    return not {"avx_vnni", "avx512_vnni", "asimddp"}.isdisjoint(instruction_sets())


def _cpu_model() -> str:
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.processor()
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str:
    """First value of a field of /proc/cpuinfo, or an empty string."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == field), "")


def _sysctl(name: str) -> str:
    try:
        told = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=True)
        return told.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
