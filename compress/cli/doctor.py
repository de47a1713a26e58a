"""doctor: what this machine can do, and what is missing."""

import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from compress.host.machine import machine, versions
from compress.host.memory import available_memory_bytes
from compress.runtimes.providers import missing_providers, present_providers

# extra -> (package, what it is for)
_EXTRAS = {
    "gguf": ("gguf", "reading .gguf checkpoints"),
    "encoders": ("onnxscript", "exporting encoders and encoder-decoders to ONNX"),
    "bitsandbytes": ("bitsandbytes", "that library's grids"),
    "compressed-tensors": ("compressed-tensors", "exporting for transformers and vLLM"),
    "genai": ("onnxruntime-genai", "running exported ONNX folders in onnxruntime-genai"),
    "pruning": ("torch-pruning", "taking out heads, neurons and channels"),
    "parquet": ("pyarrow", "reading .parquet text"),
    "datasets": ("datasets", "reading text from the datasets hub"),
    "tensorboard": ("tensorboard", "training curves in TensorBoard"),
    "mlflow": ("mlflow", "training curves in MLflow"),
    "wandb": ("wandb", "training curves in Weights & Biases"),
}
_WANTED = {
    "avx512_bf16": "bfloat16 training about four times as fast as float32",
    "avx512_vnni": "the fastest integer products in ONNX Runtime",
}


def print_doctor() -> None:
    """Print it."""
    found = machine()
    print(f"cpu           {found['cpu']}")
    print(f"cores         {found['cores']}")
    print(f"memory        {found['memory_bytes'] / 1e9:.1f} GB, {available_memory_bytes() / 1e9:.1f} GB free")
    print(f"disk          {shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB free here")
    print(f"instructions  {' '.join(found['instruction_sets']) or 'unknown'}")
    for name, use in _WANTED.items():
        if found["instruction_sets"] and name not in found["instruction_sets"]:
            print(f"              no {name}, so without {use}")
    for name, installed in versions().items():
        print(f"{name:<13} {installed}")
    print(f"gpu           {_gpu()}")
    print(f"providers     {', '.join(present_providers())}, of ONNX Runtime")
    for provider, remedy in missing_providers().items():
        print(f"              no {provider}: {remedy}")
    for extra, (package, use) in _EXTRAS.items():
        try:
            state = version(package) if find_spec(package.replace("-", "_")) else None
        except PackageNotFoundError:
            state = None
        hint = state or f"missing ({use}): pip install {package}  (extra '{extra}')"
        print(f"{package:<13} {hint}")


def _gpu() -> str:
    if version("torch").endswith("+cpu"):  # a build that knows no other device
        return "none that torch can use"
    import torch

    if not torch.cuda.is_available():
        return "none that torch can use"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names)
