"""The library part imports torch, zlib-ng and the standard library when it is imported, and nothing else.

Looked at: `smidgen/__init__.py`, `adapters.py`, `conversion.py`, `core/`, `methods/` and `formats/`. An import inside a
function costs nothing until it is called, and one under `if TYPE_CHECKING` costs nothing at all: both are allowed.
(Which part of smidgen may import which is import-linter's business; it cannot tell the two kinds of import apart.)
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "smidgen"
LIBRARY = ("__init__.py", "adapters.py", "conversion.py", "core", "methods", "formats")
ALLOWED = {"torch", "zlib_ng", "smidgen"} | sys.stdlib_module_names


def run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes under `node` that run when the file is imported: all but bodies of functions and of TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from run_on_import(child)


def imported(node: ast.AST) -> list[str]:
    """The modules that one import statement names; none for any other node, or for a relative import."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        return [node.module]
    return []


def foreign_imports(file: Path) -> list[str]:
    """One line for each import in `file` that is not allowed."""
    return [
        f'{file.relative_to(PACKAGE.parent)}:{getattr(node, "lineno", 0)}: imports "{module}" when it is imported; '
        "move it into the function that uses it"
        for node in run_on_import(ast.parse(file.read_text()))
        for module in imported(node)
        if module.split(".")[0] not in ALLOWED
    ]


def main() -> None:
    parts = [PACKAGE / part for part in LIBRARY]
    files = [file for part in parts for file in (sorted(part.rglob("*.py")) if part.is_dir() else [part])]
    problems = [problem for file in files for problem in foreign_imports(file)]
    print("\n".join(problems) or f"{len(files)} files of the library import torch, zlib-ng and Python's own")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
