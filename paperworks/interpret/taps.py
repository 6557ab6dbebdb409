"""Listening to a model and changing what it computes: two context managers over plain forward hooks."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from paperworks.core.selection import Targets, select

Edit = Callable[[Tensor], Tensor]


class Recording(dict[str, Tensor]):
    """The recorded outputs by module path. A path recorded in several forward passes holds the last; `all` has each."""

    def __init__(self) -> None:
        super().__init__()
        self.all: dict[str, list[Tensor]] = {}

    def __missing__(self, path: str) -> Tensor:
        from paperworks.core.errors import unknown

        raise KeyError(unknown("recorded path (did a forward pass run inside the context?)", path, self.keys()))


def _tensor_of(output: Any) -> Tensor | None:
    """The tensor of a module's output; libraries that return tuples put it first."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return output[0]
    return None


def _require_finite(path: str, value: Tensor, passes: int) -> None:
    """Raise FloatingPointError that says which tap, which forward pass and which rows of the batch are not finite."""
    if bool(torch.isfinite(value).all()):
        return
    bad = ~torch.isfinite(value)
    rows = bad.flatten(1).any(1).nonzero().flatten().tolist() if value.dim() > 1 else bad.nonzero().flatten().tolist()
    shown = ", ".join(map(str, rows[:8])) + (f", ... ({len(rows)} in all)" if len(rows) > 8 else "")
    raise FloatingPointError(
        f"the output of {path} {tuple(value.shape)} holds {int(value.isnan().sum())} NaN and "
        f"{int(value.isinf().sum())} infinite numbers in forward pass {passes} (counted from 1), batch rows {shown}; "
        "record its inputs with finite=True to find where they begin"
    )


@contextmanager
def record(
    model: nn.Module,
    targets: Targets,
    *,
    detach: bool = True,
    to: torch.device | str | None = None,
    finite: bool = False,
) -> Iterator[Recording]:
    """Record the outputs of the chosen modules during the forward passes inside the context.

    Recording changes no bit of the model's output: a value that only a listener needs (`blocks.6.mixer.pattern`) is
    computed beside the fused kernel. Nothing but the chosen outputs is kept. Hooks run in the order in which they were
    set: a record opened inside an edit sees the edited value, one opened outside it the value before.

    Args:
        model: any module, ours or another library's.
        targets: glob patterns over module paths, see `nn.select`.
        detach: whether gradients are cut off; with False, recorded tensors stay in the graph.
        to: where the copies go ("cpu" to spare a GPU's memory).
        finite: whether to stop at the first output with a NaN or an infinity in it (waits for a GPU at each tap).

    Raises:
        ValueError: when a target matches nothing.
        FloatingPointError: with `finite`, at the forward pass; says which tap, which pass and which rows of the batch.
    """
    seen = Recording()

    def listen(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            value = _tensor_of(output)
            if value is None:
                raise TypeError(f"{path} ({type(module).__name__}) returns {type(output).__name__}, not a tensor")
            if finite:
                _require_finite(path, value, len(seen.all.get(path, ())) + 1)
            value = value.detach() if detach else value
            if detach:  # copied even where it already is: a later in-place operation must not change the record
                value = value.to(to or value.device, copy=True)
            elif to is not None:
                value = value.to(to)
            seen[path] = value
            seen.all.setdefault(path, []).append(value)

        return hook

    with ExitStack() as stack:
        for path, module in select(model, targets).items():
            stack.callback(module.register_forward_hook(listen(path)).remove)
        yield seen


@contextmanager
def edit(model: nn.Module, edits: Mapping[str, Edit]) -> Iterator[nn.Module]:
    """Replace the outputs of modules by functions of them, during the forward passes inside the context.

    Args:
        model: any module, ours or another library's.
        edits: {target: function}; a target is a glob pattern over module paths, the function takes the output (for
            modules that return a tuple, its first element) and returns a tensor of the same shape and dtype.

    Raises:
        ValueError: when a target matches nothing, or (at the forward pass) a function returns another shape, another
            dtype, or nothing.
    """

    def change(path: str, function: Edit) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            value = _tensor_of(output)
            if value is None:
                raise TypeError(f"{path} ({type(module).__name__}) returns {type(output).__name__}, not a tensor")
            new = function(value)
            if not isinstance(new, Tensor):
                raise ValueError(f"the edit of {path} returned {type(new).__name__}: it must return the new tensor")
            if new.shape != value.shape or new.dtype != value.dtype:
                raise ValueError(
                    f"the edit of {path} returned {new.dtype} {tuple(new.shape)}, "
                    f"it must keep {value.dtype} {tuple(value.shape)}"
                )
            return new if isinstance(output, Tensor) else (new, *output[1:])

        return hook

    with ExitStack() as stack:
        for target, function in edits.items():
            for path, module in select(model, target).items():
                stack.callback(module.register_forward_hook(change(path, function)).remove)
        yield model
