"""Weight formats, and the layers that keep their weight in one. Works on any `torch.nn.Module`."""

from paperworks.compress.apply import LayerReport, Report, apply, decompress, report
from paperworks.compress.format import WeightFormat
from paperworks.compress.fourbit import FP4, NF4, Int4
from paperworks.compress.ggml_format import GGML
from paperworks.compress.linear import CompressedLinear

__all__ = [
    "FP4",
    "GGML",
    "NF4",
    "CompressedLinear",
    "Int4",
    "LayerReport",
    "Report",
    "WeightFormat",
    "apply",
    "decompress",
    "report",
]
