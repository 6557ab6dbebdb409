"""The torch optimizer of `PagedAdamW`: pages of AdamW's state move between host and device (QLoRA, Section 3).

The paper lets the driver move pages of unified memory. Here the optimizer moves them itself, on any device: the two
averages of every parameter are kept whole on the host (pinned where that helps), and the step works through them page
by page. Pages stay on the device up to a budget; the least recently used one leaves first. The numbers are those of the
ordinary AdamW.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.adamw import adamw

from paperworks.train.optim.fused import has_fused_kernels
from paperworks.train.optim.paged_adamw import ALIGNED, PAGE


class _Page(NamedTuple):
    """Where a page belongs on the host, and its copy on the device: averages of the gradient and of its square."""

    homes: tuple[Tensor, Tensor]
    copies: tuple[Tensor, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(copy.nbytes for copy in self.copies)

    def write_back(self) -> None:
        for home, copy in zip(self.homes, self.copies, strict=True):
            home.copy_(copy)


class PagedAdamWOptimizer(AdamW):
    """AdamW, bit for bit, with its state on the host and at most `budget` bytes of it on the device.

    Attributes:
        resident: bytes of state on the device now; `most_resident`, the most there ever were.
        moved: bytes brought to the device so far.
    """

    def __init__(
        self,
        params: Any,
        *,
        budget: int,
        page: int = PAGE,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        if page < 1 or page % ALIGNED:
            raise ValueError(f"page must be a positive multiple of {ALIGNED} numbers, got {page}")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        fused = has_fused_kernels(self.param_groups)
        for group in self.param_groups:
            group["fused"] = fused or None
        self._step_supports_amp_scaling = fused  # such a step can be left out on the device (see train.step)
        largest = max(2 * min(page, parameter.numel()) * parameter.element_size() for parameter in parameters)
        if budget < largest:
            raise ValueError(f"a budget of {budget} bytes does not hold one page, which takes {largest}")
        self.budget, self.page = budget, page
        self.resident = self.most_resident = self.moved = 0
        self._pages: OrderedDict[tuple[Tensor, int], _Page] = OrderedDict()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, a page at a time."""
        if closure is not None:
            raise ValueError("PagedAdamW takes no closure: compute the gradients, then call step()")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if group["fused"] else "cpu")
            state["exp_avg"], state["exp_avg_sq"] = _host(parameter), _host(parameter)
        if not parameter.is_contiguous():
            raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is not contiguous: pages are cut in order")
        assert parameter.grad is not None
        values, gradients = parameter.view(-1), parameter.grad.reshape(-1)
        step = state["step"]
        for start in range(0, parameter.numel(), self.page):
            rows = slice(start, start + self.page)
            step = state["step"].clone()  # the kernel counts the step, once for each page
            averages = self._fetch(parameter, start, rows)
            adamw(
                [values[rows]],
                [gradients[rows]],
                [averages[0]],
                [averages[1]],
                [],
                [step],
                foreach=False,
                fused=bool(group["fused"]),
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
        state["step"] = step

    def _fetch(self, parameter: Tensor, start: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Page on the device: its two averages, after making room for it."""
        key = (parameter, start)
        if key in self._pages:
            self._pages.move_to_end(key)
            return self._pages[key].copies
        state = self.state[parameter]
        homes = (state["exp_avg"].view(-1)[rows], state["exp_avg_sq"].view(-1)[rows])
        needed = sum(home.nbytes for home in homes)
        while self._pages and self.resident + needed > self.budget:
            _, oldest = self._pages.popitem(last=False)
            oldest.write_back()
            self.resident -= oldest.nbytes
        copies = tuple(torch.empty_like(home, device=parameter.device).copy_(home, non_blocking=True) for home in homes)
        self._pages[key] = page = _Page(homes, (copies[0], copies[1]))
        self.resident += page.nbytes
        self.moved += page.nbytes
        self.most_resident = max(self.most_resident, self.resident)
        return page.copies

    def state_dict(self) -> dict[str, Any]:
        """State in the ordinary AdamW's layout, after writing every page back."""
        for page in self._pages.values():
            page.write_back()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a paged or of an ordinary AdamW."""
        own = [group["fused"] for group in self.param_groups]
        Optimizer.load_state_dict(self, state_dict)
        self._pages.clear()
        self.resident = 0
        for group, fused in zip(self.param_groups, own, strict=True):
            group["fused"] = fused
            for parameter in group["params"]:
                state = self.state[parameter]
                for name in ("exp_avg", "exp_avg_sq"):
                    if name in state:
                        state[name] = _host(parameter).copy_(state[name])
                if "step" in state:
                    state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(
                        parameter.device if fused else "cpu"
                    )


def _host(parameter: Tensor) -> Tensor:
    """Zeros of the parameter's shape in host memory, for one average."""
    pinned = parameter.device.type == "cuda"
    return torch.zeros(parameter.shape, dtype=parameter.dtype, device="cpu", pin_memory=pinned)
