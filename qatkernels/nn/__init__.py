"""Quantized layers: drop-in modules over the ops."""

from .._moved import moved
from ._check import CheckReport, LayerCheck, check
from ._gather_codes import gather_codes
from ._gather_model import gather_model
from ._load_weights import load_weights
from ._pack_model import PACKERS, compile_kernels, model_bytes, pack_model, packed_modules
from ._param_groups import param_groups, param_groups_from_rates, scales_at_floor
from ._quantize_model import quantize_model, quantized_modules, quantized_weights
from ._shard_scales import shard_scales
from ._to_plain import to_plain
from .activation import DynamicActivation, LearnedActivation
from .calibration import CalibrationReport, calibrate
from .config import QuantConfig
from .grouped_quant_linear import GroupedQuantLinear
from .packed_linear import GroupedPackedLinear, PackedEmbedding, PackedLinear
from .quant_conv1d import QuantConv1D
from .quant_embedding import QuantEmbedding
from .quant_linear import QuantLinear
from .report import QuantizationReport, ReportRow, quantization_report
from .scale_search import search_scale

__all__ = [
    "PACKERS",
    "CalibrationReport",
    "CheckReport",
    "DynamicActivation",
    "GroupedPackedLinear",
    "GroupedQuantLinear",
    "LayerCheck",
    "LearnedActivation",
    "PackedEmbedding",
    "PackedLinear",
    "QuantConfig",
    "QuantConv1D",
    "QuantEmbedding",
    "QuantLinear",
    "QuantizationReport",
    "ReportRow",
    "calibrate",
    "check",
    "compile_kernels",
    "gather_codes",
    "gather_model",
    "load_weights",
    "model_bytes",
    "pack_model",
    "packed_modules",
    "param_groups",
    "param_groups_from_rates",
    "quantization_report",
    "quantize_model",
    "quantized_modules",
    "quantized_weights",
    "scales_at_floor",
    "search_scale",
    "shard_scales",
    "to_plain",
]

__getattr__ = moved(
    __name__,
    dict.fromkeys(("load_packed", "save_packed"), "qatkernels.formats"),
    renamed={"warm_up": "compile_kernels"},
)
