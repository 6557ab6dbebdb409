"""Cost against length: a mixer's forward and backward pass, attention's and the recurrent family's, in one run.

The figure, results/cost-against-length.svg, shows where the lines cross on the machine that ran it.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.measure import Row
from paperworks.lab.figures import COLORS, CONTROL, drawing, encode
from paperworks.nn import LSTM, MLSTM, RWKV, S4, TTT, Attention, Mamba, Mixer, Placement, RoPE

DIM, LENGTHS = 128, (64, 128, 256, 512, 1024, 2048, 4096)
MOST = 3.0  # seconds: a mixer that takes longer at one length is not asked for the next


def mixers(length: int) -> dict[str, Mixer]:
    """Return what is compared; S4's kernel is learned for a length."""
    return {
        "attention": Attention(heads=4, position=RoPE()),
        "Mamba": Mamba(),
        "RWKV": RWKV(),
        "mLSTM": MLSTM(heads=4),
        "S4": S4(state=32, length=length),
        "TTT-Linear": TTT(heads=4),
        "LSTM": LSTM(),
    }


def seconds(mixer: torch.nn.Module, length: int) -> float:
    """Return the least time of three for a forward and a backward pass over one row."""
    from benchmarks.measure import best

    x = torch.randn(1, length, DIM, requires_grad=True)

    def step() -> None:
        mixer(x, Placement().resolve(1, length, x.device)).sum().backward()

    step()
    return best(step, 3)


def crossing(times: dict[int, float], attention: dict[int, float]) -> int | None:
    """Return the first length from which on a mixer takes less time than attention, of those measured."""
    faster = [length for length in times if times[length] < attention[length]]
    slower = [length for length in times if times[length] >= attention[length]]
    after = [length for length in faster if not slower or length > max(slower)]
    return min(after) if after else None


def run() -> Iterator[Row]:
    torch.set_num_threads(1)
    found: dict[str, dict[int, float]] = {}
    for name in mixers(1):
        found[name] = {}
        for length in LENGTHS:
            torch.manual_seed(0)
            found[name][length] = seconds(mixers(length)[name].build(DIM), length)
            if found[name][length] > MOST:
                break
    _draw(found)
    attention = found["attention"]
    for name, times in found.items():
        if name == "attention":
            continue
        last = max(times)
        row = Row(f"{name} beside attention, {last} tokens", [times[last]], [attention[last]], bar=0.0)
        crossed = crossing(times, attention)
        row.note = f"less time than attention from {crossed} tokens on" if crossed else "attention takes less time"
        row.details = {f"ms_{length}": 1000 * value for length, value in times.items()}
        row.details |= {f"attention_ms_{length}": 1000 * value for length, value in attention.items()}
        yield row


def _draw(found: dict[str, dict[int, float]]) -> None:
    with drawing(figsize=(7.2, 4.0)) as figure:
        axes = figure.subplots()
        colors = dict(zip([name for name in found if name != "attention"], COLORS, strict=True))
        for name, times in found.items():
            microseconds = [1e6 * value / length for length, value in times.items()]
            axes.plot(list(times), microseconds, color=colors.get(name, CONTROL), marker="o", markersize=4, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
        axes.set_ylim(top=6 * axes.get_ylim()[1])  # room for the legend
        axes.set_xlabel("tokens")
        axes.set_ylabel("microseconds a token, forward and backward")
        axes.set_title(f"Cost against length: one mixer of width {DIM}, one thread")
        axes.legend(ncols=4, loc="upper center")
        kind, data = encode(figure, "cost-against-length")
        (Path(__file__).parent.parent / "results" / f"cost-against-length.{kind}").write_bytes(data)
