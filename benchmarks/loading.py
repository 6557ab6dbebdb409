"""Loading SmolLM2 from GGUF beside transformers' GGUF load, both to float32 with the tokenizer."""

from collections.abc import Iterator

import transformers

import paperworks as pw
from benchmarks.measure import Row, compare
from paperworks.data.assets import assets


def run() -> Iterator[Row]:
    path = assets.fetch("smollm2")

    def peer():
        transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
        transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)

    yield compare("loading SmolLM2 from GGUF", lambda: pw.load(path), peer, bar=3.0, blocks=2)
