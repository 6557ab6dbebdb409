"""Weight formats beside the peers: products from four bits, GPTQ of a layer, rounding a whole model."""

import copy
import importlib.util
import warnings
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

import paperworks as pw
from benchmarks.measure import Row, compare
from paperworks import compress
from paperworks.compress.calibration.statistics import Statistics
from paperworks.kernels.packed import pack

SHAPE = (1536, 576)  # SmolLM2's feed-forward
WIDE = (4096, 4096)
LAYER, SAMPLES = 1024, 4096
FORMATS = {
    "NF4": compress.NF4(),
    "Q4_K": compress.GGML(kind="Q4_K"),
    "4 bits, groups of 64": compress.Uniform(bits=4, group=64),
}


def products() -> Iterator[Row]:
    """One token in bfloat16: the plain weight is the peer; weights beyond any cache would flatter few bits more."""
    for shape in (SHAPE, WIDE):
        for name, form in FORMATS.items():
            shape = (shape[0], shape[1] if name != "Q4_K" or shape[1] % 256 == 0 else 768)
            weight = torch.randn(shape)
            packed = pack(form.grids(form.encode(weight), shape))
            plain, x = weight.bfloat16(), torch.randn(1, shape[1]).bfloat16()
            assert packed is not None
            times = max(1, 2_000_000_000 // (50 * weight.numel()))
            yield compare(
                f"product of one token, {name}, {shape[0]} x {shape[1]} (peer: bfloat16)",
                lambda packed=packed, x=x, times=times: [packed(x) for _ in range(times)],
                lambda plain=plain, x=x, times=times: [F.linear(x, plain) for _ in range(times)],
                bar=1.0,
            )


def gptq() -> Iterator[Row]:
    """4 bits in groups of 128 on the same second moment, from the inputs to the rounded weight."""
    if importlib.util.find_spec("gptqmodel") is None:
        return
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    torch.manual_seed(0)
    weight = torch.randn(LAYER, LAYER) / LAYER**0.5
    x = torch.randn(SAMPLES, LAYER) @ torch.randn(LAYER, LAYER) / LAYER**0.5
    form = compress.GPTQ(bits=4, group=128)
    losses = {}

    def loss(rounded: torch.Tensor) -> float:
        return float(((rounded.float() - weight) @ x.T).square().mean())

    def ours() -> None:
        statistics = Statistics.of(x, form.needs)
        losses["ours"] = form.decode(form.encode(weight, statistics), (LAYER, LAYER))

    def theirs() -> None:
        layer = nn.Linear(LAYER, LAYER, bias=False)
        layer.weight.data.copy_(weight)
        task = GPTQ(layer, QuantizeConfig(bits=4, group_size=128, desc_act=False, sym=False, act_group_aware=False))
        task.quantizer.configure(perchannel=True)
        task.add_batch(x[None], layer(x[None]))
        with torch.inference_mode():
            losses["theirs"] = task.quantize()[0].clone()

    row = compare("GPTQ of a 1024 x 1024 layer (peer: gptqmodel)", ours, theirs, bar=1.5, blocks=3)
    row.details = {"our_output_error": loss(losses["ours"]), "peer_output_error": loss(losses["theirs"])}
    yield row


def whole_model() -> Iterator[Row]:
    """Round SmolLM2's 210 linear layers to nearest: groups of 64 beside quanto's, NF4 beside bitsandbytes'."""
    import bitsandbytes.functional as bnb

    model = pw.load("smollm2")
    weights = [module.weight.detach() for module in model.blocks.modules() if isinstance(module, nn.Linear)]

    def each(form: compress.WeightFormat) -> None:
        for weight in weights:
            form.encode(weight)

    if importlib.util.find_spec("optimum") is not None:  # it builds an extension when imported: not among our oracles
        from optimum.quanto import MaxOptimizer, qint4, quantize_weight

        def quanto() -> None:
            for weight in weights:
                scale, shift = MaxOptimizer()(weight, qint4, 0, 64)
                quantize_weight(weight, qint4, 0, scale, shift, 64, optimized=False)

        row = compare(
            "rounding SmolLM2, 4 bits in groups of 64 (peer: quanto)",
            lambda: each(compress.Uniform(bits=4, group=64)),
            quanto,
            bar=1.0,
            blocks=3,
        )
        row.details = {"ours_seconds": min(row.ours)}
        yield row
    row = compare(
        "rounding SmolLM2, NF4 (peer: bitsandbytes)",
        lambda: each(compress.NF4()),
        lambda: [bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4") for weight in weights],
        bar=1.0,
        blocks=3,
    )
    row.details = {"ours_seconds": min(row.ours)}
    yield row
    for name, form in (("int8 a row", compress.Int8()), ("FP8", compress.FP8()), ("Q8_0", compress.GGML(kind="Q8_0"))):
        row = compare(f"rounding SmolLM2, {name} (peer: ours to NF4)", lambda form=form: each(form),
                      lambda: each(compress.NF4()), bar=0.5, blocks=2)  # fmt: skip
        row.details = {"ours_seconds": min(row.ours)}
        yield row


def whole_decode() -> Iterator[Row]:
    """Tokens of SmolLM2 in bfloat16: four bits beside the plain weights, both in our decoding."""
    model = pw.load("smollm2").bfloat16()
    prompt = torch.randint(1000, (1, 16))

    def run(net: nn.Module) -> None:
        pw.generate(net, prompt, max_new_tokens=48, temperature=0.0, stop_tokens=[])

    for name, form in (("NF4", compress.NF4()), ("4 bits, groups of 64", compress.Uniform(bits=4, group=64))):
        packed = compress.apply(copy.deepcopy(model), form)
        yield compare(
            f"decoding SmolLM2 in {name} (peer: bfloat16)",
            lambda packed=packed: run(packed),
            lambda: run(model),
            bar=1.0,
            blocks=3,
        )


def run() -> Iterator[Row]:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield from products()
        yield from whole_decode()
        yield from whole_model()
    yield from gptq()
