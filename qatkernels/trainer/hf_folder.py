"""Folders that transformers reads: `train` and `pack` write them for a model of transformers, other commands open them.

    AutoModelForCausalLM.from_pretrained("runs/llama/w4")   # after `import qatkernels.integrations.transformers`

Transformers finds the model in ``config.json``, which also says how each layer is quantized.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import files
from ..extras import missing
from ..files import CheckpointError
from ..formats._folder import new_folder
from ..nn.recipe import METHOD, recipe_of

#: Files of a folder that say how text becomes tokens, and how the model generates. They are copied as they are.
COPIED = (
    "added_tokens.json", "chat_template.jinja", "generation_config.json", "merges.txt", "special_tokens_map.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
)  # fmt: skip


def is_one(path: Path) -> bool:
    """Whether a path is a folder with the ``config.json`` of a model of transformers.

    Raises:
        CheckpointError: if there is a ``config.json`` that cannot be read.
    """
    file = path / "config.json"
    return file.is_file() and "model_type" in files.read_json(file)


def write_config(folder: Path, model: nn.Module, settings: dict[str, Any]) -> None:
    """Write ``config.json``.

    Args:
        folder: the folder.
        model: the model, quantized or not.
        settings: the configuration that the model was built from.
    """
    changed: dict[str, Any] = {"architectures": [architecture(model)], "dtype": "float32"}
    if recipe := recipe_of(model):
        changed["quantization_config"] = {"quant_method": METHOD, "recipe": recipe}
    kept = {key: value for key, value in settings.items() if key not in ("torch_dtype", "quantization_config")}
    files.write_json(folder / "config.json", kept | changed)


def architecture(model: nn.Module) -> str:
    """Return the name of a model's class in transformers; FSDP2 makes a subclass of it."""
    classes = type(model).__mro__
    return next((c.__name__ for c in classes if c.__module__.partition(".")[0] == "transformers"), classes[0].__name__)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of the tokenizer, and the settings for generating, where there are any.

    Args:
        source: the folder of a model, or a file in it, such as its ``config.json``.
        folder: where to.
    """
    source = source.parent if source.is_file() else source
    for name in COPIED:
        if (source / name).is_file():
            files.write(folder / name, (source / name).read_bytes())


def load(folder: Path) -> nn.Module:
    """Return the model in a folder, on the CPU and in eval mode. Pickled weights are refused: they can run code.

    Raises:
        CheckpointError: if transformers cannot read it.
        MissingExtraError: if transformers is not installed.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise missing(f"reading {folder}", "hf", error) from error
    from ..integrations import quantizer as _registers  # noqa: F401

    read: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, info = read(folder, use_safetensors=True, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{folder} is not a model that transformers reads ({error})") from error
    quantized = [name for name in info["unexpected_keys"] if name.endswith(("._extra_state", ".weight.packed"))]
    if quantized:
        raise CheckpointError(
            f"{folder} holds quantized layers ({min(quantized)}), and its config.json does not say so: restore its "
            "quantization_config"
        )
    if info["missing_keys"] or info["mismatched_keys"]:
        first = sorted(str(key) for key in (*info["missing_keys"], *info["mismatched_keys"]))[0]
        raise CheckpointError(f"{folder} does not hold a whole model: {first} is missing or has another shape")
    loaded: nn.Module = model.eval()
    return loaded


def save(model: Any, folder: Path, settings: dict[str, Any], source: Path) -> int:
    """Write a model of transformers to a new folder.

    Args:
        model: the model.
        folder: a folder that does not exist yet, or is empty.
        settings: the configuration that the model was built from.
        source: the folder whose tokenizer is copied.

    Returns:
        Bytes of the weights.

    Raises:
        CheckpointError: if the folder holds something, or cannot be written.
    """
    model.config.use_cache = settings.get("use_cache", True)  # off while training
    with new_folder(folder) as new:
        model.save_pretrained(new)
        for name in COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, new / name)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def tokenizer(folder: Path, model: nn.Module) -> Any:
    """Return the tokenizer of a folder; tokens are bytes if it has none and the model knows 256 tokens.

    Raises:
        CheckpointError: if the folder has no tokenizer and the model knows another number of tokens, or transformers
            cannot read the tokenizer.
    """
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"the tokenizer in {folder} cannot be read ({error})") from error
    size = model.config.vocab_size  # type: ignore[union-attr]
    if size != 256:
        raise CheckpointError(
            f"{folder} has no tokenizer for the {size} tokens of its model: give --tokenizer a folder"
        )
    return Bytes()


class Bytes:
    """A tokenizer whose tokens are the bytes of a text."""

    def __call__(self, text: str, return_tensors: str = "pt") -> Any:
        """Return ``input_ids``, int64 ``[1, bytes]``."""
        from transformers import BatchEncoding

        ids = list(text.encode(errors="surrogateescape"))
        return BatchEncoding({"input_ids": torch.tensor([ids])})

    def decode(self, tokens: list[int], **_: Any) -> str:
        """Return the text of tokens."""
        return bytes(tokens).decode(errors="replace")


@torch.no_grad()
def show_text(
    model: Any, tokenizer: Any, prompt: bytes, count: int, show: Callable[[str], None], *, temperature: float, seed: int
) -> int:
    """Continue a text with ``model.generate``, and show it piece by piece, prompt included.

    Args:
        model: a causal language model of transformers, in eval mode.
        tokenizer: what :func:`tokenizer` returned.
        prompt: the text to continue.
        count: number of new tokens; the model may end the text earlier.
        show: is called with each piece.
        temperature: 0 takes the most likely token.
        seed: seed of the draws.

    Returns:
        The number of new tokens.
    """
    from transformers import TextStreamer

    class Stream(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            show(text + "\n" * stream_end)

    inputs = tokenizer(prompt.decode(errors="surrogateescape"), return_tensors="pt").to(model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokens = model.generate(
            **inputs, max_new_tokens=count, min_new_tokens=1, streamer=Stream(tokenizer), **sampling
        )
    return int(tokens.shape[1] - inputs["input_ids"].shape[1])
