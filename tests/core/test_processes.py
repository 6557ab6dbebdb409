"""Exchanges between processes: nothing of the compiler is imported for them, and compiled code may call them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

COMPILED = """
import sys, torch, torch.distributed as dist
from paperworks.core import processes
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
processes._spread = True  # one process alone never spreads a batch
x = torch.randn(4, 3, requires_grad=True)
def loss(x):
    y = (2 * x).sin()
    return (3 * processes.summed(y)).sum() + processes.exchanged(y, [4], [4]).square().sum()
found = []
for call in (loss, torch.compile(loss, backend="eager"), torch.compile(loss, backend="eager")):
    x.grad = None
    value = call(x)
    value.backward()
    found.append((value.detach(), x.grad.clone()))
for value, gradient in found[1:]:
    torch.testing.assert_close(value, found[0][0])
    torch.testing.assert_close(gradient, found[0][1])
"""


def python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_importing_it_imports_no_compiler() -> None:
    done = python("import sys, paperworks.core.processes; sys.exit('torch._dynamo' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_exchanges_in_a_compiled_function_give_what_they_give_outside(tmp_path: Path) -> None:
    done = python(COMPILED, str(tmp_path / "store"))
    assert done.returncode == 0, done.stderr
