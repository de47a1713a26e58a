"""Three lines per runtime that serve what was written for it: to be pasted, into a shell or into Python."""

from pathlib import Path

from compress.models.checkpoints import load_config
from compress.tasks.registry import task_of

_TEXT = "Once upon a time"


def serving_lines(to: str, file: Path) -> list[str]:
    """Lines that serve `file`, which was written for the runtime `to` (onnx, gguf, compressed-tensors).

    Of a model that writes text each stands alone; those of an encoder are one program.
    """
    if to == "gguf":
        return [
            f"llama-cli -m {file} -p '{_TEXT}'",
            f"llama-server -m {file} --port 8080",
            f"python -c \"from llama_cpp import Llama; print(Llama('{file}')('{_TEXT}'))\"",
        ]
    task = task_of(load_config(file))
    if to == "onnx" and not task.writes:
        return [
            "import onnxruntime, transformers",
            f"tokenizer = transformers.AutoTokenizer.from_pretrained('{file}')",
            f"print(onnxruntime.InferenceSession('{file}/model.onnx').run(None, "
            f"dict(tokenizer(['{_TEXT}'], return_tensors='np'))))",
        ]
    if to == "onnx":
        lines = [
            f"compress-lm generate {file} --prompt '{_TEXT}' --stats",
            f"python -c \"import compress; print(compress.generate('{file}', '{_TEXT}'))\"",
        ]
        genai = f"python -c \"import onnxruntime_genai; onnxruntime_genai.Model('{file}')\""
        chat = f"compress-lm generate {file} --prompt '{_TEXT}' --temperature 0.8 --seed 1"
        return [*lines, genai if (file / "genai_config.json").is_file() else chat]
    lines = [
        f"vllm serve {file}",
        "vllm chat --url http://localhost:8000/v1   # talks to the line above",
    ]
    auto = f"transformers.{task.auto_class}.from_pretrained('{file}')"
    return [*lines, f'python -c "import transformers; print({auto})"']
