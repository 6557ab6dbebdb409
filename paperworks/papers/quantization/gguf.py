"""GGUF: a model in one file, its matrices in ggml's blocks of 32 or 256 values."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from paperworks import api, checkpoints, train
from paperworks.checkpoints.gguf import reader as gguf
from paperworks.checkpoints.gguf.model import export_tensors
from paperworks.compress.ggml import blocks as ggml
from paperworks.core.linear import weight_of
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, INK
from paperworks.models import DecoderModel
from paperworks.testbeds.scored_text import scored_text
from paperworks.testbeds.smollm2 import smollm2

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
    """Return the model with every matrix rounded to `kind`'s blocks, no file and no permutation of rows involved."""
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
)
def eight_bits_lose_almost_nothing(lab: Lab) -> Verdict:
    """Export, read back, compare with the same rounding done in memory, and score on text."""
    model = smollm2(lab)
    text = scored_text(model.tokenizer, lab.pick(smoke=32, small=3072, large=65_536))
    tokens = text.tokens.to(lab.device)
    context = lab.pick(smoke=32, small=513)
    perplexity = {"as loaded": train.perplexity(model, tokens, context)}
    apart: dict[str, float] = {}
    size: dict[str, int] = {}
    bits: dict[str, float] = {}
    same_ids = True
    for kind in lab.track(("Q8_0", "Q4_0"), "files"):
        with _exported(model, kind) as path:
            size[kind], bits[kind] = path.stat().st_size, _bits(path)
            again = api.load(path, device=lab.device)
        same_ids = same_ids and _same_ids(model, again)
        apart[kind] = _largest_difference(again, _rounded_in_memory(model, kind), tokens[None, :32])
        perplexity[kind] = train.perplexity(again, tokens, context)
    rise = {kind: perplexity[kind] / perplexity["as loaded"] - 1 for kind in size}
    _draw_sizes(lab, rise, bits)
    return lab.judge(
        checks={
            "perplexity rises by less than 0.5% with Q8_0": rise["Q8_0"] < 0.005,
            "and by more with Q4_0": rise["Q4_0"] > max(rise["Q8_0"], 0.005),
            # The very same float32 weights go through the same kernels; the bar of 1e-5 leaves room for another order.
            "the logits are those of the weights rounded in memory, to 1e-5": max(apart.values()) <= 1e-5,
            "the tokenizer in the file gives the same ids": same_ids,
        },
        measured={
            "perplexity, as loaded": perplexity["as loaded"],
            "perplexity, Q8_0": perplexity["Q8_0"],
            "rise, Q8_0": rise["Q8_0"],
            "bits a weight, Q8_0": bits["Q8_0"],
            "bytes of the file, Q8_0": size["Q8_0"],
            "largest difference of logits": max(apart.values()),
        },
        control={
            "perplexity, Q4_0": perplexity["Q4_0"],
            "rise, Q4_0": rise["Q4_0"],
            "bits a weight, Q4_0": bits["Q4_0"],
            "bytes of the file, Q4_0": size["Q4_0"],
        },
        note=f"{text.words}; windows of 512. The weights at hand "
        "were rounded to Q4_1 before (embeddings to Q8_0), which is what they are compared with.",
    )


def _bits(path: Path) -> float:
    """Return the bits a value that the file's matrices take."""
    matrices = [tensor for tensor in gguf.read(path).tensors.values() if len(tensor.shape) == 2]
    return 8 * sum(x.nbytes for x in matrices) / sum(x.shape[0] * x.shape[1] for x in matrices)


def _same_ids(model: DecoderModel, again: DecoderModel) -> bool:
    text = "Numbers like 1234, don't and naïve café;\n\tand   spaces <|im_start|>user"
    return bool(model.tokenizer.encode(text) == again.tokenizer.encode(text))


@torch.inference_mode()
def _largest_difference(one: DecoderModel, other: DecoderModel, tokens: Int[Tensor, "batch time"]) -> float:
    return (one(tokens) - other(tokens)).abs().max().item()


def _draw_sizes(lab: Lab, rise: dict[str, float], bits: dict[str, float]) -> None:
    with lab.figure("perplexity", figsize=(7.2, 2.1)) as figure:
        axes = figure.subplots()
        names = ["Q4_0", "Q8_0"]
        bars = axes.barh(
            [f"{name}\n{bits[name]:.2f} bits" for name in names],
            [rise[name] for name in names],
            color=[CONTROL, COLORS[0]],
            height=0.6,
        )
        axes.bar_label(bars, [f"{rise[name]:+.2%}" for name in names], padding=5, color=INK)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.margins(x=0.14)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_title("How much SmolLM2's perplexity rises when all its matrices are rounded")


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
    tokens = torch.randint(model.spec.vocab_size, (1, 24), generator=torch.Generator().manual_seed(lab.seed))
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
    "A block takes the bytes of the specification",
    paper="ggml-common.h: 34, 18, 20, 22 and 24 bytes for 32 values; 84, 110, 144, 176 and 210 for 256",
    kind="exact",
)
def block_sizes(lab: Lab) -> Verdict:
    """Compare the table of formats, and the bytes that our writers make."""
    draws = torch.Generator().manual_seed(lab.seed)
    written = {
        kind: ggml.encode(torch.randn(2, values, generator=draws), kind).shape[-1]
        for kind, (_, values) in SIZES.items()
    }
    lab.table(
        "Block formats",
        ["type", "values", "bytes", "bits a value"],
        [[kind, values, size, 8 * size / values] for kind, (size, values) in SIZES.items()],
    )
    return lab.judge(
        checks={
            "the table has the published sizes": all(
                (ggml.BLOCKS[kind].bytes, ggml.BLOCKS[kind].values) == sizes for kind, sizes in SIZES.items()
            ),
            "what is written has them": all(size == SIZES[kind][0] for kind, size in written.items()),
            "8.5 and 4.5 bits for Q8_0 and Q4_0": [ggml.BLOCKS[k].bits_per_value for k in ("Q8_0", "Q4_0")]
            == [8.5, 4.5],
        },
        measured={f"bytes of {kind}": size for kind, size in written.items()},
    )


@paper.claim(
    "On normal numbers the blocks have the error of the reference quantizers",
    paper="ggml-quants.c, quantize_row_*_ref: the reference quantizers, whose error was measured on normal numbers",
    kind="exact",
)
def errors_of_the_blocks(lab: Lab) -> Verdict:
    """Measure the mean squared error of every type that is written here, and the rounding of plain types."""
    x = torch.randn(lab.pick(smoke=128, small=1024), 1024, generator=torch.Generator().manual_seed(lab.seed))
    errors = {}
    for kind in ggml.WRITABLE:
        errors[kind] = (ggml.decode(ggml.encode(x, kind), kind).double() - x.double()).square().mean().item()
    close = lab.pick(smoke=0.05, small=0.01)
    lab.table(
        "Mean squared error on numbers from N(0, 1)",
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
    draws = torch.Generator().manual_seed(lab.seed)
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
