"""Risky and error-prone constructs, one check each, on the nodes of a syntax tree.

A check is registered for the node types it looks at and yields findings. Names are resolved through the
file's imports, so that `from subprocess import run as r` and `import subprocess as sp` are both seen.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of finding."""

    name: str
    severity: str
    """`high`, `medium` or `low`."""
    title: str
    advice: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One place in a file."""

    kind: str
    """A key of `KINDS`."""
    line: int
    detail: str = ""


SEVERITIES: Final = ("high", "medium", "low")
KINDS: Final[dict[str, Kind]] = {
    kind.name: kind
    for kind in (
        Kind("eval", "high", "eval or exec", "parse the input, or look it up in a table"),
        Kind("shell", "high", "command through a shell", "pass a list of arguments and no shell"),
        Kind("unpickle", "high", "deserialisation that can run code", "read JSON or msgpack from outside"),
        Kind("yaml-load", "high", "yaml.load without a safe loader", "use yaml.safe_load"),
        Kind("tls-off", "high", "certificate check switched off", "trust the right authority instead"),
        Kind("sql-text", "high", "SQL built from strings", "use bound parameters"),
        Kind("secret", "high", "secret in the source", "read it from the environment or a secret store"),
        Kind("bare-except", "medium", "bare except", "name the exceptions that can be handled"),
        Kind(
            "broad-except",
            "medium",
            "broad except that ends the error",
            "name the exceptions, or raise again",
        ),
        Kind(
            "mutable-default",
            "medium",
            "mutable default argument",
            "default to None, or to an immutable value",
        ),
        Kind("no-timeout", "medium", "network call without a timeout", "pass a timeout"),
        Kind("blocking", "medium", "blocking call in an async function", "await an async one, or use a thread"),
        Kind("temp-name", "medium", "guessable temporary file", "use tempfile.NamedTemporaryFile or mkdtemp"),
        Kind("weak-hash", "low", "weak hash", "use SHA-256, or say usedforsecurity=False"),
        Kind("assert", "low", "assert outside tests", "raise an error: python -O removes asserts"),
        Kind("star-import", "low", "star import", "import the names that are used"),
    )
}
"""Every kind of finding by name, most severe first."""


@dataclass(frozen=True, slots=True)
class Scope:
    """Where a node stands."""

    names: Mapping[str, str]
    """Local name to the dotted name it was imported as."""
    roots: frozenset[str] = frozenset()
    """Top-level packages among the imports."""
    is_test: bool = False
    path: tuple[str, ...] = ()
    in_class: bool = False
    in_function: bool = False
    in_async: bool = False

    @classmethod
    def of_file(cls, tree: ast.Module, *, is_test: bool) -> Scope:
        """The scope of a file's own level."""
        names = import_names(tree)
        return cls(names, frozenset(full.partition(".")[0] for full in names.values()), is_test)

    def imports(self, name: str) -> bool:
        """Whether a dotted name comes from an import of this file, rather than from a local variable."""
        return name.partition(".")[0] in self.roots

    def inside(self, name: str, *, function: bool = False, is_async: bool = False) -> Scope:
        """The scope of the body of a class or function called `name`."""
        return replace(
            self,
            path=(*self.path, name),
            in_class=not function,
            in_function=function or self.in_function,
            in_async=is_async,
        )

    def qualified(self, name: str) -> str:
        """`name` with the classes and functions around it."""
        return ".".join((*self.path, name))

    def is_public(self, name: str) -> bool:
        """Whether `name`, defined here, belongs to the file's public interface."""
        return not self.in_function and not any(part.startswith("_") for part in (*self.path, name))


Check = Callable[[ast.AST, Scope], Iterator[Finding]]
_CHECKS: Final[dict[type[ast.AST], list[Check]]] = {}

_SHELLS: Final = frozenset({"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"})
_UNPICKLERS: Final = frozenset(
    f"{module}.{name}"
    for module in ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal")
    for name in ("load", "loads", "Unpickler")
) | {"shelve.open", "joblib.load", "pandas.read_pickle", "jsonpickle.decode"}
_SAFE_LOADERS: Final = frozenset({"SafeLoader", "CSafeLoader", "BaseLoader", "CBaseLoader"})
_HTTP_VERBS: Final = frozenset({"get", "post", "put", "patch", "delete", "head", "options", "request"})
_CLIENTS: Final = frozenset({"requests", "httpx"})
_WAITING_FOR_EVER: Final = frozenset({"urllib.request.urlopen", *(f"requests.{verb}" for verb in _HTTP_VERBS)})
_TAKE_VERIFY: Final = _HTTP_VERBS | {"Client", "AsyncClient", "Session", "stream"}
_BLOCKING: Final = frozenset({
    "time.sleep", "os.system", "os.popen", "os.wait", "os.waitpid", "subprocess.run", "subprocess.call",
    "subprocess.check_call", "subprocess.check_output", "urllib.request.urlopen", "socket.create_connection",
    *(f"{client}.{verb}" for client in _CLIENTS for verb in _HTTP_VERBS),
})  # fmt: skip
_SECRET_NAME: Final = re.compile(
    r"(?:^|_)(?:password|passwd|pwd|passphrase|secret|secret_?key|api_?key|apikey|access_?key|private_?key|"
    r"auth_?token|access_?token|client_?secret)$",
    re.IGNORECASE,
)
_PLACEHOLDER: Final = re.compile(
    r"[<${\[(*%]|\.\.\.|^(x+|your|change|example|test|dummy|none|null|todo)", re.IGNORECASE
)
_SQL: Final = re.compile(
    r"\s*(select\s.+\sfrom|insert\s+into|update\s.+\sset|delete\s+from|drop\s+table)\b", re.I | re.S
)


def checks_for(node: ast.AST) -> list[Check]:
    """The checks that look at nodes of this type."""
    return _CHECKS.get(type(node), [])


def import_names(tree: ast.Module) -> dict[str, str]:
    """Local name to dotted name, for everything the file imports anywhere."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname:
                    names[alias.asname] = alias.name
                else:
                    top = alias.name.partition(".")[0]
                    names[top] = top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def dotted(node: ast.expr, names: Mapping[str, str]) -> str:
    """The dotted name an expression stands for, resolved through the imports; empty if it is not a name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    parts.append(names.get(node.id, node.id))
    return ".".join(reversed(parts))


def _check(*types: type[ast.AST]) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        for node_type in types:
            _CHECKS.setdefault(node_type, []).append(check)
        return check

    return register


def _keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)


def _is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@_check(ast.Call)
def _evaluation(node: ast.AST, scope: Scope) -> Iterator[Finding]:
    match node:
        case ast.Call(func=ast.Name(id="eval" | "exec" as name), args=[first, *_]) if name not in scope.names:
            if not isinstance(first, ast.Constant):
                yield Finding("eval", node.lineno, f"{name}({_brief(first)})")


@_check(ast.Call)
def _named_calls(node: ast.AST, scope: Scope) -> Iterator[Finding]:
    """Calls of something imported: one look-up of the name for all that depends on it."""
    if isinstance(node, ast.Call) and (name := dotted(node.func, scope.names)) and scope.imports(name):
        for kind, is_risky in _NAMED.items():
            if is_risky(name, node, scope):
                argument = _brief(node.args[0]) if node.args and kind == "shell" else ""
                yield Finding(kind, node.lineno, f"{name}({argument})")


def _through_a_shell(name: str, call: ast.Call, _: Scope) -> bool:
    return name in _SHELLS or (name.startswith("subprocess.") and _is_constant(_keyword(call, "shell"), True))


def _unsafe_yaml(name: str, call: ast.Call, scope: Scope) -> bool:
    if name in ("yaml.unsafe_load", "yaml.unsafe_load_all"):
        return True
    if name not in ("yaml.load", "yaml.load_all"):
        return False
    loader = _keyword(call, "Loader") or (call.args[1] if len(call.args) > 1 else None)
    return loader is None or dotted(loader, scope.names).rpartition(".")[2] not in _SAFE_LOADERS


def _without_timeout(name: str, call: ast.Call, _: Scope) -> bool:
    if name not in _WAITING_FOR_EVER or any(keyword.arg is None for keyword in call.keywords):
        return False
    timeout = _keyword(call, "timeout")
    # urlopen(url, data, timeout) takes it as its third argument too.
    by_position = name.endswith(".urlopen") and len(call.args) > 2
    return not by_position and (timeout is None or _is_constant(timeout, None))


def _weak_hash(name: str, call: ast.Call, _: Scope) -> bool:
    weak = name in ("hashlib.md5", "hashlib.sha1")
    return weak and not _is_constant(_keyword(call, "usedforsecurity"), False)


_NAMED: Final[dict[str, Callable[[str, ast.Call, Scope], bool]]] = {
    "shell": _through_a_shell,
    "unpickle": lambda name, call, scope: name in _UNPICKLERS,
    "yaml-load": _unsafe_yaml,
    "temp-name": lambda name, call, scope: name == "tempfile.mktemp",
    "weak-hash": _weak_hash,
    "no-timeout": _without_timeout,
    "blocking": lambda name, call, scope: scope.in_async and name in _BLOCKING,
    "tls-off": lambda name, call, scope: name == "ssl._create_unverified_context",
}
"""Which calls of an imported name are a finding, by kind."""


@_check(ast.Call)
def _unverified(node: ast.AST, scope: Scope) -> Iterator[Finding]:
    """`verify=False`, also on a session or client that is a local variable."""
    match node:
        case ast.Call(func=ast.Attribute(attr=name)) if name in _TAKE_VERIFY:
            if _is_constant(_keyword(node, "verify"), False):
                yield Finding("tls-off", node.lineno, f"{name}(verify=False)")


@_check(ast.Call)
def _sql(node: ast.AST, scope: Scope) -> Iterator[Finding]:
    match node:
        case ast.Call(func=ast.Attribute(attr="execute" | "executemany" | "executescript" as name), args=[first, *_]):
            if _SQL.match(_leading_text(first)):
                yield Finding("sql-text", node.lineno, f".{name}({_brief(first)})")


def _leading_text(node: ast.expr) -> str:
    """The literal text of a string that is put together from parts; empty for a whole literal."""
    match node:
        case ast.JoinedStr():
            # An f-string without values is a literal.
            if not any(isinstance(value, ast.FormattedValue) for value in node.values):
                return ""
            return "".join(str(v.value) if isinstance(v, ast.Constant) else " ? " for v in node.values)
        case ast.BinOp(left=ast.Constant(value=str() as text), op=ast.Mod()):
            return text
        case ast.BinOp(left=left, op=ast.Add()):
            inner = left.value if isinstance(left, ast.Constant) else _leading_text(left)
            return f"{inner} ? " if isinstance(inner, str) else ""
        case ast.Call(func=ast.Attribute(value=ast.Constant(value=str() as text), attr="format")):
            return text
    return ""


@_check(ast.ExceptHandler)
def _handlers(node: ast.AST, scope: Scope) -> Iterator[Finding]:
    if not isinstance(node, ast.ExceptHandler) or _raises(node):
        return
    if node.type is None:
        yield Finding("bare-except", node.lineno)
        return
    caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
    for name in (dotted(item, scope.names) for item in caught):
        if name in ("Exception", "BaseException"):
            yield Finding("broad-except", node.lineno, f"except {name}")


def _raises(handler: ast.ExceptHandler) -> bool:
    """Whether the handler always raises again: its last statement does."""
    return isinstance(handler.body[-1], ast.Raise)


@_check(ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
def _defaults(node: ast.AST, scope: Scope) -> Iterator[Finding]:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return
    for default in (*node.args.defaults, *node.args.kw_defaults):
        match default:
            case ast.List() | ast.Dict() | ast.Set() | ast.ListComp() | ast.DictComp() | ast.SetComp():
                yield Finding("mutable-default", default.lineno, _brief(default))
            case ast.Call(func=ast.Name(id="list" | "dict" | "set" | "bytearray")):
                yield Finding("mutable-default", default.lineno, _brief(default))


@_check(ast.Assert)
def _asserts(node: ast.AST, scope: Scope) -> Iterator[Finding]:
    if isinstance(node, ast.Assert) and not scope.is_test:
        yield Finding("assert", node.lineno, _brief(node.test))


@_check(ast.ImportFrom)
def _star_imports(node: ast.AST, scope: Scope) -> Iterator[Finding]:
    if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
        yield Finding("star-import", node.lineno, f"from {'.' * node.level}{node.module or ''} import *")


@_check(ast.Assign, ast.AnnAssign, ast.Dict, ast.Call, ast.FunctionDef, ast.AsyncFunctionDef)
def _secrets(node: ast.AST, scope: Scope) -> Iterator[Finding]:
    if scope.is_test:
        return
    for name, value in _named_values(node):
        if isinstance(value, ast.Constant) and isinstance(value.value, str) and _looks_secret(name, value.value):
            # The value itself stays out of the report.
            yield Finding("secret", value.lineno, f"{name} = …")


def _named_values(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    match node:
        case ast.Assign():
            for target in node.targets:
                yield _last_name(target), node.value
        case ast.AnnAssign(value=ast.expr() as value):
            yield _last_name(node.target), value
        case ast.Dict():
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    yield key.value, value
        case ast.Call():
            for keyword in node.keywords:
                yield keyword.arg or "", keyword.value
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            yield from _named_defaults(node.args)


def _named_defaults(arguments: ast.arguments) -> Iterator[tuple[str, ast.expr]]:
    positional = [*arguments.posonlyargs, *arguments.args]
    # Defaults belong to the last of the positional parameters.
    for argument, default in zip(reversed(positional), reversed(arguments.defaults), strict=False):
        yield argument.arg, default
    for argument, given in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if given is not None:
            yield argument.arg, given


def _last_name(target: ast.expr) -> str:
    match target:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Subscript(slice=ast.Constant(value=str() as name)):
            return name
    return ""


def _looks_secret(name: str, value: str) -> bool:
    if len(value) < 6 or any(c.isspace() for c in value) or not _SECRET_NAME.search(name):
        return False
    if _PLACEHOLDER.search(value) or value.startswith(("/", "http:", "https:", "env:")):
        return False
    # `PASSWORD_FIELD = "password"` and `API_KEY = "MY_API_KEY"` name a place, not a secret.
    return not _SECRET_NAME.search(value.replace("-", "_"))


def _brief(node: ast.AST | None, limit: int = 48) -> str:
    if node is None:
        return ""
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
