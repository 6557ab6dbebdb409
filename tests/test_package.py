import subprocess
import sys

import pytest

from paperworks.core.errors import nearest, unknown


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_package_is_light_and_loads_no_torch():
    imported = run(
        "import sys; before = set(sys.modules); import paperworks; print(*set(sys.modules) - before)"
    ).split()
    assert "torch" not in imported
    assert "numpy" not in imported
    assert len(imported) < 20  # the bar of the house is 0.3 s; six small modules are far below on any machine


def test_generate_is_a_function_whatever_was_imported_first():
    for first in ("import paperworks as pw", "import paperworks.generation; import paperworks as pw"):
        assert run(f"{first}; import types; print(isinstance(pw.generate, types.FunctionType))").strip() == "True"


def test_unknown_attributes_are_attribute_errors():
    import paperworks as pw

    with pytest.raises(AttributeError, match="laod"):
        pw.laod  # noqa: B018


def test_near_misses_are_named_best_first():
    assert nearest("lama", ["llama", "mistral", "gemma"])[0] == "llama"
    assert unknown("preset", "zzz", ["a", "b"]) == "unknown preset 'zzz'. Known: a, b"
    assert "(20 in all)" in unknown("preset", "zzz", map(str, range(20)))
