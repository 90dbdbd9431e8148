"""Linear layers of transformers that their model does not call, or changes while it runs: they are not quantized.

A quantized layer takes effect when it is called. Where a module multiplies by ``self.dt_proj.weight`` itself, the layer
would count as quantized and compute in full precision, and a packed one would fail. :func:`qatkernels.check` finds such
layers in any model by running it.
"""

from __future__ import annotations

from torch import nn

from .quant_linear import qualified_name

_DETR = (
    "conditional_detr.modeling_conditional_detr.ConditionalDetrMHAttentionMap",
    "detr.modeling_detr.DetrMHAttentionMap",
    "maskformer.modeling_maskformer.MaskFormerDetrMHAttentionMap",
)
_TDNN = (
    "data2vec.modeling_data2vec_audio",
    "unispeech_sat.modeling_unispeech_sat",
    "wav2vec2.modeling_wav2vec2",
    "wav2vec2_bert.modeling_wav2vec2_bert",
    "wav2vec2_conformer.modeling_wav2vec2_conformer",
    "wavlm.modeling_wavlm",
)
_LAYOUT = ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias")
#: Layers whose weight a module reads in its forward, by qualified name of its class without "transformers.models.".
READ: dict[str, tuple[str, ...]] = {
    "mamba.modeling_mamba.MambaMixer": ("dt_proj",),
    "falcon_mamba.modeling_falcon_mamba.FalconMambaMixer": ("dt_proj",),
    "jamba.modeling_jamba.JambaMambaMixer": ("dt_proj",),
    **dict.fromkeys(_DETR, ("k_proj",)),
    "dab_detr.modeling_dab_detr.DabDetrMHAttentionMap": ("k_linear",),
    **{f"{module}.TDNNLayer": ("kernel",) for module in _TDNN},
    "wavlm.modeling_wavlm.WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "deberta.modeling_deberta.DisentangledSelfAttention": ("in_proj",),
    "layoutlmv2.modeling_layoutlmv2.LayoutLMv2Encoder": _LAYOUT,
    "layoutlmv3.modeling_layoutlmv3.LayoutLMv3Encoder": _LAYOUT,
    "pp_doclayout_v2.modeling_pp_doclayout_v2.PPDocLayoutV2ReadingOrderEncoder": _LAYOUT,
    "mobilebert.modeling_mobilebert.MobileBertLMPredictionHead": ("decoder", "dense"),
    "neomme.modeling_neomme.NeoMMEForMaskedLM": ("unembedding_projection",),
    "reformer.modeling_reformer.LSHSelfAttention": ("query_key", "value"),
    "longcat_flash.modeling_longcat_flash.LongcatFlashTopkRouter": ("classifier",),
}
_RWKV = "transformers.models.rwkv.modeling_rwkv.RwkvModel"


def bypassed(model: nn.Module) -> dict[nn.Module, str]:
    """Return the layers of a model that quantization cannot reach, each with the reason."""
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        name = qualified_name(type(module))
        for layer in READ.get(name.removeprefix("transformers.models."), ()):
            if (child := module._modules.get(layer)) is not None:
                found[child] = f"is not called: {type(module).__name__} multiplies by its weight itself"
        if name == _RWKV:
            found |= dict.fromkeys(
                _rescaled(module), "is divided in place in eval mode: give the model rescale_every=0"
            )
    return found


def _rescaled(model: nn.Module) -> list[nn.Module]:
    """Return the layers whose weights RWKV divides in eval mode and multiplies in training mode.

    It does so in every block, if only by 1 in the first ones, unless the configuration has ``rescale_every=0``.
    """
    if not model.config.rescale_every:  # type: ignore[union-attr]
        return []
    blocks = model.get_submodule("blocks").children()
    return [block.get_submodule(name) for block in blocks for name in ("attention.output", "feed_forward.value")]
