"""Which files of a folder a review reads, and why it leaves out the others."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

from weft_protocols.errors import UsageError

SUFFIXES: Final = (".py", ".pyw")
MAX_BYTES: Final = 1_000_000
"""Size of a file above which it is taken for generated data."""
MAX_FILES: Final = 2_000
"""Files of one review; the rest is left out, and the report says so."""
TASKS: Final = 120
"""Tasks that one review is split into at most."""

_VENDORED: Final = frozenset({"node_modules", "site-packages", "vendor", "vendored", "_vendor", "third_party"})
_GENERATED: Final = frozenset({"build", "dist", "htmlcov"})
_HEAD: Final = 8_192


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to be reviewed."""

    path: str
    """Relative to the survey's root, with `/`."""
    size: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file or folder that is not reviewed, and the reason in a few words."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Survey:
    """What a walk found."""

    root: str
    """Absolute path of the folder."""
    files: tuple[SourceFile, ...]
    skipped: tuple[Skipped, ...] = ()
    others: int = 0
    """Files in other languages and formats."""
    folders: int = 0

    def to_json(self) -> dict[str, Any]:
        """The survey as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The survey that `to_json` wrote."""
        return cls(
            root=value["root"],
            files=tuple(SourceFile(file["path"], int(file["size"])) for file in value["files"]),
            skipped=tuple(Skipped(item["path"], item["reason"]) for item in value["skipped"]),
            others=int(value["others"]),
            folders=int(value["folders"]),
        )


def survey(path: Path, *, max_files: int = MAX_FILES) -> Survey:
    """The Python files of a folder, or the one file that is named.

    Folders of tools, of dependencies and of build results are not walked; links are not followed out of the
    root. Binary, unreadable and oversized files are listed as skipped.

    Raises:
        UsageError: the path does not exist, cannot be read, or is a file of another kind.
    """
    try:
        root = path.expanduser().resolve(strict=True)
        mode = root.stat().st_mode
    except (OSError, RuntimeError) as error:
        raise UsageError(f"cannot review {printable(path)}: {_why(error)}; name a folder or a .py file") from error
    if printable(root) != str(root):
        raise UsageError(f"cannot review {printable(root)}: its path cannot be printed; rename it")
    if stat.S_ISDIR(mode):
        return _walk(root, max_files)
    if root.suffix not in SUFFIXES:
        raise UsageError(f"{printable(path)} is not a Python file; name a folder or a .py file")
    found = _examine(root, root.name)
    if isinstance(found, Skipped):
        return Survey(str(root.parent), (), (found,))
    return Survey(str(root.parent), (found,))


def batches(files: Sequence[SourceFile], *, most: int = TASKS) -> list[list[str]]:
    """The paths in at most `most` groups of similar size, one file a group where that suffices."""
    if len(files) <= most:
        return [[file.path] for file in files]
    groups: list[list[str]] = [[] for _ in range(most)]
    weights = [0] * most
    for file in sorted(files, key=lambda file: (-file.size, file.path)):
        lightest = weights.index(min(weights))
        groups[lightest].append(file.path)
        # A file costs something even when it is empty.
        weights[lightest] += file.size + 500
    return [sorted(group) for group in groups]


def printable(path: Path | str) -> str:
    """A path as text that can be stored and shown, also where its name is not valid Unicode."""
    text = os.fspath(path)
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _walk(root: Path, max_files: int) -> Survey:
    files: list[SourceFile] = []
    skipped: list[Skipped] = []
    others = folders = 0

    def unreadable(error: OSError) -> None:
        skipped.append(Skipped(_relative(root, Path(error.filename or root)) + "/", _why(error)))

    for folder, names, leaves in os.walk(root, onerror=unreadable):
        folders += 1
        here = Path(folder)
        skipped.extend(_prune(root, here, names))
        for name in sorted(leaves):
            if not name.endswith(SUFFIXES):
                others += 1
                continue
            found = _examine(here / name, _relative(root, here / name))
            if isinstance(found, Skipped):
                skipped.append(found)
            else:
                files.append(found)
    files.sort(key=lambda file: file.path)
    if len(files) > max_files:
        reason = f"{len(files) - max_files} files beyond the first {max_files}: name a subfolder to review them"
        skipped.append(Skipped(f"{files[max_files].path} …", reason))
    return Survey(str(root), tuple(files[:max_files]), tuple(skipped), others, folders)


def _prune(root: Path, here: Path, names: list[str]) -> Iterator[Skipped]:
    """Takes out of `names`, in place, the folders that are not walked."""
    for name in sorted(names):
        folder = here / name
        reason = _reason_not_to_walk(folder)
        if reason is not None:
            names.remove(name)
            if reason:
                yield Skipped(_relative(root, folder) + "/", reason)
    names.sort()


def _reason_not_to_walk(folder: Path) -> str | None:
    """Why a folder is left out: None to walk it, empty where it is not worth a line in the report."""
    name = folder.name
    if name == "__pycache__" or name.endswith(".egg-info"):
        return ""
    if folder.is_symlink():
        return "a link"
    if (folder / "pyvenv.cfg").exists():
        return "a virtual environment"
    if name.startswith("."):
        return "hidden"
    if name in _VENDORED:
        return "vendored"
    if name in _GENERATED and not (folder / "__init__.py").exists():
        return "generated"
    return None


def _examine(path: Path, shown: str) -> SourceFile | Skipped:
    try:
        if path.is_symlink():
            return Skipped(shown, "a link")
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return Skipped(shown, "not a regular file")
        if status.st_size > MAX_BYTES:
            return Skipped(shown, f"{status.st_size / 1e6:.1f} MB, more than a review reads")
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        return Skipped(shown, _why(error))
    if b"\0" in head:
        return Skipped(shown, "binary")
    if shown != os.fspath(path)[-len(shown) :]:
        return Skipped(shown, "its name cannot be printed")
    return SourceFile(shown, status.st_size)


def _relative(root: Path, path: Path) -> str:
    try:
        return printable(path.relative_to(root).as_posix())
    except ValueError:
        return printable(path)


def _why(error: OSError | RuntimeError) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file or folder"
    if isinstance(error, PermissionError):
        return "permission denied"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error).lower() or type(error).__name__
