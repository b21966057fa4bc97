"""Parts of a run by name: built-in ones, and those of other people's packages and files.

A name in the settings is one of

    scrub                       a key of the table of built-in parts, whose module is imported only now
    dissolve                    the name of an entry point of the group, such as `distunlearn.methods`
    package.module:Name         a part of an installed package
    path/to/file.py:Name        a part of that file

The current folder is never searched: with `python -m distunlearn` it is on `sys.path`, and a file that happens to lie
there would run as if it were installed.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import site
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from distunlearn.common.text import printable
from distunlearn.errors import ConfigError

PACKAGE = __name__.split(".")[0]
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


class Outside(NamedTuple):
    """Code from outside this package: the package or file that was named, where it lies, sha256 (hex) of its source."""

    name: str
    file: str
    sha256: str


OBJECT = "object:"  # what begins the name of a part that no other process can find
_GIVEN: dict[str, Any] = {}  # parts that Python has handed over, by name
_OUTSIDE: dict[str, Path] = {}  # top-level package, module or file -> its folder or file


def resolve(
    name: str, builtin: Mapping[str, str], base: type | str | None, group: str, key: str = "", *, counted: bool = True
) -> Any:
    """The class that `name` means.

    Args:
        name: see the module's text.
        builtin: `package.module:Name` by name.
        base: the class it must be a subclass of, or `package.module:Name` of that class; None: any callable will do.
        group: of entry points.
        key: the setting that has the name, for messages.
        counted: whether `loaded` tells of it. Not of what only makes data, whose digests say more (`origin`).

    Raises:
        ConfigError: there is no such part, it cannot be imported, or it is not a complete subclass of `base`.
    """
    where = f"{key}=" if key else ""
    shown = f"{where}{printable(str(name), 80)}"
    before = dict(_OUTSIDE)
    if isinstance(name, str) and name in _GIVEN:
        found = _GIVEN[name]
        remember(found)
    elif isinstance(name, str) and name in builtin:
        found = _attribute(importlib.import_module(builtin[name].partition(":")[0]), builtin[name], shown)
    elif isinstance(name, str) and ":" in name:
        found = _from_outside(name, shown)
    else:
        points = _points(group, tuple(sys.path)) if isinstance(name, str) else {}
        if name not in points:
            raise ConfigError(f"{shown} is not known; {_hint(str(name), [*builtin, *points])}")
        found = _from_outside(points[name].partition("[")[0].replace(" ", ""), shown)
    if not counted:
        _OUTSIDE.clear()
        _OUTSIDE.update(before)
    return _checked(found, base, shown)


def names(builtin: Mapping[str, str], group: str) -> list[str]:
    """Every name that needs no path: built-in parts, then entry points of the group."""
    return [*builtin, *sorted(_points(group, tuple(sys.path)).keys() - set(builtin))]


@functools.cache  # every installed package's files are read for it, and a run asks some fifty times
def _points(group: str, path: tuple[str, ...]) -> dict[str, str]:
    """Values of a group's entry points by name, as they are found on `path`, which is `sys.path`."""
    return {point.name: point.value for point in importlib.metadata.entry_points(group=group)}


def start_anew() -> None:
    """Count from here on: `loaded` tells of one run, and a process may have made another before."""
    _OUTSIDE.clear()


def loaded() -> list[Outside]:
    """What `resolve` has taken from outside this package since `start_anew`, by name.

    The digest of a package is over the names and bytes of all its Python files, so that a change in a module that the
    named one imports is noticed too.
    """
    return [Outside(name, str(path), _digest(path)) for name, path in sorted(_OUTSIDE.items())]


def name_of(part: Any) -> str:
    """A name by which `resolve` finds a class or function that Python has handed over.

    Of an installed package, or of a file, it is one that other processes can resolve too; of a notebook's cell or of a
    function inside another it begins with `object:` and is this process's own.
    """
    module, path = sys.modules.get(part.__module__), getattr(part, "__qualname__", type(part).__name__)
    file = getattr(module, "__file__", None)
    name = f"{OBJECT}{path.rpartition('.')[2]}"
    with contextlib.suppress(AttributeError):
        if module is not None and file is not None and functools.reduce(getattr, path.split("."), module) is part:
            inside = "." in module.__name__ or hasattr(module, "__path__") or not file.endswith(".py")
            name = f"{module.__name__ if inside else Path(file).resolve()}:{path}"
    _GIVEN[name] = part
    return name


def origin(part: Any) -> Outside | None:
    """Where a class or function comes from; None: from this package, or from no file (a notebook's cell)."""
    before = dict(_OUTSIDE)
    _OUTSIDE.clear()
    remember(part)
    found = loaded()
    _OUTSIDE.clear()
    _OUTSIDE.update(before)
    return found[0] if found else None


def remember(thing: Any) -> None:
    """Count the file that defines a class or function, handed over as an object, among what is from outside.

    Without a file (a notebook's cell) there is nothing to remember.
    """
    module = sys.modules.get(getattr(thing, "__module__", None) or "")
    file = getattr(module, "__file__", None)
    top = module.__name__.split(".")[0] if module is not None else PACKAGE
    if module is None or file is None or top in (PACKAGE, "torch") or not Path(file).is_file():
        return
    if module.__name__ != top or not file.endswith(".py"):
        _installed_at(top)
    else:
        _OUTSIDE[str(Path(file).resolve())] = Path(file).resolve()


def _hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    others = "package.module:Name or path/to/file.py:Name"
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}, or {others}"


def _from_outside(name: str, shown: str) -> Any:
    place, _, _ = name.rpartition(":")
    if name.startswith(OBJECT):
        raise ConfigError(
            f"{shown} was handed over from Python and is not known to this process; call distunlearn.unlearn again "
            "with it, or name it as package.module:Name or path/to/file.py:Name."
        )
    try:
        module = _file(place, shown) if place.endswith(".py") else _installed(place, shown)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{shown} cannot be imported: {type(error).__name__}: {printable(str(error), 200)}; correct that code."
        ) from error
    return _attribute(module, name, shown)


def _file(place: str, shown: str) -> ModuleType:
    path = Path(place).expanduser()
    if not path.is_file():
        raise ConfigError(f"{shown} names the file {printable(place, 120)}, which does not exist; check the path.")
    path = path.resolve()
    name = f"{PACKAGE}_file_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None, "a .py file has a loader"
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pickle look their module up
        try:
            with _without_current_folder():
                spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    _OUTSIDE[str(path)] = path
    return sys.modules[name]


def _installed(place: str, shown: str) -> ModuleType:
    if not DOTTED.fullmatch(place):
        raise ConfigError(f"{shown} is not a name; expected package.module:Name or path/to/file.py:Name.")
    top = place.partition(".")[0]
    with _without_current_folder():
        importlib.invalidate_caches()
        found = next(filter(None, (finder.find_spec(top, None) for finder in sys.meta_path)), None)
        known = getattr(sys.modules.get(top), "__spec__", found)  # the program may have imported another one
        if found is None or found.origin != getattr(known, "origin", None):
            raise ConfigError(
                f"{shown} names the package {top}, which is not installed (the current folder is not searched); "
                "install it, or name the file as path/to/file.py:Name."
            )
        module = importlib.import_module(place)
    _installed_at(top)
    return module


def _installed_at(top: str) -> None:
    spec = getattr(sys.modules.get(top), "__spec__", None)
    if top != PACKAGE and spec is not None and spec.origin not in (None, "built-in", "frozen"):
        origin = Path(spec.origin).resolve()
        _OUTSIDE[top] = origin.parent if spec.submodule_search_locations else origin


def _attribute(module: ModuleType, name: str, shown: str) -> Any:
    attribute = name.rpartition(":")[2]
    try:
        return functools.reduce(getattr, attribute.split("."), module)
    except AttributeError:
        public = [key for key in vars(module) if not key.startswith("_")]
        close = difflib.get_close_matches(attribute, public, n=1)
        hint = f"; did you mean {close[0]}?" if close else "; check the name after the colon."
        raise ConfigError(f"{shown} names {printable(attribute, 60)!r}, which its module does not have{hint}") from None


def _checked(found: Any, base: type | str | None, shown: str) -> Any:
    if base is None:
        if not callable(found):
            raise ConfigError(f"{shown} is {type(found).__name__}, expected a class or a function.")
        return found
    if isinstance(base, str):
        module, _, attribute = base.partition(":")
        base = getattr(importlib.import_module(module), attribute)
    assert isinstance(base, type)
    expected = f"{base.__module__}.{base.__qualname__}"
    if not isinstance(found, type) or not issubclass(found, base):
        raise ConfigError(f"{shown} is no subclass of {expected}; derive the class from it.")
    if inspect.isabstract(found):
        lacking = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise ConfigError(f"{shown} does not define {lacking}, which {expected} leaves to it; define it.")
    return found


@contextlib.contextmanager
def _without_current_folder() -> Iterator[None]:
    """Within it the current folder is not on `sys.path`, unless a package is installed from there (editable)."""
    here, before = Path.cwd(), list(sys.path)
    if here not in _editable():
        sys.path[:] = [entry for entry in before if Path(entry or ".").resolve() != here]
    left = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = [*before, *(entry for entry in sys.path if entry not in left)]


def _editable() -> set[Path]:
    """Folders that `.pth` files of the installation put on `sys.path`."""
    folders = set()
    for folder in {*site.getsitepackages(), site.getusersitepackages()}:
        for path in Path(folder).glob("*.pth"):
            with contextlib.suppress(OSError, UnicodeDecodeError):
                lines = path.read_text(encoding="utf-8").splitlines()
                folders |= {Path(line).resolve() for line in lines if line.strip() and not line.startswith("import")}
    return folders


def _digest(path: Path) -> str:
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    total = hashlib.sha256()
    for file in sorted(path.rglob("*.py")):
        total.update(f"{file.relative_to(path).as_posix()}\0".encode())
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()
