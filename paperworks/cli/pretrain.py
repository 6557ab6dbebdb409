"""`paperworks pretrain TEXT --out DIR`: train a model from nothing; under torchrun, with several processes."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from paperworks.cli.options import parse
from paperworks.train.optim.adam import Adam
from paperworks.train.optim.adamw import AdamW
from paperworks.train.optim.lion import Lion
from paperworks.train.optim.rmsprop import RMSprop
from paperworks.train.optim.sgd import SGD

if TYPE_CHECKING:
    from paperworks.data.text.corpus import Corpus
    from paperworks.data.tokenizers.tokenizer import Tokenizer
    from paperworks.models import Decoder

SAMPLE_TOKENS = 80
EVALUATION_TOKENS = 65_536  # of the held-out text, at most: an evaluation should take less time than the steps between


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a language model from nothing on a text.

    Interrupted, the same command goes on where it stopped. For several processes, start it with
    torchrun --nproc-per-node=N -m paperworks pretrain ...
    """

    text: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
    """A text file, a .jsonl file of documents, a data set's name (tinyshakespeare, python-docs ...) or "org/name" on
    the hub."""
    out: Path
    """The folder to write: the model with its tokenizer in model/, checkpoints and metrics.jsonl beside it."""
    model: str = "nano"
    """A preset (paperworks.presets() lists them), or a YAML or JSON file of a spec (as spec.json has it)."""
    tokenizer: str = "bytes"
    """bytes, chars, bpe (trained on the text), or a folder or file that holds tokenizer.json."""
    vocab_size: int = 4096
    """For bpe: ids at most."""
    column: str = "text"
    """For records: where the text is."""
    separate: bool = False
    """Keep documents that are packed into one row from seeing each other."""
    length: int = 256
    """Tokens of a training row."""
    batch: int = 16
    """Rows of a step."""
    steps: int = 1000
    """Optimizer steps."""
    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """What follows the warm-up."""
    warmup: float = 0.02
    """Steps of warm-up; below 1, a share of all."""
    optimizer: (
        Annotated[AdamW, tyro.conf.subcommand("adamw", description="Adam with decoupled weight decay.")]
        | Annotated[Lion, tyro.conf.subcommand("lion", description="Signs of momentum; smaller rates than AdamW.")]
        | Annotated[Adam, tyro.conf.subcommand("adam", description="Adam; its weight decay is an L2 penalty.")]
        | Annotated[SGD, tyro.conf.subcommand("sgd", description="Gradient descent, with momentum if wanted.")]
        | Annotated[RMSprop, tyro.conf.subcommand("rmsprop", description="Gradients divided by their running size.")]
    ) = field(default_factory=lambda: AdamW(weight_decay=0.1))
    """Named at the end of the line, followed by its own settings: ... optimizer:lion --optimizer.weight-decay 1.0"""
    accumulate: int = 1
    """Micro-batches a step, of `batch` rows each."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the forward pass."""
    validation: float = 0.05
    """Share of the text held out, at its end."""
    evaluate_every: int = 250
    """Steps between two evaluations, each with a sample."""
    save_every: int = 500
    """Steps between two checkpoints."""
    prompt: str | None = None
    """What samples begin with; None takes the first words of the held-out text."""
    sharded: bool = False
    """Under torchrun: let each process hold a share of the model (FSDP2) instead of all of it; no samples then."""
    device: str | None = None
    """Such as cuda; None is the CPU."""
    seed: int = 0
    """Of the weights and of the order of the text."""


def main(arguments: list[str]) -> int:
    """Train, evaluate, sample and save."""
    options = parse(Options, "pretrain", arguments)
    from paperworks.data.text.corpus import fitting_tokenizer, read_corpus

    finished = options.out / "model"
    if finished.exists():
        raise ValueError(f"{finished} is there already: give another --out, or remove it first")
    corpus = read_corpus(options.text, column=options.column)
    tokenizer = _kept_tokenizer(options) or fitting_tokenizer(options.tokenizer, corpus, vocab_size=options.vocab_size)
    spec = fitted_spec(read_spec(options.model), tokenizer, options.length)
    _Pretraining(options, corpus, tokenizer, spec).run()
    return 0


def read_spec(name: str) -> Decoder:
    """The spec of a preset, or of a YAML or JSON file, in which `vocab_size` may be left out.

    Raises ValueError that names what is wrong with it.
    """
    from paperworks.models import Decoder, preset
    from paperworks.models.presets.families import presets

    path = Path(name).expanduser()
    if name in presets() or not path.suffix:
        return preset(name)
    if not path.is_file():
        raise ValueError(f"no spec at {path}; give a YAML or JSON file, or a preset")
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("spec"), dict):  # our own spec.json has it inside
        content = content["spec"]
    if not isinstance(content, dict):
        raise ValueError(f"{path} describes a {type(content).__name__}; a spec is a mapping with a `type`")
    try:
        return Decoder.from_dict({"type": "Decoder", "vocab_size": 1} | content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def fitted_spec(spec: Decoder, tokenizer: Tokenizer, length: int) -> Decoder:
    """The spec with the tokenizer's vocabulary. Raises ValueError for rows that exceed the model's context."""
    if spec.context is not None and length > spec.context:
        raise ValueError(f"--length {length} exceeds the model's context of {spec.context}; give a smaller --length")
    return replace(spec, vocab_size=tokenizer.vocab_size)


def _kept_tokenizer(options: Options) -> Tokenizer | None:
    """The tokenizer of the run that is gone on with, if there is one: training it again could change it."""
    from paperworks.data.tokenizers.tokenizer import Tokenizer

    folder = options.out / "tokenizer"
    return Tokenizer.from_folder(folder) if (folder / "tokenizer.json").exists() else None


class _Pretraining:
    """One run of the command."""

    def __init__(self, options: Options, corpus: Corpus, tokenizer: Tokenizer, spec: Decoder) -> None:
        import torch

        import paperworks as pw

        self.options, self.tokenizer, self.spec = options, tokenizer, spec
        training, held_out = corpus.cut(options.validation)
        self.prompt = options.prompt or _first_words(held_out.documents[0]) or _first_words(training.documents[0])
        self.training, self.held_out = training.encode(tokenizer), held_out.encode(tokenizer)
        if len(self.held_out) < 2:
            raise ValueError("the held-out text is shorter than two tokens: raise --validation, or give a longer text")
        torch.manual_seed(options.seed)
        self.model = pw.build(spec)
        self.model.tokenizer = tokenizer
        self.origin = corpus.origin

    def run(self) -> None:
        """Train and save."""
        import paperworks as pw
        from paperworks import train
        from paperworks.data.text.windows import RandomWindows
        from paperworks.train.distributed import distribution

        options = self.options
        batches: Any = RandomWindows(
            self.training,
            length=options.length,
            batch=options.batch,
            count=options.steps * options.accumulate,
            seed=options.seed,
        )
        settings = train.Settings(
            steps=options.steps,
            lr=options.lr,
            schedule=options.schedule,
            warmup=options.warmup,
            optimizer=options.optimizer,
            accumulate=options.accumulate,
            precision=options.precision,
            evaluate_every=min(options.evaluate_every, options.steps),
            save_every=options.save_every,
            device=options.device,
            sharded=options.sharded,
            seed=options.seed,
        )
        options.out.mkdir(parents=True, exist_ok=True)
        self.first = _is_first()
        if self.first:
            (options.out / "tokenizer").mkdir(exist_ok=True)
            self.tokenizer.save(options.out / "tokenizer")
            print(self._summary())
        train.fit(
            self.model,
            train.next_token_loss,
            self._separated(batches),
            settings,
            run_dir=options.out,
            evaluate=self._evaluate,
        )
        state = train.full_state(self.model)
        if distribution.is_first():
            finished = pw.build(self.spec)
            finished.load_state_dict(state)
            finished.tokenizer = self.tokenizer
            place = options.out / "model"
            if place.exists():  # of this run before it was prolonged: nothing that was saved is overwritten
                place = options.out / f"model-{options.steps}"
            pw.save(finished, place)
            print(f"saved to {place}; `paperworks sample {place} {json.dumps(self.prompt)}` lets it write")

    def _separated(self, batches: Any) -> Any:
        from paperworks.data.text.corpus import Separated

        if not self.options.separate:
            return batches
        if self.tokenizer.eos is None:
            raise ValueError(
                "--separate needs a tokenizer with an end-of-text token: --tokenizer bpe, or one read from a file"
            )
        return Separated(batches, self.tokenizer.eos)

    def _summary(self) -> str:
        from paperworks.models import count_parameters

        tokens = f"{len(self.training):,} tokens to train on, {len(self.held_out):,} held out"
        return (
            f"{self.origin}: {tokens}, vocabulary {self.tokenizer.vocab_size:,}\n"
            f"{self.options.model}: {count_parameters(self.spec):,} parameters, "
            f"{count_parameters(self.spec, embedding=False):,} without embeddings"
        )

    def _evaluate(self, model: Any) -> dict[str, float]:
        """The loss on the held-out text; show it, with a sample of what the model writes."""
        import math

        from paperworks import train
        from paperworks.data.text.windows import ordered_windows

        length = min(self.options.length, len(self.held_out) - 1)
        most = max(1, EVALUATION_TOKENS // length)
        count = min(most, (len(self.held_out) - 1) // length)
        windows = self._separated(ordered_windows(self.held_out, length=length, count=count))
        measured = train.evaluate(model, train.next_token_loss, windows)
        loss = measured["loss"]
        perplexity = math.exp(min(loss, 50.0))
        if self.first:
            print(
                f"\nheld-out loss {loss:.3f} nats a token (perplexity {perplexity:,.1f})", file=sys.stderr, flush=True
            )
        if not self.options.sharded:
            self._sample(model, length)
        return {"loss": loss, "perplexity": perplexity}

    def _sample(self, model: Any, length: int) -> None:
        """Show what the model writes."""
        import torch

        from paperworks.generation import Sampling, decode

        ids = self.tokenizer.encode(self.prompt, special=False)[-length:]
        room = SAMPLE_TOKENS if self.spec.context is None else min(SAMPLE_TOKENS, self.spec.context - len(ids))
        prompt = torch.tensor([ids], device=model.device)
        sampling = Sampling(temperature=0.8, top_p=0.95)
        steps = decode(model, prompt, max_new_tokens=max(room, 0), sampling=sampling, seed=self.options.seed)
        written = self.tokenizer.decode([int(token) for token in steps])
        if self.first:
            print(f"{self.prompt}|{written}\n", file=sys.stderr, flush=True)


def _is_first() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"


def _first_words(text: str, count: int = 5) -> str:
    """Some words; the first one may be half a word, where a text was cut."""
    return " ".join(text.split()[1 : count + 1])
