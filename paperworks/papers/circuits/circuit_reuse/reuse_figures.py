"""The figures of circuit reuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from paperworks.interpret.circuits.overlap import StagedCircuit
from paperworks.lab import Lab
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.papers.circuits.circuit_reuse.two_tasks import TASKS, Task


def draw_heads(lab: Lab, circuits: Mapping[Task, StagedCircuit], stages: Mapping[str, str], threshold: float) -> None:
    """Draw each head's effect in one task against that in the other, a panel a stage."""
    with lab.figure("heads", figsize=(8.4, 3.6)) as figure:
        panels = figure.subplots(1, len(stages), sharey=True)
        limit = 0.0
        for axes, (stage, into) in zip(panels, stages.items(), strict=True):
            names, colours = (circuits[task].effects[stage] for task in TASKS)
            for head in sorted(set(names) | set(colours)):
                one, other = abs(names.get(head, 0.0)), abs(colours.get(head, 0.0))
                limit = max(limit, one, other)
                axes.plot(one, other, "o", color=COLORS[head[0]], markersize=5)
            axes.set_title("Paths to the logits" if into == "logits" else "to the heads before", fontsize=10)
            axes.set_xlabel("effect in names")
        for axes in panels:
            axes.axhline(threshold, color=CONTROL, linewidth=1, linestyle=":")
            axes.axvline(threshold, color=CONTROL, linewidth=1, linestyle=":")
            axes.set_xscale("symlog", linthresh=threshold)
            axes.set_yscale("symlog", linthresh=threshold)
            axes.set_xlim(-0.005, 1.3 * limit + 0.01)
            axes.set_ylim(-0.005, 1.3 * limit + 0.01)
            ticks = [0, threshold, 0.2, 1.0]
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        panels[0].set_ylabel("effect in colours")
        for layer in range(1 + max(head[0] for head in circuits["names"].effects["movers"])):
            panels[-1].plot([], [], "o", color=COLORS[layer], markersize=5, label=f"layer {layer}")
        panels[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def draw_repair(
    lab: Lab,
    before: Mapping[Task, float],
    repaired: Mapping[Task, float],
    misled: Mapping[Task, float],
    blind: Mapping[Task, Sequence[float]],
) -> None:
    """Draw the accuracy on adversarial prompts as it is, and with heads told where to look."""
    with lab.figure("repair", figsize=(7.4, 3.4)) as figure:
        axes = figure.subplots()
        bars = {
            "as it is": (before, COLORS[0]),
            "told to look at the right pair": (repaired, COLORS[2]),
            "told to look at the other pair": (misled, COLORS[1]),
            "random heads told so (mean)": (
                {task: sum(values) / len(values) for task, values in blind.items()},
                CONTROL,
            ),
        }
        for index, (name, (values, color)) in enumerate(bars.items()):
            places = [place + 0.2 * (index - 1.5) for place in range(len(TASKS))]
            axes.bar(places, [values[task] for task in TASKS], width=0.18, color=color, label=name)
        axes.set_xticks(range(len(TASKS)), list(TASKS))
        axes.set_ylim(0, 1)
        axes.set_ylabel("accuracy, adversarial prompts")
        axes.set_title("Other task's heads, overridden")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8.5)
