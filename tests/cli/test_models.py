"""chat, sample and inspect against a model that only pretends."""

import io
import types
from dataclasses import dataclass

import pytest
import torch

import paperworks
from paperworks.cli import main as cli


@dataclass(frozen=True)
class Norm:
    eps: float = 1e-5


@dataclass(frozen=True)
class Block:
    width: int = 4
    norm: Norm = Norm()


@dataclass(frozen=True)
class Spec:
    vocab_size: int = 10
    context: int | None = 2048
    block: tuple[Block, ...] = (Block(), Block(), Block(width=8))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.spec = Spec()
        self.tokenizer = types.SimpleNamespace(vocab_size=10)
        self.embedding = torch.nn.Embedding(10, 4)
        self.head = torch.nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.body = torch.nn.Linear(4, 4)


@pytest.fixture
def pretended(monkeypatch):
    """Replace the public functions; returns the calls that were made."""
    calls = []

    def load(name):
        if name == "nothing":
            raise ValueError("unknown model 'nothing'; did you mean 'something'?")
        if name == "key":
            raise KeyError("no model is called 'key'")
        return Model()

    def generate(model, texts, *, stream=None, **settings):
        calls.append((texts, settings))
        for piece in (" there", " was"):
            stream(piece)
        return [" there was"]

    def chat(model, messages, *, stream=None, **settings):
        calls.append(([dict(message) for message in messages], settings))
        if messages[-1]["content"] == "stop me":
            stream("half an ")
            raise KeyboardInterrupt
        stream("answer ")
        stream(str(len(calls)))
        return f"answer {len(calls)}"

    for name, function in {
        "load": load,
        "generate": generate,
        "chat": chat,
        "count_parameters": lambda spec: 60,
    }.items():
        monkeypatch.setattr(paperworks, name, function, raising=False)
    return calls


def test_sample_prints_the_text_and_its_continuation_and_passes_only_what_was_asked(pretended, capsys):
    arguments = ["--max-new-tokens", "5", "--temperature", "0", "--top-k", "3", "--seed", "7", "--stop", "end", "fin"]
    assert cli.main(["sample", "tiny", "Once", *arguments]) == 0
    assert capsys.readouterr().out == "Once there was\n"
    settings = {"max_new_tokens": 5, "temperature": 0.0, "top_k": 3, "seed": 7, "stop": ["end", "fin"]}
    assert pretended == [(["Once"], settings)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "nothing", "x"], "did you mean 'something'"),
        (["sample", "key", "x"], "no model is called 'key'"),
        (["sample", "tiny", ""], "the text to continue is empty"),
        (["sample", "tiny"], "TEXT"),
        (["chat", "nothing"], "did you mean 'something'"),
        (["inspect", "nothing"], "did you mean 'something'"),
        (["sample", "tiny", "x", "--top-k", "many"], "many"),
    ],
)
def test_a_mistake_with_a_model_is_told_in_a_line(pretended, capsys, arguments, message):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def converse(monkeypatch, *lines, arguments=()):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    return cli.main(["chat", "tiny", *arguments])


def test_a_piped_conversation_is_answered_line_by_line_and_remembered(pretended, capsys, monkeypatch):
    assert converse(monkeypatch, "Hello", "", "And you?", arguments=["--system", "Be brief."]) == 0
    assert capsys.readouterr().out == "answer 1\nanswer 2\n"
    assert pretended[1][0] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "answer 1"},
        {"role": "user", "content": "And you?"},
    ]


def test_reset_and_system_forget_the_turns_and_quit_ends(pretended, capsys, monkeypatch):
    assert converse(monkeypatch, "A", "/reset", "B", "/system Rhyme.", "C", "/nonsense", "/quit", "D") == 0
    said = [messages for messages, _ in pretended]
    assert said[1] == [{"role": "user", "content": "B"}]
    assert said[2] == [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "C"}]
    assert len(said) == 3
    assert "unknown command /nonsense" in capsys.readouterr().out


def test_an_answer_that_is_stopped_stays_in_the_conversation(pretended, capsys, monkeypatch):
    assert converse(monkeypatch, "stop me", "go on") == 0
    assert "half an  (stopped)" in capsys.readouterr().out
    assert pretended[1][0][1] == {"role": "assistant", "content": "half an "}


def test_inspect_shows_the_spec_the_parameters_the_tokenizer_and_the_context(pretended, capsys):
    assert cli.main(["inspect", "tiny"]) == 0
    out = capsys.readouterr().out
    assert "60 parameters" in out
    for expected in ("Spec", "vocab_size 10", "0 to 1 Block", "2 Block", "width 8", "eps 1e-05", "2,048 tokens"):
        assert expected in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if "%" in line}
    assert rows == {"embedding": ["40", "66.7%"], "body": ["20", "33.3%"]}  # the tied head counts once
