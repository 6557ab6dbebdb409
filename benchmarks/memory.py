"""Peak memory beside the peers: each side does its work in a process of its own; the ratio is theirs over ours."""

import subprocess
import sys
from collections.abc import Iterator

from benchmarks.measure import Row

_START = "import torch; from benchmarks import subjects; torch.manual_seed(0); "
_TOKENS = "batch = torch.randint(0, subjects.VOCAB, (4, 256)); "
# Linux's own high-water mark; getrusage's would begin with what the starting process held.
_PEAK = "\nprint([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"

WORK = {
    "training, float32": (
        _TOKENS + "from paperworks import train; model = subjects.our_model(); "
        "train.fit(model, train.next_token_loss, [batch], train.Settings(steps=2, progress=False))",
        _TOKENS + "from benchmarks.train import peer_steps; model = subjects.peer_model(); "
        "peer_steps(model, [batch] * 2, False)",
    ),
    "decoding, float32, batch 1": (
        "from paperworks.generation import Sampling, decode; model = subjects.our_model(); "
        "list(decode(model, torch.ones(1, 32).long(), max_new_tokens=64, sampling=Sampling(temperature=0.0)))",
        "model = subjects.peer_model(); model.generate(torch.ones(1, 32).long(), max_new_tokens=64, do_sample=False)",
    ),
    "loading SmolLM2 from GGUF": (
        "import paperworks as pw; from paperworks.data import assets; pw.load(assets.fetch('smollm2'))",
        "from paperworks.data import assets; import transformers; path = assets.fetch('smollm2'); "
        "transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)",
    ),
}


def peak_megabytes(code: str) -> float:
    command = [sys.executable, "-c", _START + code + _PEAK]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(out.split()[-1]) / 1024


def run() -> Iterator[Row]:
    for name, (ours, peer) in WORK.items():
        row = Row(f"peak memory, {name}", [peak_megabytes(ours)], [peak_megabytes(peer)], bar=1.0)
        row.details = {"ours_megabytes": row.ours[0], "peer_megabytes": row.peer[0]}
        yield row
