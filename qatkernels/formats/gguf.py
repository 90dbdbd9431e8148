"""GGUF, the format of llama.cpp: whole models of the Llama, Mistral, Qwen and Gemma families.

Weights are written as blocks from their codes (`gguf_blocks.py`). Names of tensors and of settings are those of the
package ``gguf`` (``pip install qatkernels[export]``), which llama.cpp's authors maintain.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..extras import missing
from ..files import replacing
from ..nn import packed_modules, quantized_modules
from ..nn.activation import quantized_ends
from ..nn.packed_linear import Packed
from ..nn.quantized import Quantized
from ._export import ExportReport, ExportRow
from ._folder import other_tensors
from .gguf_blocks import BLOCKS, Block, as_steps, fitting
from .integers import IntegerWeight, UnfitError

#: Kinds of tokens in GGUF.
_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp expects of a family of models.

    Attributes:
        name: its name in GGUF.
        pattern: attention is local but in every so many layers; 0 if it never is.
        permuted: q and k have their rows in the order of the original Llama: pairs, not halves.
        norm_offset: what is added to the weights of norms.
    """

    name: str
    pattern: int = 0
    permuted: bool = False
    norm_offset: float = 0.0


#: By ``model_type`` of transformers.
ARCHITECTURES = {
    "llama": Architecture("llama", permuted=True),
    "mistral": Architecture("llama", permuted=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", norm_offset=1.0),
    "gemma2": Architecture("gemma2", pattern=2, norm_offset=1.0),
    "gemma3_text": Architecture("gemma3", pattern=6, norm_offset=1.0),
}


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise missing("export to GGUF", "export", error) from error
    return gguf


def export(
    model: nn.Module,
    path: Path,
    *,
    tokenizer: Any = None,
    types: str | None = None,
    embeddings: str = "exact",
    convert: bool = False,
) -> ExportReport:
    """Write a causal language model of transformers as one GGUF file.

    Each quantized layer takes the smallest type of blocks that holds it bit for bit, embeddings too. An output layer
    that is tied to a quantized embedding is not stored again: llama.cpp takes the embedding. Norms and biases are
    float32.

    Args:
        model: a quantized or packed model: Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma 2 or 3.
        path: the file.
        tokenizer: a fast tokenizer of transformers; or the path of a GGUF file whose vocabulary is copied; or None,
            which leaves the vocabulary out: such a file computes logits of token numbers, and no text.
        types: the type for all quantized layers, such as ``"Q4_0"``, instead of the smallest for each.
        embeddings: for those that are not quantized: ``"exact"`` keeps embeddings and heads in full precision, in the
            smallest float type that holds them; ``"Q8_0"`` rounds these two to 8 bits, as llama.cpp's own files do.
        convert: round scales that float16 does not hold, instead of refusing the layer; the report says how far off
            values are.

    Returns:
        How each layer was stored.

    Raises:
        ValueError: if the model has no quantized layer, or is of no kind that is known here.
        UnfitError: if no type, or not the one asked for, holds a layer exactly.
        MissingExtraError: if ``gguf`` is not installed.
        CheckpointError: if the file cannot be written.
    """
    if types is not None and types not in BLOCKS:
        raise ValueError(f"types is {types!r}, must be None or one of {sorted(BLOCKS)}")
    if embeddings not in ("exact", "Q8_0"):
        raise ValueError(f"embeddings is {embeddings!r}, must be 'exact' or 'Q8_0'")
    gguf = _package()
    config = _config(model)
    architecture = ARCHITECTURES[config.model_type]
    layers: dict[str, Quantized | Packed] = {**quantized_modules(model), **packed_modules(model)}
    if not layers:
        raise ValueError("the model has no quantized layer, quantize_model makes them")
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture.name)
        try:
            _add_settings(writer, config)
            _add_vocabulary(writer, tokenizer, gguf)
            tensors = _Tensors(writer, _names(gguf, architecture, config), architecture, config)
            stored = _once(layers)
            rows = [tensors.add_quantized(name, layer, types, convert) for name, layer in stored.items()]
            tensors.add_others(model, layers, embeddings)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    notes = ["without a vocabulary: give tokenizer= for a file that reads text"] if tokenizer is None else []
    return ExportReport(path, rows, path.stat().st_size, notes)


def _once(layers: dict[str, Quantized | Packed]) -> dict[str, Quantized | Packed]:
    """Return layers without an output layer that is tied to a quantized embedding, whose codes llama.cpp takes."""
    tables = {_identity(layer) for layer in layers.values() if isinstance(layer, nn.Embedding)}
    return {n: m for n, m in layers.items() if isinstance(m, nn.Embedding) or _identity(m) not in tables}


def _identity(layer: Quantized | Packed) -> tuple[int, ...]:
    return (id(layer.weight), 0) if isinstance(layer, Packed) else (id(layer.weight), id(layer.scale))


def _config(model: nn.Module) -> Any:
    """Return a model's configuration.

    Raises:
        ValueError: if it is of no family that is known here.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"the model is {type(model).__name__} of model_type {kind!r}; export to GGUF knows {sorted(ARCHITECTURES)}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if any(r.get("rope_type", "default") != "default" for r in _ropes(rope).values()):
        raise ValueError(f"the model's rotary embedding is {rope}, export to GGUF knows rope_type 'default'")
    _check_attention(config, ARCHITECTURES[kind].pattern)
    return config


def _check_attention(config: Any, pattern: int) -> None:
    """Raise ValueError if the model computes what llama.cpp does not, and a file has no field that says so."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    wanted = "gelu_pytorch_tanh" if "gemma" in config.model_type else "silu"
    if activation != wanted:
        raise ValueError(
            f"the model's activation function is {activation!r}, must be {wanted!r}, as llama.cpp computes"
        )
    local_rope = _ropes(getattr(config, "rope_parameters", None) or {}).get("sliding_attention", {})
    if (theta := local_rope.get("rope_theta", 1e4)) != 1e4:
        raise ValueError(f"rope_theta of local attention is {theta}, must be 10000, as llama.cpp computes")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.model_type != "gemma2" and getattr(config, name, None) is not None:
            raise ValueError(f"{name} is {getattr(config, name)}, must be None: llama.cpp has it for Gemma 2 alone")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if (scalar := getattr(config, "query_pre_attn_scalar", head_dim)) != head_dim:
        raise ValueError(
            f"query_pre_attn_scalar is {scalar}, must be head_dim ({head_dim}): llama.cpp scales queries by it"
        )
    window, longest = getattr(config, "sliding_window", None), config.max_position_embeddings
    if getattr(config, "layer_types", None) is None and window is not None and window < longest:
        raise ValueError(
            f"sliding_window is {window} and max_position_embeddings {longest}: llama.cpp computes full attention in "
            "this family; set max_position_embeddings of the configuration to the window, or sliding_window to None"
        )
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    for i, kind in enumerate(kinds):
        local = pattern > 0 and (i + 1) % pattern > 0
        if kind != ("sliding_attention" if local else "full_attention"):
            raise ValueError(
                f"layer_types[{i}] is {kind!r}, must be {'local' if local else 'full'} attention: llama.cpp takes "
                + (f"every {pattern}th layer to be full and the others local" if pattern else "every layer to be full")
            )


def _ropes(rope: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rotary parameters by kind of layer; Gemma 3 has two."""
    return rope if rope and all(isinstance(value, dict) for value in rope.values()) else {"": rope}


def _add_settings(writer: Any, config: Any) -> None:
    """Add what llama.cpp builds the model from."""
    heads, ropes = config.num_attention_heads, _ropes(getattr(config, "rope_parameters", None) or {})
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float((ropes.get("full_attention") or next(iter(ropes.values()))).get("rope_theta", 1e4)))
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(1)  # mostly float16: there is no number for files of several types
    if ARCHITECTURES[config.model_type].pattern:
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _names(gguf: Any, architecture: Architecture, config: Any) -> Callable[[str], str]:
    """Return what gives a parameter's name in GGUF."""
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)

    def name(parameter: str) -> str:
        found: str | None = table.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"llama.cpp's {architecture.name} has no tensor for {parameter}")
        return found

    return name


class _Tensors:
    """Adds tensors to a file."""

    def __init__(self, writer: Any, name: Callable[[str], str], architecture: Architecture, config: Any) -> None:
        self.writer, self.name, self.architecture, self.config = writer, name, architecture, config

    def add_quantized(self, name: str, layer: Quantized | Packed, types: str | None, convert: bool) -> ExportRow:
        """Add the weight of a quantized layer."""
        if ends := quantized_ends(layer):
            what = next(iter(ends))
            hint = {
                "input": "llama.cpp always does, its way. Train without act_bits",
                "output": "llama.cpp never does. Train without out_bits",
            }[what]
            raise ValueError(f"{name} quantizes its {what}, for which GGUF has no field: {hint}")
        try:
            weight = IntegerWeight.of(layer)
            stored = weight.rounded_steps(torch.float16) if convert else weight
            block, data = _chosen(stored, types)
        except UnfitError as error:
            raise UnfitError(f"{name} ({layer.weight.shape[0]} x {layer.weight.shape[1]}): {error}") from None
        rows = self._order(name, len(data))
        shape = weight.integers.shape
        self._add(f"{name}.weight", data if rows is None else data[rows], block, shape)
        off = (stored.dequantize() - weight.dequantize()).abs().max() / weight.dequantize().abs().max()
        return ExportRow(name, block.name, block.bits_per_weight, float(off) if shape.numel() else 0.0)

    def add_others(self, model: nn.Module, layers: dict[str, Quantized | Packed], embeddings: str) -> None:
        """Add every parameter that is not the weight of a quantized layer, each once."""
        ends: Any = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
        rounded = {id(m.weight) for m in ends if m is not None} if embeddings == "Q8_0" else set()
        for name, tensor in other_tensors(model, layers).items():
            value = tensor.detach().cpu()
            if id(tensor) in rounded and value.shape[1] % 32 == 0:
                block = BLOCKS["Q8_0"]
                self._add(name, block.encode(as_steps(value)), block, value.shape)
                continue
            if value.ndim == 1 and "norm" in name.rpartition(".")[0]:
                value = value.float() + self.architecture.norm_offset
            rows = self._order(name.rpartition(".")[0], len(value))
            value = value if rows is None else value[rows]
            self.writer.add_tensor(self.name(name), *_as_float(value.contiguous()))

    def _add(self, name: str, data: np.ndarray[Any, Any], block: Block, shape: torch.Size) -> None:
        # As int8, of which the writer takes the shape as it is given: it does not know the newest types.
        data = np.ascontiguousarray(data).view(np.int8)
        self.writer.add_tensor(self.name(name), data, raw_shape=tuple(shape), raw_dtype=block.number)

    def _order(self, layer: str, rows: int) -> Tensor | None:
        """Return the order of the rows of q and k where llama.cpp has pairs in place of halves, None elsewhere."""
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        count = heads.get(layer.rpartition(".")[2]) if self.architecture.permuted else None
        if count is None:
            return None
        return torch.arange(rows).view(count, 2, -1).transpose(1, 2).reshape(-1)


def _chosen(weight: IntegerWeight, types: str | None) -> tuple[Block, np.ndarray[Any, Any]]:
    """Return the smallest type that holds a weight, or the one that is asked for, and the bytes.

    Raises:
        UnfitError: if there is none.
    """
    if types is not None:
        return BLOCKS[types], BLOCKS[types].encode(weight)
    found, reasons = fitting(weight)
    if not found:
        text = "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())
        raise UnfitError(f"no type of GGUF holds it exactly{text}")
    name, data = next(iter(found.items()))
    return BLOCKS[name], data


def _as_float(value: Tensor) -> tuple[np.ndarray[Any, Any], tuple[int, ...] | None, int | None]:
    """Return a tensor in the smallest float type that holds it, its shape, and the number of the type in GGUF."""
    wide = value.float()
    if value.ndim > 1 and torch.equal(wide.half().float(), wide):
        return wide.half().numpy(), None, None
    if value.ndim > 1 and torch.equal(wide.bfloat16().float(), wide):
        return wide.bfloat16().view(torch.int16).numpy(), tuple(value.shape), 30
    return wide.numpy(), None, None


def _add_vocabulary(writer: Any, tokenizer: Any, gguf: Any) -> None:
    if tokenizer is None:
        writer.add_tokenizer_model("none")
    elif isinstance(tokenizer, str | Path):
        _copy_vocabulary(writer, Path(tokenizer), gguf)
    else:
        _add_tokenizer(writer, tokenizer)


def _copy_vocabulary(writer: Any, path: Path, gguf: Any) -> None:
    """Copy every ``tokenizer.*`` field of another file."""
    for key, field in gguf.GGUFReader(path).fields.items():
        if key.startswith("tokenizer."):
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)


#: llama.cpp's name for how text is split before the merges, by what a fast tokenizer's file says of it.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    ("[digits]", "[bytes]"): "smollm",
    ("[bytes]",): "gpt-2",
    (rf"{_WORDS}\p{{N}}{{1,3}}{_REST}", "[bytes]"): "llama-bpe",
    (rf"{_WORDS}\p{{N}}{_REST}", "[bytes]"): "qwen2",
}


def _add_tokenizer(writer: Any, tokenizer: Any) -> None:
    """Add the vocabulary of a fast tokenizer: byte-level BPE, or BPE that falls back to bytes (SentencePiece).

    Raises:
        ValueError: if it is of another kind.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    model: dict[str, Any] = described.get("model", {"type": type(tokenizer).__name__})
    kind = model["type"]
    if kind != "BPE":
        raise ValueError(
            f"the tokenizer is {kind}, export to GGUF writes BPE; give the path of a GGUF file with this vocabulary"
        )
    added = {token["id"]: token for token in described["added_tokens"]}
    numbers = {token["content"]: number for number, token in added.items()} | model["vocab"]
    size = max(numbers.values()) + 1
    texts = [f"[PAD{i}]" for i in range(size)]
    kinds = [_USER] * size
    for text, number in numbers.items():
        texts[number], kinds[number] = text, _NORMAL
    for number, token in added.items():
        kinds[number] = _CONTROL if token["special"] else _USER
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    if model.get("byte_fallback"):
        _add_sentencepiece(writer, texts, kinds, merges, model.get("unk_token"))
    else:
        splits = _splits(described.get("pre_tokenizer"))
        if splits not in _SPLITS:
            raise ValueError(
                f"the tokenizer splits text by {splits}, for which no name of llama.cpp's is known here; give the path "
                "of a GGUF file with this vocabulary"
            )
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_SPLITS[splits])
        writer.add_token_list(texts)
        writer.add_token_types(kinds)
        writer.add_token_merges(merges)
    for role in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{role}_token_id", None)) is not None:
            getattr(writer, f"add_{role}_token_id")(number)
    empty = tokenizer("").input_ids
    writer.add_add_bos_token(empty[:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _add_sentencepiece(writer: Any, texts: list[str], kinds: list[int], merges: list[str], unknown: str | None) -> None:
    """Add a vocabulary whose merges llama.cpp orders by scores: each merge gets the negative of its place."""
    scores = [0.0] * len(texts)
    places = {text: number for number, text in enumerate(texts)}
    for place, merge in enumerate(merges):
        merged = merge.replace(" ", "", 1)
        if merged in places and scores[places[merged]] == 0:
            scores[places[merged]] = -float(place + 1)
    for number, text in enumerate(texts):
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kinds[number] = _BYTE
        elif text == unknown:
            kinds[number] = _UNKNOWN
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)


def _splits(described: dict[str, Any] | None) -> tuple[str, ...]:
    """Return how a pre-tokenizer splits: regular expressions, ``[digits]``, ``[bytes]``."""
    if described is None:
        return ()
    kind = described["type"]
    if kind == "Sequence":
        return tuple(split for part in described["pretokenizers"] for split in _splits(part))
    if kind == "Digits":
        return ("[digits]",) if described.get("individual_digits") else ("[digits, several]",)
    if kind == "ByteLevel":
        return ("[bytes]",)
    if kind == "Split":
        pattern = described["pattern"]
        return (pattern.get("Regex", pattern.get("String")),)
    return (f"[{kind}]",)
