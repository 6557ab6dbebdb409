"""Weight formats, and the layers that keep their weight in one. Works on any `torch.nn.Module`."""

from paperworks.compress.account import LayerReport, Report, coverage, report
from paperworks.compress.apply import apply, decompress
from paperworks.compress.calibration.calibration import Calibration
from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.calibration.tuning import tune_block
from paperworks.compress.error import LayerError
from paperworks.compress.files import load, save
from paperworks.compress.format import WeightFormat
from paperworks.compress.formats.aqlm import AQLM
from paperworks.compress.formats.awq import AWQ
from paperworks.compress.formats.fourbit import FP4, NF4, Int4
from paperworks.compress.formats.fp8 import FP8
from paperworks.compress.formats.gptq import GPTQ
from paperworks.compress.formats.kbit import KBit
from paperworks.compress.formats.kmeans_vq import KMeansVQ
from paperworks.compress.formats.llm_int8 import LLMInt8
from paperworks.compress.formats.pv_tuning import PVTuning, tunable
from paperworks.compress.formats.quip import QuIP
from paperworks.compress.formats.quip_sharp import QuIPSharp
from paperworks.compress.formats.smoothquant import SmoothQuant
from paperworks.compress.formats.ternary import Ternary
from paperworks.compress.formats.uniform import Int8, Uniform
from paperworks.compress.ggml.format import GGML
from paperworks.compress.linear import CompressedLinear
from paperworks.compress.named import named
from paperworks.compress.pruning.effort import Effort, at_effort
from paperworks.compress.pruning.sparse import Magnitude, Sparse, Wanda
from paperworks.compress.pruning.sparsegpt import SparseGPT

__all__ = [
    "AQLM",
    "AWQ",
    "FP4",
    "FP8",
    "GGML",
    "GPTQ",
    "NF4",
    "Calibration",
    "CompressedLinear",
    "Effort",
    "Int4",
    "Int8",
    "KBit",
    "KMeansVQ",
    "LLMInt8",
    "LayerError",
    "LayerReport",
    "Magnitude",
    "PVTuning",
    "QuIP",
    "QuIPSharp",
    "Report",
    "SmoothQuant",
    "Sparse",
    "SparseGPT",
    "Statistics",
    "Ternary",
    "Uniform",
    "Wanda",
    "WeightFormat",
    "apply",
    "at_effort",
    "coverage",
    "decompress",
    "load",
    "named",
    "report",
    "save",
    "tunable",
    "tune_block",
]
