"""The model files of mlx-lm, read as text: which architectures a release has, and what they read."""

from __future__ import annotations

import ast
import importlib.util
import sys
import threading
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from parity.errors import UsageError


@dataclass(frozen=True)
class Field:
    """A setting that a model file declares: its name, and its default where that is a plain value."""

    name: str
    default: Any = None
    required: bool = False
    kind: str = ""
    """Its annotation as it is written."""
    file: str = ""
    """The name of the file in which it stands."""


@dataclass(frozen=True)
class Sources:
    """mlx-lm as it lies in a folder; nothing of it is imported."""

    folder: Path

    @cached_property
    def renamed(self) -> dict[str, str]:
        """Model types that are served by the file of another."""
        file = self.folder / "utils.py"
        for node in parsed(file).body if file.is_file() else ():
            if isinstance(node, ast.Assign):
                names = [t.id for t in node.targets if isinstance(t, ast.Name)]
                if "MODEL_REMAPPING" in names:
                    found: dict[str, str] = ast.literal_eval(node.value)
                    return found
        return {}

    @cached_property
    def files(self) -> dict[str, Path]:
        """Model type → file, of files that define a model and its settings."""
        return {
            file.stem: file
            for file in sorted((self.folder / "models").glob("*.py"))
            if {"Model", "ModelArgs"} <= _names(file)
        }

    def file(self, kind: str) -> Path | None:
        """The file that serves a model type."""
        return self.files.get(self.renamed.get(kind, kind))

    def fields(self, kind: str) -> list[Field]:
        """Settings that the file of a model type declares, those of files that it imports as well."""
        file = self.file(kind)
        seen: dict[str, Field] = {}
        for place, text in _with_imports(file, set()) if file else ():
            for node in ast.walk(text):
                if isinstance(node, ast.ClassDef) and node.name.endswith(("Args", "Config")):
                    for line in node.body:
                        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                            field = _field(line, place.name)
                            seen.setdefault(field.name, field)
        return list(seen.values())

    def own_fields(self, kind: str) -> list[Field]:
        """Settings that `ModelArgs` of the file itself declares."""
        file = self.file(kind)
        for node in parsed(file).body if file else ():
            if isinstance(node, ast.ClassDef) and node.name == "ModelArgs":
                return [
                    _field(line, file.name if file else "")
                    for line in node.body
                    if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
                ]
        return []

    def words(self, kind: str) -> set[str]:
        """Names and text constants in the file of a model type and in those that it imports."""
        found: set[str] = set()
        file = self.file(kind)
        for _, tree in _with_imports(file, set()) if file else ():
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
                elif isinstance(node, ast.Attribute):
                    found.add(node.attr)
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    found.add(node.target.id)
        return found

    def compared(self, kind: str) -> dict[str, list[str]]:
        """Setting → texts that the file of a model type, or one that it imports, compares it with.

        One that is declared and nowhere read has the empty text: any would do.
        """
        found: dict[str, list[str]] = {}
        file, read = self.file(kind), set[str]()
        for _, tree in _with_imports(file, set()) if file else ():
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute):
                    read.add(node.attr)
                if not isinstance(node, ast.Compare):
                    continue
                sides = [node.left, *node.comparators]
                names = [s.attr for s in sides if isinstance(s, ast.Attribute)]
                texts = [s.value for s in sides if isinstance(s, ast.Constant)]
                for name in names:
                    found.setdefault(name, []).extend(t for t in texts if isinstance(t, str))
        return found | {f.name: [""] for f in self.fields(kind) if f.name not in read}

    def place(self, kind: str, word: str) -> str:
        """`models/llama.py, line 12: ...` of the first line that names a word; empty if none does."""
        file = self.file(kind)
        if file is None:
            return ""
        for number, line in enumerate(file.read_text("utf-8").splitlines(), start=1):
            if word in line:
                return f"models/{file.name}, line {number}: `{line.strip()}`"
        return ""


_PARSING = threading.Lock()


def parsed(file: Path) -> ast.Module:
    """The syntax tree of a file; Python 3.11 cannot parse in two threads at once."""
    with _PARSING:
        return _tree(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=1024)
def _tree(file: Path, changed: int) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


def of_python(python: Path | str) -> Sources:
    """mlx-lm as an interpreter of the environment cache has it, or this one.

    Raises:
        UsageError: It has none.
    """
    if str(python) == sys.executable:
        spec = importlib.util.find_spec("mlx_lm")
        if spec is None or spec.origin is None:
            raise UsageError("mlx-lm is not installed here: pip install mlx-lm")
        return Sources(Path(spec.origin).parent)
    for folder in Path(python).resolve().parent.glob("lib/python*/site-packages/mlx_lm"):
        return Sources(folder)
    raise UsageError(f"no mlx-lm beside {python}")


def _names(file: Path) -> set[str]:
    tree = parsed(file)
    found = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def _with_imports(file: Path, seen: set[Path]) -> list[tuple[Path, ast.Module]]:
    """A file and the model files that it imports from its own folder, with their trees."""
    if file in seen or not file.is_file():
        return []
    seen.add(file)
    tree = parsed(file)
    found = [(file, tree)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            for name in names:
                found += _with_imports(file.parent / f"{name}.py", seen)
    return found


def _field(line: ast.AnnAssign, file: str) -> Field:
    assert isinstance(line.target, ast.Name)
    try:
        default = ast.literal_eval(line.value) if line.value is not None else None
    except ValueError:
        default = None
    return Field(line.target.id, default, line.value is None, ast.unparse(line.annotation), file)
