"""Reads a compressed-tensors checkpoint as a model to train: GPTQ, AWQ or other results of llm-compressor.

Its integers and scales become the starting point of training, bit for bit: each master weight is the value of its
integer, and each scale is the one in the file. `compressed_tensors.py` has the layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..extras import missing
from ..files import CheckpointError, open_tensors, read_json
from ..grids import MIN_SCALE
from ..nn import QuantConfig, quantized_modules
from ..nn._follow_recipe import follow
from .integers import UnfitError

#: The tensors of a quantized layer in the format ``pack-quantized``.
PACKED, SCALE, SHAPE, ZERO, ORDER = (
    "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx",
)  # fmt: skip


@torch.no_grad()
def load_compressed_tensors(folder: str | Path) -> nn.Module:
    """Return the model of a compressed-tensors checkpoint, quantized to what the file holds, ready to train.

        model = load_compressed_tensors("SmolLM2-135M-Instruct-W4A16-G128")
        optimizer = torch.optim.AdamW(param_groups(model, lr=1e-5))

    Symmetric layers get scheme ``"lsq"``, those with zero points ``"affine"``; both quantize to the values of the file
    exactly, in float32.

    Args:
        folder: a folder of transformers whose ``config.json`` has a quantization of compressed-tensors, format
            ``pack-quantized``, weights of 2 to 8 bits, no quantized activations.

    Returns:
        A model of transformers in eval mode, on the CPU, with float32 weights.

    Raises:
        UnfitError: if the checkpoint holds something that this library does not, such as quantized activations or
            groups in another order (``actorder="group"`` of GPTQ).
        CheckpointError: if the folder cannot be read, or is not of this format.
        MissingExtraError: if transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise missing("reading a compressed-tensors checkpoint", "hf", error) from error
    folder = Path(folder)
    described = read_json(folder / "config.json")
    settings = described.get("quantization_config") or described.get("compression_config") or {}
    if settings.get("quant_method") != "compressed-tensors":
        raise CheckpointError(
            f"{folder} has the quantization {settings.get('quant_method')!r}, must be 'compressed-tensors'"
        )
    if (settings.get("transform_config") or {}).get("config_groups"):
        raise UnfitError(f"{folder} has a transform_config (rotations of weights and activations), which is not read")
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open_tensors(file) as content:
            tensors |= {name: content.get_tensor(name).clone() for name in content.keys()}  # noqa: SIM118
    names = [name.removesuffix(f".{PACKED}") for name in tensors if name.endswith(f".{PACKED}")]
    if not names:
        raise CheckpointError(
            f"{folder} has no {PACKED}, its format is {settings.get('format')!r}, must be 'pack-quantized'"
        )
    architecture = (described.get("architectures") or ["none"])[0]
    if not hasattr(transformers, architecture):
        raise CheckpointError(f"{folder} is a model of class {architecture!r}, which transformers does not have")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    config.__dict__.pop("quantization_config", None)
    config.dtype = torch.float32
    model: Any = getattr(transformers, architecture)(config).eval()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if shared := [name for name in names if f"{name}.weight" in tied]:
        raise CheckpointError(
            f"{folder} quantizes {shared[0]}, which its config.json ties to the embedding: set tie_word_embeddings "
            "to false there if the layer has weights of its own"
        )
    layers = {name: _Layer.of(name, tensors, model, settings) for name in names}
    follow(model, [{"config": layer.config.to_dict(), "packed": None, "layers": [n]} for n, layer in layers.items()])
    state = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    for name, layer in layers.items():
        layer.move(state, name, quantized_modules(model)[name])
    absent, left_over = model.load_state_dict(state, strict=False)
    if absent := sorted(name for name in absent if name not in tied and not name.endswith("._extra_state")):
        raise CheckpointError(f"{folder} has no {absent[0]} ({len(absent)} tensors are missing)")
    if left_over:
        raise CheckpointError(f"{folder} has {left_over[0]}, which {architecture} does not ({len(left_over)} tensors)")
    model.tie_weights()
    loaded: nn.Module = model
    return loaded


class _Layer:
    """One quantized layer of a checkpoint.

    Attributes:
        config: what it is quantized to.
        weight: the value of each integer, float32 ``[N, K]``.
        scale: float32 ``[N, G]``.
        zero_point: the same shape, or None.
    """

    def __init__(self, config: QuantConfig, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> None:
        self.config, self.scale, self.zero_point = config, scale, zero_point
        grouped = codes.float().reshape(*scale.shape, -1) if scale.numel() > 1 else codes.float()[None]
        shifted = grouped if zero_point is None else grouped - zero_point[..., None]
        self.weight = (shifted * scale[..., None]).reshape(codes.shape)

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, Tensor], model: nn.Module, settings: Mapping[str, Any]) -> _Layer:
        """Read a layer.

        Raises:
            UnfitError: if it holds something that this library does not.
            CheckpointError: if its tensors do not fit each other.
        """
        arguments = _arguments(name, model, settings)
        bits: Any = arguments.get("num_bits")
        symmetric = arguments.get("symmetric", True)
        if arguments.get("type", "int") != "int" or bits not in range(2, 9):
            raise UnfitError(f"{name} has {bits}-bit {arguments.get('type')} weights, must be integers of 2 to 8 bits")
        packed, scale = tensors[f"{name}.{PACKED}"], tensors.get(f"{name}.{SCALE}")
        if scale is None or (shape := tensors.get(f"{name}.{SHAPE}")) is None:
            raise CheckpointError(f"{name} has {PACKED} without {SCALE} or {SHAPE}")
        rows, cols = (int(size) for size in shape)
        if (order := tensors.get(f"{name}.{ORDER}")) is not None:
            plain = torch.arange(cols) // (cols // scale.shape[-1])
            if bool((order >= 0).all()) and not torch.equal(order.long(), plain):
                raise UnfitError(
                    f"{name} has its inputs in another order ({ORDER}): quantize with actorder 'weight' or None"
                )
        if packed.dtype != torch.int32 or tuple(packed.shape) != (rows, -(-cols * bits // 32)):
            raise CheckpointError(
                f"{name}.{PACKED} is {packed.dtype} of shape {tuple(packed.shape)}, must be torch.int32 of shape "
                f"{(rows, -(-cols * bits // 32))} for {bits} bits: compressed-tensors before 0.18 padded 3, 5, 6 and 7 "
                "bits, and such files are not read"
            )
        group = None if scale.numel() <= rows else cols // scale.shape[-1]
        scheme = "lsq" if symmetric else "affine"
        # Its zero points are integers, so training keeps them so, and the model can be exported again.
        zeros = "float" if symmetric else "int"
        config = QuantConfig(bits, scheme, group, per_tensor=scale.numel() == 1, zero_point_domain=zeros)
        codes = _unpacked(packed, cols, bits) - (1 << bits - 1 if symmetric else 0)
        scale = scale.float().reshape(1, 1) if scale.numel() == 1 else scale.float().reshape(rows, -1)
        zero_point, stored = None, tensors.get(f"{name}.{ZERO}")
        if symmetric and stored is not None and bool(stored.any()):
            raise CheckpointError(f"{name} has {ZERO}, and its group of config_groups says that it is symmetric")
        if not symmetric:
            if stored is None:
                raise CheckpointError(f"{name} has no {ZERO}, and its group of config_groups is not symmetric")
            zero_point = _unpacked(stored.T.contiguous(), rows, bits).T.float().reshape(scale.shape)
        layer = cls(config, codes, scale, zero_point)
        too_small = (scale < MIN_SCALE).reshape(-1)
        if bool((layer.weight.reshape(len(too_small), -1)[too_small] != 0).any()):
            raise UnfitError(f"{name} has scales below {MIN_SCALE}, the smallest that this library computes with")
        return layer

    def move(self, state: dict[str, Tensor], name: str, module: Any) -> None:
        """Put the layer's tensors into a state dict, in place of those of the checkpoint."""
        for part in (PACKED, SCALE, SHAPE, ZERO, ORDER):
            state.pop(f"{name}.{part}", None)
        state[f"{name}.weight"] = self.weight
        state[f"{name}.scale"] = self.scale.reshape(module.scale.shape)
        if self.zero_point is not None:
            state[f"{name}.zero_point"] = self.zero_point.reshape(module.scale.shape)


def _unpacked(words: Tensor, cols: int, bits: int) -> Tensor:
    """Return unsigned integers ``[N, cols]`` from int32 words, each row one string of bits."""
    codes: Tensor = torch.ops.qatkernels.unpack(
        words.contiguous().view(torch.uint8)[:, : -(-cols * bits // 8)], 0, bits, cols
    )
    return codes.to(torch.int32)


def _arguments(name: str, model: nn.Module, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the configuration says of the weights of a layer.

    Of several groups with a target that fits, compressed-tensors takes the one that says the name, then one with a
    pattern of it, then one with its class.

    Raises:
        UnfitError: if no group names it, or the group quantizes activations.
    """
    modules = dict(model.named_modules())
    if not isinstance(modules.get(name), nn.Linear):
        found = type(modules[name]).__name__ if name in modules else "nothing"
        raise UnfitError(f"{name} is quantized, and the model has {found} of that name, must be nn.Linear")
    classes = {cls.__name__ for cls in type(modules[name]).__mro__}
    fitting: list[tuple[int, Mapping[str, Any]]] = []
    for group in settings.get("config_groups", {}).values():
        for target in group.get("targets", ()):
            if target == name:
                fitting.append((0, group))
            elif target.startswith("re:") and re.match(target.removeprefix("re:"), name):
                fitting.append((1, group))
            elif target in classes:
                fitting.append((2, group))
    if not fitting:
        raise UnfitError(f"{name} is quantized, and no group of config_groups names it")
    group = min(fitting, key=lambda found: found[0])[1]
    if group.get("input_activations"):
        raise UnfitError(
            f"{name} quantizes its input ({group['input_activations'].get('num_bits')} bits) as compressed-tensors "
            "does, which divides by 127.5 where this library divides by 127: load a checkpoint with weights alone "
            "(W4A16)"
        )
    if outputs := group.get("output_activations"):
        raise UnfitError(
            f"{name} quantizes its output ({outputs.get('num_bits')} bits), which is not read: load a checkpoint with "
            "weights alone (W4A16)"
        )
    weights: Mapping[str, Any] = group.get("weights") or {}
    return weights
