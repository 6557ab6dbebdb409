"""GGUF: a model in one file, its matrices in ggml's blocks of 32 or 256 values."""

from __future__ import annotations

import copy
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from paperworks import api, checkpoints
from paperworks.checkpoints.gguf import reader as gguf
from paperworks.checkpoints.gguf.model import export_tensors
from paperworks.compress.ggml import blocks as ggml
from paperworks.core.linear import weight_of
from paperworks.lab import AtMost, Beats, Lab, Paper, Verdict
from paperworks.models import DecoderModel
from paperworks.papers.quantization._rounded_model import bench

paper = Paper(
    key="gguf",
    title="GGUF and ggml's block formats",
    authors="Gerganov and the ggml authors",
    year=2023,
    ref="GitHub ggml-org/ggml: docs/gguf.md, src/ggml-common.h, src/ggml-quants.c",
    family="quantization",
    summary=(
        "A language model with its vocabulary and hyperparameters in one file that is mapped into memory and needs no "
        "other; matrices are stored in short blocks of small integers with a scale each, 2.6 to 8.5 bits a weight."
    ),
    implements=(
        "paperworks.checkpoints.gguf.reader.read",
        "paperworks.checkpoints.gguf.writer.write",
        "paperworks.compress.ggml.blocks.encode",
        "paperworks.compress.ggml.blocks.decode",
        "paperworks.compress.ggml.format.GGML",
    ),
    equation=r"\mathrm{Q8\_0}: \ \hat w = d_b \, q, \quad d_b = \max |w| / 127, \ q \in \{-127, \dots, 127\}, "
    r"\quad 8 + \tfrac{16}{32} = 8.5 \text{ bits}",
    usage="""
from dataclasses import replace

import paperworks as pw

model = pw.build(replace(pw.preset("smollm2-135m"), depth=2, vocab_size=512))
pw.export(model, "small.gguf", layout="gguf", kind="Q8_0")
again = pw.load("small.gguf")
kept = pw.load("small.gguf", keep_quantized=True)  # the linear layers stay in the file's own blocks
print("parameters:", sum(p.numel() for p in again.parameters()))
print(kept.blocks[0].mixer.query)
""",
    notes="Written are F32, F16, BF16, Q4_0 to Q8_0 and the k-quants; the imatrix formats are read, not written.",
)

SIZES = {  # bytes of a block, and its values
    "Q4_0": (18, 32),
    "Q4_1": (20, 32),
    "Q5_0": (22, 32),
    "Q5_1": (24, 32),
    "Q8_0": (34, 32),
    "Q2_K": (84, 256),
    "Q3_K": (110, 256),
    "Q4_K": (144, 256),
    "Q5_K": (176, 256),
    "Q6_K": (210, 256),
}
# Mean squared error on normal numbers, measured once with the reference quantizers in ggml's C code.
KNOWN_ERRORS = {
    "Q8_0": 2.88e-5,
    "Q4_0": 7.43e-3,
    "Q4_1": 6.14e-3,
    "Q5_0": 1.84e-3,
    "Q5_1": 1.44e-3,
    "Q2_K": 0.0883,
    "Q3_K": 0.0228,
    "Q4_K": 5.10e-3,
    "Q5_K": 1.31e-3,
    "Q6_K": 3.15e-4,
}


@contextmanager
def _exported(model: DecoderModel, kind: str) -> Iterator[Path]:
    """Write a model as GGUF; the file lasts as long as the context."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model.{kind}.gguf"
        api.export(model, path, layout="gguf", kind=kind)
        yield path


@torch.inference_mode()
def _rounded_in_memory(model: DecoderModel, kind: str) -> DecoderModel:
    """The model with every matrix rounded to `kind`'s blocks, no file and no permutation of rows involved."""
    rounded = api.build(model.spec).to(model.device).eval()
    state = {
        name: ggml.decode(ggml.encode(value, kind), kind) if value.dim() == 2 else value
        for name, value in model.state_dict().items()
    }
    rounded.load_state_dict(state)
    return rounded


@paper.claim(
    "SmolLM2 written as Q8_0 reads back as the same model, and loses almost nothing",
    paper="ggml: Q8_0 takes 8.5 bits a weight and is all but lossless; Q4_0 takes 4.5",
    control="Q4_0, the same file with four-bit blocks, which has to lose more",
    reach="real",
)
def eight_bits_lose_almost_nothing(lab: Lab) -> Verdict:
    """Export, read back, compare with the same rounding done in memory, and score on text."""
    bed = bench(lab)
    model = copy.copy(bed.model)
    model.tokenizer = bed.tokenizer

    @cache
    def written(kind: str) -> tuple[DecoderModel, dict[str, float]]:
        with _exported(model, kind) as path:
            again, bits = api.load(path, device=lab.device), _bits(path)
        apart = _largest_difference(again, _rounded_in_memory(model, kind), bed.texts(0)[:1, :16])
        return again, {"bits a weight": bits, "largest difference": apart, "other ids": 1 - _same_ids(model, again)}

    def arm(kind: str) -> Callable[[int], dict[str, float]]:
        def read(seed: int) -> dict[str, float]:
            again, facts = written(kind)
            return bed.numbers(again, seed) | facts

        return read

    verdict = lab.compare(
        arms={kind: arm(kind) for kind in ("Q8_0", "Q4_0")},
        main=Beats("Q8_0", "Q4_0", on="nats lost", by=0.05, lower=True),
        also=[
            AtMost("Q8_0", 0.005, on="nats lost"),
            # The very same float32 weights go through the same kernels; 1e-5 leaves room for another order.
            *(AtMost(kind, 1e-5, on="largest difference") for kind in ("Q8_0", "Q4_0")),
            AtMost("Q8_0", 0, on="other ids"),
        ],
        seeds=3,
        note=f"{bed.words.rpartition(';')[0]}. All matrices are rounded, the embedding too. The largest difference is "
        "that of the logits to the same rounding done in memory, without a file. The weights at hand were rounded to "
        "Q4_1 before (embeddings to Q8_0), which is what they are compared with.",
    )
    lab.points("nats lost", title="What SmolLM2 loses when all of its matrices are rounded, nats a token")
    return verdict


def _bits(path: Path) -> float:
    """The bits a value that the file's matrices take."""
    matrices = [tensor for tensor in gguf.read(path).tensors.values() if len(tensor.shape) == 2]
    return 8 * sum(x.nbytes for x in matrices) / sum(x.shape[0] * x.shape[1] for x in matrices)


def _same_ids(model: DecoderModel, again: DecoderModel) -> bool:
    text = "Numbers like 1234, don't and naïve café;\n\tand   spaces <|im_start|>user"
    return bool(model.tokenizer.encode(text) == again.tokenizer.encode(text))


@torch.inference_mode()
def _largest_difference(one: DecoderModel, other: DecoderModel, tokens: Int[Tensor, "batch time"]) -> float:
    return (one(tokens) - other(tokens)).abs().max().item()


@paper.claim(
    "Rows of query and key are reordered for llama.cpp's rotary embedding, and back",
    paper="llama.cpp's converter: for architecture llama, rows of W_q and W_k are permuted from halves to interleaved "
    "pairs of dimensions",
    kind="exact",
)
def rotary_rows_are_reordered(lab: Lab) -> Verdict:
    """Compare the exported rows with the order written out by hand, and read a file as if they were not reordered."""
    spec = api.preset("smollm2-135m")
    torch.manual_seed(lab.seed)
    model = api.build(replace(spec, depth=2, vocab_size=512))
    exported = {name: tensor for name, tensor, _ in export_tensors(model, "F32", "F32")}
    heads = {"q": (9, "query"), "k": (3, "key")}
    wrong = 0
    for letter, (count, ours) in heads.items():
        weight = weight_of(model.get_submodule(f"blocks.1.mixer.{ours}"))
        # Row 2 j + s of a head is row j + 32 s here: dimension j of each half, one after the other.
        order = [64 * head + j + 32 * s for head in range(count) for j in range(32) for s in range(2)]
        wrong += int((exported[f"blk.1.attn_{letter}.weight"] != weight[order]).sum())
    tokens = torch.randint(model.spec.vocab_size, (1, 24), generator=lab.generator(lab.seed))
    with _exported(model, "F32") as path:
        restored = checkpoints.load(path)
        file = gguf.read(path)
        apart = _largest_difference(model.eval(), restored, tokens)
        for letter, (_, ours) in heads.items():
            for layer in range(model.spec.depth):
                raw = file.tensors[f"blk.{layer}.attn_{letter}.weight"].load()
                restored.get_submodule(f"blocks.{layer}.mixer.{ours}").weight.data = raw
        skipped = _largest_difference(model, restored, tokens)
    return lab.judge(
        checks={
            "the exported rows are in the published order": wrong == 0,
            "a model read back gives the same logits, bit for bit": apart == 0.0,
            "without putting the rows back it does not": skipped > 1e-3,
        },
        measured={
            "numbers out of place": wrong,
            "largest difference of logits": apart,
            "the same, rows not put back": skipped,
        },
    )


@paper.claim(
    "Blocks take the bytes of the specification, and have the error of the reference quantizers on normal numbers",
    paper="ggml-common.h: 34, 18, 20, 22 and 24 bytes for 32 values; 84, 110, 144, 176 and 210 for 256; "
    "ggml-quants.c, quantize_row_*_ref: the reference quantizers, whose error was measured on normal numbers",
    kind="exact",
)
def sizes_and_errors_of_blocks(lab: Lab) -> Verdict:
    """Count the bytes that our writers make, and measure the mean squared error of every type they write."""
    draws = lab.generator(lab.seed)
    written = {kind: ggml.encode(torch.randn(2, n, generator=draws), kind).shape[-1] for kind, (_, n) in SIZES.items()}
    x = torch.randn(lab.pick(smoke=128, small=1024), 1024, generator=draws)
    errors = {
        kind: (ggml.decode(ggml.encode(x, kind), kind).double() - x.double()).square().mean().item()
        for kind in ggml.WRITABLE
    }
    close = lab.pick(smoke=0.05, small=0.01)
    lab.table(
        "Block formats: mean squared error on numbers from N(0, 1)",
        ["type", "bits a value", "measured", "reference"],
        [
            [kind, ggml.BLOCKS[kind].bits_per_value, error, KNOWN_ERRORS.get(kind, "-")]
            for kind, error in sorted(errors.items(), key=lambda item: item[1])
        ],
    )
    by_size = ["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]
    k_quants = ["Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"]
    return lab.judge(
        checks={
            "the table has the published sizes": all(
                (ggml.BLOCKS[kind].bytes, ggml.BLOCKS[kind].values) == sizes for kind, sizes in SIZES.items()
            ),
            "what is written has them": all(size == SIZES[kind][0] for kind, size in written.items()),
            "every error is that of the reference, to 1%": all(
                abs(errors[kind] / known - 1) < close for kind, known in KNOWN_ERRORS.items()
            ),
            "more bits, less error": all(
                [errors[kind] for kind in kinds] == sorted(errors[kind] for kind in kinds)
                for kinds in (by_size, k_quants)
            ),
            "at the same 4.5 bits, Q4_K less than Q4_0": errors["Q4_K"] < errors["Q4_0"],
            "F32 loses nothing": errors["F32"] == 0.0,
            # Relative rounding errors are even within 2^-11 and 2^-8, so the mean square of x is 3 times the bound's.
            "F16 and BF16 within half a unit of their last place": (
                errors["F16"] < 2**-22 / 3 * 1.1 and errors["BF16"] < 2**-16 / 3 * 1.1
            ),
        },
        measured={f"mean squared error, {kind}": error for kind, error in errors.items()},
    )


@paper.claim(
    "What is written reads back byte for byte, at aligned offsets, with dimensions in the file's order",
    paper="docs/gguf.md: magic GGUF, version 3, typed key-value pairs, tensor offsets that are multiples of the "
    "alignment of 32, dimensions with the fastest first",
    kind="exact",
)
def file_round_trip(lab: Lab) -> Verdict:
    """Write one tensor of every type and metadata of every kind, read them, and write what was read again."""
    draws = lab.generator(lab.seed)
    tensors = {f"blk.0.{kind}": (torch.randn(5, 256, generator=draws), kind) for kind in ggml.WRITABLE}
    metadata: dict[str, object] = {
        "general.architecture": "llama",
        "llama.block_count": 30,
        "a.negative": -7,
        "a.wide": 1 << 40,
        "a.fraction": 0.5,
        "a.flag": True,
        "a.words": ["Ġthe", "é", ""],
        "a.numbers": [3, 1, -1],
    }
    with tempfile.TemporaryDirectory() as folder:
        first, second, third = (Path(folder) / f"{name}.gguf" for name in ("first", "second", "third"))
        gguf.write(first, metadata, [(name, tensor, kind) for name, (tensor, kind) in tensors.items()])
        read = gguf.read(first)
        wrong = sum(
            not torch.equal(read.tensors[name].raw(), ggml.encode(tensor, kind)) or read.tensors[name].shape != (5, 256)
            for name, (tensor, kind) in tensors.items()
        )
        # k-quants search for their scales, so rounding what was rounded may find others
        plain = {name: tensor for name, tensor in read.tensors.items() if not tensor.type.endswith("_K")}
        gguf.write(second, metadata, [(name, *tensors[name]) for name in plain])
        gguf.write(third, read.metadata, [(name, tensor.load(), tensor.type) for name, tensor in plain.items()])
        content = first.read_bytes()
        same = second.read_bytes() == third.read_bytes()
        offsets, shape = _offsets_and_shape(content, "blk.0.Q8_0", list(tensors))
    return lab.judge(
        checks={
            "every tensor's bytes are those that were encoded": wrong == 0,
            "the metadata are the same values": read.metadata == metadata,
            "what was read, written again, is the same file (all types but k-quants)": same,
            "it begins with GGUF, version 3": content[:8] == b"GGUF" + struct.pack("<I", 3),
            "every offset is a multiple of 32": all(offset % 32 == 0 for offset in offsets),
            "the dimensions stand with the fastest first": shape == (256, 5),
        },
        measured={
            "tensors that differ": wrong,
            "tensors": len(tensors),
            "metadata entries": len(metadata),
            "bytes of the file": len(content),
        },
        note="Rounding a rounded block again gives the same bytes here, which is why the second file can be equal.",
    )


def _offsets_and_shape(content: bytes, name: str, names: list[str]) -> tuple[list[int], tuple[int, int]]:
    """Read tensor descriptions straight from the bytes: name, number of dimensions, dimensions, type, offset."""
    offsets, shape = [], (0, 0)
    for known in names:
        entry = struct.pack("<Q", len(known)) + known.encode()
        at = content.index(entry) + len(entry)
        count, columns, rows, _, offset = struct.unpack_from("<IQQIQ", content, at)
        assert count == 2, f"{known} has {count} dimensions"
        offsets.append(offset)
        shape = (columns, rows) if known == name else shape
    return offsets, shape
