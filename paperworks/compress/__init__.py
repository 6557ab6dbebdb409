"""Weight formats, and the layers that keep their weight in one. Works on any `torch.nn.Module`."""

from paperworks.compress.account import LayerReport, Report, report
from paperworks.compress.apply import apply, decompress
from paperworks.compress.aqlm import AQLM
from paperworks.compress.awq import AWQ
from paperworks.compress.calibration import Calibration
from paperworks.compress.effort import Effort, at_effort
from paperworks.compress.error import LayerError
from paperworks.compress.files import load, save
from paperworks.compress.format import WeightFormat
from paperworks.compress.fourbit import FP4, NF4, Int4
from paperworks.compress.fp8 import FP8
from paperworks.compress.ggml_format import GGML
from paperworks.compress.gptq import GPTQ
from paperworks.compress.kbit import KBit
from paperworks.compress.kmeans_vq import KMeansVQ
from paperworks.compress.linear import CompressedLinear
from paperworks.compress.llm_int8 import LLMInt8
from paperworks.compress.named import named
from paperworks.compress.pv_tuning import PVTuning, tunable
from paperworks.compress.quip import QuIP
from paperworks.compress.quip_sharp import QuIPSharp
from paperworks.compress.smoothquant import SmoothQuant
from paperworks.compress.sparse import Magnitude, Sparse, Wanda
from paperworks.compress.sparsegpt import SparseGPT
from paperworks.compress.statistics import Statistics
from paperworks.compress.ternary import Ternary
from paperworks.compress.tuning import tune_block
from paperworks.compress.uniform import Int8, Uniform

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
    "decompress",
    "load",
    "named",
    "report",
    "save",
    "tunable",
    "tune_block",
]
