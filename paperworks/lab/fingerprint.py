"""Fingerprint of what a paper computes: changes with its code, not with its words, imports or place.

It covers the paper's file, the modules of `paperworks.papers` and `paperworks.testbeds` it imports, and the module of
every name in `implements`. Of each file the syntax tree counts, without docstrings, comments, imports, annotations and
what the paper says about itself (`paper = Paper(...)` and the texts of its claims). Files are found by their path and
never imported.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]

# Modules under these are read with the paper that imports them; anything else counts by `implements`.
FOLLOWED = ("papers", "testbeds")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file: hash of its text, hash of what it computes, and the followed modules it imports (dotted names)."""

    text: str
    code: str
    uses: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Hash of all that a paper computes, and the texts it was taken from."""

    code: str
    sources: dict[str, Source]  # path below the package -> file
    files: tuple[Path, ...]


# By hash of the text: what was read in this process, and what recorded results say of texts read before. A text that
# is known needs no parsing, which keeps `paperworks list` fast.
_known: dict[str, Source] = {}


def learn(sources: dict[str, Source]) -> None:
    """Remember the hashes of files that a recorded result was taken from."""
    for source in sources.values():
        _known.setdefault(source.text, source)


def known() -> dict[str, Source]:
    """All that is known of texts, by their hash."""
    return dict(_known)


def fingerprint(paper: Path, implements: Sequence[str], package: Path = PACKAGE) -> Fingerprint:
    """Fingerprint of the paper in a file.

    Args:
        paper: the file that states the claims; it may lie outside of the package.
        implements: dotted names of parts; those outside of the package do not count.
        package: folder of the package.

    Raises ValueError for a name of the package that no file defines, or a file that is not Python.
    """
    sources: dict[str, Source] = {}
    files: list[Path] = []
    waiting = [paper.resolve()]
    for name in implements:
        if name.partition(".")[0] == package.name:
            waiting.append(defining_file(name, package))
    while waiting:
        path = waiting.pop()
        place = path.relative_to(package).as_posix() if path.is_relative_to(package) else path.name
        if place in sources:
            continue
        sources[place] = source = read(path, package)
        files.append(path)
        if _is_followed(path, package) or path == paper.resolve():
            waiting += [file for name in source.uses if (file := _module_file(name.split("."), package)) is not None]
    # Places do not count, so that a file may move; two equal files count once.
    codes = sorted({source.code for source in sources.values()})
    return Fingerprint(code=_sha("\n".join(codes).encode()), sources=dict(sorted(sources.items())), files=tuple(files))


def read(path: Path, package: Path = PACKAGE) -> Source:
    """Hashes and followed imports of one file."""
    return _read(path, path.stat().st_mtime_ns, package)


@cache
def _read(path: Path, modified: int, package: Path) -> Source:  # many papers share a file
    content = path.read_bytes()
    text = _sha(content)
    if text not in _known:
        try:
            tree = ast.parse(content)
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{path} is not Python that can be read: {error}") from error
        uses = tuple(sorted(set(_followed_imports(tree, path, package))))
        _known[text] = Source(text=text, code=code_hash(tree), uses=uses)
    return _known[text]


def code_hash(tree: ast.Module) -> str:
    """Hash of what a module computes."""
    text: list[str] = []
    _write(tree, text)
    return _sha("".join(text).encode())


def defining_file(name: str, package: Path = PACKAGE) -> Path:
    """File that defines a dotted name such as "paperworks.nn.norm.RMSNorm"; what a package offers is followed.

    Raises ValueError where no file of the package does.
    """
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        file = _module_file(parts[:length], package)
        if file is None:
            continue
        if length < len(parts) and file.name == "__init__.py":
            offered = _offered_by(file, parts[length], parts[:length], package)
            if offered is not None:
                return offered
        return file
    raise ValueError(
        f"{name!r} is in no file of {package}; name a part that exists, such as paperworks.nn.norm.RMSNorm"
    )


def _module_file(parts: Sequence[str], package: Path) -> Path | None:
    if not parts or parts[0] != package.name:
        return None
    base = package.joinpath(*parts[1:])
    if len(parts) > 1 and (module := base.with_name(f"{base.name}.py")).is_file():
        return module
    return init if (init := base / "__init__.py").is_file() else None


def _offered_by(file: Path, wanted: str, parts: Sequence[str], package: Path) -> Path | None:
    """The file from which a package's `__init__.py` imports a name."""
    original = _imported_names(file, file.stat().st_mtime_ns, tuple(parts)).get(wanted, "")
    return defining_file(original, package) if original.partition(".")[0] == package.name else None


@cache
def _imported_names(file: Path, modified: int, parts: tuple[str, ...]) -> dict[str, str]:
    """Names that an `__init__.py` imports, with the dotted names they have where they are defined."""
    imports = [node for node in ast.parse(file.read_bytes()).body if isinstance(node, ast.ImportFrom)]
    return {
        alias.asname or alias.name: f"{_absolute(node, parts, is_package=True)}.{alias.name}"
        for node in imports
        for alias in node.names
    }


def _is_followed(path: Path, package: Path) -> bool:
    return any(path.is_relative_to(package / folder) for folder in FOLLOWED)


def _followed_imports(tree: ast.Module, path: Path, package: Path) -> Iterator[str]:
    """Dotted names of the modules of papers and testbeds that a file imports, anywhere in it."""
    place = path.relative_to(package).with_suffix("").parts if path.is_relative_to(package) else ()
    here = (package.name, *(place[:-1] if place and place[-1] == "__init__" else place))
    starts = tuple(f"{package.name}.{folder}." for folder in FOLLOWED)
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(node, here, is_package=path.name == "__init__.py")
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith(starts):
                yield _dotted(defining_file(name, package), package)


def _dotted(file: Path, package: Path) -> str:
    parts = file.relative_to(package).with_suffix("").parts
    return ".".join((package.name, *(parts[:-1] if parts[-1] == "__init__" else parts)))


def _absolute(node: ast.ImportFrom, here: Sequence[str], *, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    base = list(here[: len(here) - node.level + (1 if is_package else 0)])
    return ".".join([*base, *([node.module] if node.module else [])])


# Words, places and versions of Python: none of them changes what is computed.
_NOT_COUNTED = frozenset(
    {"ctx", "kind", "annotation", "returns", "type_comment", "type_params", "type_ignores", "simple"}
)


def _write(node: ast.AST, into: list[str]) -> None:
    """Append a tree as text; trees that compute the same give the same text.

    Written here and not by `ast.dump`, whose text differs between versions of Python.
    """
    into.append(f"{type(node).__name__}(")
    for name, value in ast.iter_fields(node):
        if name in _NOT_COUNTED:
            continue
        if isinstance(value, ast.AST):
            into.append(f"{name}=")
            _write(value, into)
        elif isinstance(value, list):
            elements = [kept for element in value if (kept := _counted(element, node)) is not None]
            if elements:
                into.append(f"{name}=[")
                for element in elements:
                    if isinstance(element, ast.AST):
                        _write(element, into)
                    else:
                        into.append(repr(element))
                into.append("]")
        elif value is not None:
            into.append(f"{name}={value!r}")
    into.append(")")


def _counted(element: object, parent: ast.AST) -> object | None:
    """An element of a list in the tree as it counts, None where it does not."""
    match element:
        case ast.Expr(value=ast.Constant(value=str())):  # a docstring, or a string that stands alone
            return None
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            # The module's place does not count, but `gelu as activation` must differ from `relu as activation`.
            renamed = [alias for alias in names if alias.asname not in (None, alias.name.rpartition(".")[2])]
            pairs: list[ast.expr] = [ast.Constant(f"{alias.name} as {alias.asname}") for alias in renamed]
            return ast.Tuple(elts=pairs) if pairs else None
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return None
        case ast.AnnAssign(target=target, value=value) if not isinstance(parent, ast.ClassDef):
            return None if value is None else ast.Assign(targets=[target], value=value)
        case ast.Assign(targets=[ast.Name(id="__all__")]):
            return None
        case ast.Assign(targets=[ast.Name(id="paper")], value=ast.Call(func=ast.Name(id="Paper"))):
            return None
        case ast.Call(func=ast.Attribute(value=ast.Name(id="paper"), attr="claim"), keywords=keywords):
            # Of a claim's decorator only the kind decides how it is judged.
            return ast.Call(
                func=ast.Name(id="claim"), args=[], keywords=[word for word in keywords if word.arg == "kind"]
            )
    return element


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
