"""Conversion of a GGUF model file to a transformers folder in float32, with a pad token distinct from EOS."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from apportion.errors import ModelError


def gguf_to_safetensors(gguf: Path, folder: Path, pad_token: str) -> None:
    """Write the model and tokenizer in `gguf` to `folder`.

    Args:
        gguf: the model file; its weights are dequantized to float32.
        folder: where config, generation config, weights (safetensors) and tokenizer go.
        pad_token: a token of the vocabulary, other than the end of text. Training masks pads: if they were the end of
            text too, the policy would never learn to end.

    Raises:
        ModelError: no gguf package, or a pad token that is unknown or the end of text.
        OSError: a disk that is full or cannot be written to.
    """
    if find_spec("gguf") is None:
        fix = "Run `pip install gguf`, or give a local model folder."
        raise ModelError("model", f"{gguf.name} without the package gguf", "gguf to read it", fix)
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with no_progress_bars():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        _set_pad(model, tokenizer, pad_token)
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except SafetensorError as error:
            # safetensors has the system's error number only in its text
            if f"os error {errno.ENOSPC}" in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
            raise


def _set_pad(model, tokenizer, pad_token: str) -> None:  # type: ignore[no-untyped-def]
    number = tokenizer.get_vocab().get(pad_token)
    if number is None or number == tokenizer.eos_token_id:
        expected = f"a token of the vocabulary other than {tokenizer.eos_token!r}"
        raise ModelError("pad_token", pad_token, expected, "Name a reserved token.")
    tokenizer.pad_token = pad_token
    model.config.pad_token_id = number
    model.generation_config.pad_token_id = number


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Disable transformers' progress bars; the caller prints its own line."""
    import transformers.modeling_gguf_pytorch_utils as reader_module
    from transformers.utils import logging

    gguf_reader: Any = reader_module
    shown = logging.is_progress_bar_enabled()
    bar = gguf_reader.tqdm  # the reader uses tqdm directly and ignores the setting of transformers
    gguf_reader.tqdm = partial(bar, disable=True)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        gguf_reader.tqdm = bar
        if shown:
            logging.enable_progress_bar()
