import time

import pytest

from paperworks.lab import fingerprint as fingerprints
from paperworks.lab.fingerprint import code_hash, defining_file, fingerprint

PAPER = '''"""A paper."""
import math
from pack.papers.family._private import helper
from pack.testbeds import digits

paper = Paper(key="k", title="A title", implements=("pack.nn.norm.Norm",))

RATE = 0.1  # a comment


@paper.claim("It works", paper="Table 1", control="c", kind="exact")
def works(lab: Lab) -> Verdict:
    """Check it."""
    rate: float = RATE
    return helper(rate) + math.sqrt(digits.load())
'''


@pytest.fixture
def package(tmp_path):
    """A package with a paper, a private module that imports another, a testbed and a part."""
    root = tmp_path / "pack"
    files = {
        "__init__.py": "",
        "papers/__init__.py": "",
        "papers/family/__init__.py": "",
        "papers/family/a.py": PAPER,
        "papers/family/_private.py": (
            "from pack.papers.family._deeper import base\n\ndef helper(x):\n    return base(x)\n"
        ),
        "papers/family/_deeper.py": "def base(x):\n    return x\n",
        "testbeds/__init__.py": "from pack.testbeds.shapes import square\n",
        "testbeds/digits.py": "def load():\n    return 4\n",
        "testbeds/shapes.py": "def square():\n    return 1\n",
        "nn/__init__.py": "from pack.nn.norm import Norm as Norm\nfrom .deep import Deep\n",
        "nn/norm.py": "class Norm:\n    size: int = 1\n",
        "nn/deep.py": "class Deep:\n    pass\n",
        "nn/other.py": "def other():\n    return 1\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def code(package, name="papers/family/a.py", implements=("pack.nn.norm.Norm",)):
    return fingerprint(package / name, implements, package).code


def change(package, name, old, new):
    path = package / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("papers/family/a.py", '"""A paper."""', '"""Another docstring."""'),
        ("papers/family/a.py", '    """Check it."""\n', ""),
        ("papers/family/a.py", "  # a comment", "  # another"),
        ("papers/family/a.py", "import math\n", "import math\nimport os\n"),
        ("papers/family/a.py", "(lab: Lab) -> Verdict", "(lab)"),
        ("papers/family/a.py", "rate: float = RATE", "rate = RATE"),
        ("papers/family/a.py", "A title", "The title, corrected"),
        ("papers/family/a.py", "Table 1", "Table 2"),
        ("nn/norm.py", "class Norm:\n", 'class Norm:\n    """A norm."""\n\n'),
        ("nn/norm.py", "size: int", "size: float"),
        ("nn/other.py", "1", "2"),  # not named in `implements`
    ],
)
def test_a_fingerprint_stays_when_words_imports_or_annotations_change(package, name, old, new):
    before = code(package)
    change(package, name, old, new)
    assert code(package) == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("papers/family/a.py", "RATE = 0.1", "RATE = 0.2"),
        ("papers/family/a.py", "math.sqrt", "math.exp"),
        ("papers/family/a.py", "import math\n", "import cmath as math\n"),
        ("papers/family/a.py", 'kind="exact"', 'kind="behaviour"'),
        ("papers/family/_private.py", "base(x)\n", "base(x) + 1\n"),
        ("papers/family/_deeper.py", "return x", "return -x"),
        ("testbeds/digits.py", "4", "5"),
        ("nn/norm.py", "= 1", "= 2"),
    ],
)
def test_a_fingerprint_changes_when_what_is_computed_changes(package, name, old, new):
    before = code(package)
    change(package, name, old, new)
    assert code(package) != before


def test_a_fingerprint_stays_when_files_move_and_imports_follow(package):
    before = code(package)
    folder = package / "papers" / "finer" / "a"
    folder.mkdir(parents=True)
    (package / "papers" / "family" / "a.py").rename(folder / "paper.py")
    (package / "papers" / "family" / "_private.py").rename(folder / "parts.py")
    (package / "nn" / "norms").mkdir()
    (package / "nn" / "norm.py").rename(package / "nn" / "norms" / "rms.py")
    change(package, "papers/finer/a/paper.py", "pack.papers.family._private", "pack.papers.finer.a.parts")
    change(package, "papers/finer/a/paper.py", "pack.nn.norm.Norm", "pack.nn.norms.rms.Norm")
    assert code(package, "papers/finer/a/paper.py", ("pack.nn.norms.rms.Norm",)) == before


def test_relative_imports_and_whole_modules_are_followed(package):
    change(package, "papers/family/a.py", "from pack.papers.family._private", "from ._private")
    change(package, "papers/family/_private.py", "from pack.papers.family._deeper import base", "from . import _deeper")
    change(package, "papers/family/_private.py", "base(x)", "_deeper.base(x)")
    before = code(package)
    change(package, "papers/family/_deeper.py", "return x", "return -x")
    assert code(package) != before


def test_a_name_offered_by_a_package_is_found_where_it_is_defined(package):
    assert defining_file("pack.nn.Norm", package) == package / "nn" / "norm.py"
    assert defining_file("pack.nn.Deep", package) == package / "nn" / "deep.py"
    assert defining_file("pack.nn.norm.Norm", package) == package / "nn" / "norm.py"
    assert defining_file("pack.nn.norm", package) == package / "nn" / "norm.py"
    with pytest.raises(ValueError, match=r"'elsewhere\.Norm' is in no file"):
        defining_file("elsewhere.Norm", package)


def test_parts_outside_of_the_package_do_not_count(package):
    assert fingerprint(package / "papers" / "family" / "a.py", ("torch.nn.Linear",), package).code


def test_a_file_that_is_not_python_is_named(package):
    (package / "nn" / "norm.py").write_text("def (:\n")
    with pytest.raises(ValueError, match=r"norm\.py is not Python"):
        code(package)


def test_recorded_hashes_spare_the_parsing(package, monkeypatch):
    print_of = fingerprint(package / "papers" / "family" / "a.py", ("pack.nn.norm.Norm",), package)
    fingerprints._read.cache_clear()
    monkeypatch.setattr(fingerprints, "_known", {})
    fingerprints.learn(print_of.sources)
    monkeypatch.setattr(fingerprints, "code_hash", lambda tree: pytest.fail("a known text was parsed"))
    assert code(package) == print_of.code


def test_a_field_without_a_value_counts_in_a_class_only():
    import ast

    def of(text):
        return code_hash(ast.parse(text))

    assert of("class A:\n    x: int\n") != of("class A:\n    pass\n")
    assert of("x: int\ny = 1\n") == of("y = 1\n")
    assert of("if TYPE_CHECKING:\n    from a import b\nx = 1") == of("x = 1")


def test_all_papers_are_fingerprinted_in_a_part_of_the_time_list_may_take():
    from paperworks import papers
    from paperworks.lab.results import load_result, results_folder

    entries = papers.index()
    for entry in entries:  # what `paperworks list` reads anyway
        load_result(results_folder(), entry.key)
    started = time.process_time()
    for entry in entries:
        _ = entry.fingerprint
    # 105 papers take 0.03 s where every file is known, about 0.003 s for each file that is not.
    assert time.process_time() - started < 0.25 + 0.01 * len(fingerprints._known)
