"""`paperworks chat MODEL`: talk to a model; also reads a piped conversation, a line a turn."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from paperworks.cli.loading import load_model
from paperworks.cli.options import Sampling, parse

HELP = "/reset forgets the conversation, /system TEXT sets the instructions (and forgets), /quit ends."

Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Options(Sampling):
    """Talk to a model."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """An asset's name, a directory, a .gguf file or "org/name" on the hub."""
    system: str | None = None
    """Instructions that the model sees before the conversation."""


@dataclass
class Conversation:
    """The messages so far, and the instructions they began with."""

    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    def messages(self) -> list[Message]:
        """What the model is shown."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.turns]

    def restart(self, system: str | None) -> None:
        """Forget the turns and set the instructions."""
        self.system = system
        self.turns.clear()


def main(arguments: list[str]) -> int:
    """Read lines and answer them until /quit or the end of the input."""
    options = parse(Options, "chat", arguments)
    model = load_model(options.model)
    conversation = Conversation(system=options.system)
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP)
    while (line := _read(interactive)) is not None:
        if line.startswith("/"):
            if not _command(line, conversation):
                break
        elif line:
            _answer(model, conversation, line, options.settings())
    return 0


def _read(interactive: bool) -> str | None:
    """The next line, or None at the end of the input."""
    try:
        return input("\n> " if interactive else "").strip()
    except EOFError:
        if interactive:
            print()
        return None


def _command(line: str, conversation: Conversation) -> bool:
    """Obey a line that starts with a slash; False ends the conversation."""
    name, _, rest = line.partition(" ")
    if name in ("/quit", "/exit"):
        return False
    if name == "/reset":
        conversation.restart(conversation.system)
        print("(forgotten)")
    elif name == "/system":
        conversation.restart(rest.strip() or None)
        print("(instructions set)" if conversation.system else "(no instructions)")
    else:
        print(HELP if name == "/help" else f"unknown command {name}. {HELP}")
    return True


def _answer(model: Any, conversation: Conversation, line: str, settings: dict[str, Any]) -> None:
    """Print the answer as it comes; Ctrl-C stops it there and what was written stays part of the conversation."""
    import paperworks as pw

    conversation.turns.append({"role": "user", "content": line})
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        print(piece, end="", flush=True)

    try:
        answer = pw.chat(model, conversation.messages(), stream=show, **settings)
    except KeyboardInterrupt:
        answer = "".join(pieces)
        print(" (stopped)", end="")
    except BaseException:
        conversation.turns.pop()
        raise
    print()
    conversation.turns.append({"role": "assistant", "content": answer})
