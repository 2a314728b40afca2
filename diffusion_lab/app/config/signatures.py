"""What a `_target_` accepts, read from source and never imported.

A config names classes and functions as dotted paths. Importing torch or lightning to look at one signature costs
seconds, and importing what a stranger's config names may run his code. So the path is followed in the source text: the
package is found without being imported, each module is parsed with `ast`, re-exports (`from x import y`, `import *`,
`y = z`) are followed to the definition, and the constructor is read off it: `__init__`, or the fields of a dataclass,
along the bases. Where the text does not tell (compiled code, metaclass tricks) the answer is "unknown", which callers
take as "accepted".
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """A module found on disk: dotted name, file, and folder if it is a package."""

    name: str
    file: Path
    folder: Path | None


@dataclass(frozen=True)
class Definition:
    """Where a dotted path ends: a class or function statement and the module that holds it."""

    module: Module
    node: ast.ClassDef | Function
    owner: ast.ClassDef | None = None

    @property
    def name(self) -> str:
        """The name in the source."""
        return self.node.name

    @property
    def path(self) -> str:
        """The dotted path of the definition itself, re-exports left behind."""
        inner = f"{self.owner.name}.{self.name}" if self.owner else self.name
        return f"{self.module.name}.{inner}"


@dataclass(frozen=True)
class Parameter:
    """One argument of a constructor or function."""

    name: str
    required: bool
    annotation: ast.expr | None


@dataclass(frozen=True)
class Signature:
    """The arguments a target accepts by keyword; `open` means that any name is taken (`**kwargs`)."""

    parameters: dict[str, Parameter]
    open: bool


class TargetNotFound(LookupError):
    """A dotted path that leads nowhere; `missing` is the part that fails, `options` what stands beside it."""

    def __init__(self, missing: str, options: list[str], holder: str) -> None:
        super().__init__(missing)
        self.missing, self.options, self.holder = missing, options, holder


@cache
def find_module(name: str) -> Module | None:
    """Find module `name` on disk without importing it or any of its parents, or return None."""
    head, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(head)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    if spec.origin is None and len(places) == 1 and places[0].is_dir():
        # a folder without __init__.py
        folder: Path | None = places[0]
        file = places[0] / "__init__.py"
    elif spec.origin is None or not spec.origin.endswith(".py"):
        return None
    else:
        file = Path(spec.origin)
        folder = file.parent if file.name == "__init__.py" else None
    for part in rest:
        if folder is None:
            return None
        if (folder / part / "__init__.py").is_file():
            folder = folder / part
            file = folder / "__init__.py"
        elif (folder / f"{part}.py").is_file():
            file, folder = folder / f"{part}.py", None
        elif (folder / part).is_dir():
            folder = folder / part
            file = folder / "__init__.py"
        else:
            return None
    return Module(name, file, folder)


@cache
def _tree(file: Path) -> ast.Module:
    # a folder without __init__.py is a package too
    return ast.parse(file.read_text(encoding="utf-8") if file.is_file() else "")


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module, those inside `if` and `try` included."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If):
            yield from _statements(statement.body)
            yield from _statements(statement.orelse)
        elif isinstance(statement, ast.Try):
            for part in (statement.body, *(handler.body for handler in statement.handlers), statement.orelse):
                yield from _statements(part)


def _import_base(module: Module, statement: ast.ImportFrom) -> str:
    """Return the absolute name of the module that `from ... import` reads."""
    if not statement.level:
        return statement.module or ""
    parts = module.name.split(".")
    # a package is its own first level, a plain module is not
    drop = statement.level - (1 if module.folder is not None else 0)
    base = parts[: len(parts) - drop] if drop else parts
    return ".".join([*base, statement.module] if statement.module else base)


def _dotted(expression: ast.expr) -> str | None:
    """Return `a.b.c` for a chain of names, else None."""
    if isinstance(expression, ast.Name):
        return expression.id
    if isinstance(expression, ast.Attribute):
        head = _dotted(expression.value)
        return f"{head}.{expression.attr}" if head else None
    return None


def _lookup(module: Module, name: str, seen: frozenset[tuple[str, str]]) -> Definition | Module | None:
    """Find what `name` is inside `module`: a definition, a module, or None."""
    if (module.name, name) in seen:
        return None
    seen = seen | {(module.name, name)}
    stars: list[str] = []
    found: Definition | Module | None = None
    # the last binding wins, as it does when the module runs
    for statement in _statements(_tree(module.file).body):
        hit: Definition | Module | None = None
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if statement.name == name:
                hit = Definition(module, statement)
        elif isinstance(statement, ast.ImportFrom):
            base = _import_base(module, statement)
            for alias in statement.names:
                if alias.name == "*":
                    stars.append(base)
                elif (alias.asname or alias.name) == name:
                    hit = _member(base, alias.name, seen)
        elif isinstance(statement, ast.Import):
            for alias in statement.names:
                if alias.asname == name:
                    hit = find_module(alias.name)
                elif alias.asname is None and alias.name.split(".")[0] == name:
                    hit = find_module(name)
        elif isinstance(statement, ast.Assign):
            names = [target.id for target in statement.targets if isinstance(target, ast.Name)]
            source = _dotted(statement.value)
            if name in names and source is not None:
                hit = _follow(module, source.split("."), seen)
        found = hit or found
    if found is not None:
        return found
    if module.folder is not None and (inner := find_module(f"{module.name}.{name}")):
        return inner
    for base in stars:
        if hit := _member(base, name, seen):
            return hit
    return None


def _member(base: str, name: str, seen: frozenset[tuple[str, str]]) -> Definition | Module | None:
    """Find `name` in the module called `base`: as an attribute first, then as a submodule."""
    holder = find_module(base)
    if holder is None:
        return None
    return _lookup(holder, name, seen) or find_module(f"{base}.{name}")


def _follow(
    module: Module, parts: list[str], seen: frozenset[tuple[str, str]] = frozenset()
) -> Definition | Module | None:
    """Follow a chain of attributes from inside `module`."""
    here: Definition | Module | None = module
    for part in parts:
        if isinstance(here, Module):
            here = _lookup(here, part, seen)
        elif isinstance(here, Definition) and isinstance(here.node, ast.ClassDef):
            here = _method(here, part)
        else:
            return None
    return here


def _method(owner: Definition, name: str) -> Definition | None:
    for base in ancestry(owner):
        for statement in base.node.body:
            if isinstance(statement, ast.FunctionDef) and statement.name == name:
                assert isinstance(base.node, ast.ClassDef)
                return Definition(base.module, statement, base.node)
    return None


def public_names(module: Module) -> list[str]:
    """List the classes, functions and imports of `module`, and its submodules, that do not start with `_`."""
    names: set[str] = set()
    for statement in _statements(_tree(module.file).body):
        if isinstance(statement, ast.ClassDef | ast.FunctionDef):
            names.add(statement.name)
        elif isinstance(statement, ast.ImportFrom) and statement.module != "__future__":
            names.update(alias.asname or alias.name for alias in statement.names if alias.name != "*")
    if module.folder is not None:
        names.update(file.stem for file in module.folder.glob("*.py"))
        names.update(file.parent.name for file in module.folder.glob("*/__init__.py"))
    return sorted(name for name in names if not name.startswith("_"))


@cache
def resolve(target: str) -> Definition | None:
    """Follow a dotted path to the class or function it names.

    Args:
        target: For instance `torch.optim.AdamW`.

    Returns:
        The definition, or None where the source does not tell (compiled packages).

    Raises:
        TargetNotFound: If a part of the path does not exist.
    """
    head, *rest = target.split(".")
    for part in (head, *rest):
        if not part.isidentifier():
            raise TargetNotFound(part, [], "Python")
    here: Definition | Module | None = find_module(head)
    if here is None:
        known = importlib.util.find_spec(head) is not None
        if known and rest:
            return None
        raise TargetNotFound(head, ["diffusion_lab", "torch", "lightning"], "the installed packages")
    for part in rest:
        assert here is not None
        holder = here
        if isinstance(holder, Module):
            here = _lookup(holder, part, frozenset())
            if here is None:
                if not holder.name.startswith("diffusion_lab") and _has_dynamic_names(holder):
                    return None
                raise TargetNotFound(part, public_names(holder), holder.name)
        else:
            here = _method(holder, part) if isinstance(holder.node, ast.ClassDef) else None
            if here is None:
                raise TargetNotFound(part, [], holder.path)
    if isinstance(here, Module):
        raise TargetNotFound(here.name.split(".")[-1], public_names(here), here.name)
    return here


def _has_dynamic_names(module: Module) -> bool:
    """Whether a module makes names at run time: a module-level `__getattr__`, or names from compiled code."""
    for statement in _statements(_tree(module.file).body):
        if isinstance(statement, ast.FunctionDef) and statement.name == "__getattr__":
            return True
        if isinstance(statement, ast.ImportFrom) and any(alias.name == "*" for alias in statement.names):
            if find_module(_import_base(module, statement)) is None:
                return True
    return False


def ancestry(definition: Definition) -> list[Definition]:
    """Return the class and the bases found in source, nearest first (depth first, which is enough for constructors)."""
    line = [definition]
    assert isinstance(definition.node, ast.ClassDef)
    for base in definition.node.bases:
        path = _dotted(base.value if isinstance(base, ast.Subscript) else base)
        parent = _follow(definition.module, path.split(".")) if path else None
        if isinstance(parent, Definition) and isinstance(parent.node, ast.ClassDef):
            line += [ancestor for ancestor in ancestry(parent) if ancestor not in line]
    return line


def _is_dataclass(node: ast.ClassDef) -> bool:
    for decorator in node.decorator_list:
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        if (_dotted(called) or "").split(".")[-1] == "dataclass":
            return True
    return False


def _fields(node: ast.ClassDef) -> Iterator[Parameter | str]:
    """Yield the constructor arguments that a dataclass body declares, or the bare name of a field left out of it."""
    for statement in node.body:
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        annotation: ast.expr = statement.annotation
        kind = _dotted(annotation.value if isinstance(annotation, ast.Subscript) else annotation) or ""
        if kind.split(".")[-1] == "ClassVar":
            continue
        required = statement.value is None
        if isinstance(statement.value, ast.Call) and (_dotted(statement.value.func) or "").endswith("field"):
            given = {keyword.arg: keyword.value for keyword in statement.value.keywords}
            init = given.get("init")
            if isinstance(init, ast.Constant) and init.value is False:
                yield statement.target.id
                continue
            required = "default" not in given and "default_factory" not in given
        yield Parameter(statement.target.id, required, annotation)


def _from_function(node: Function, *, bound: bool) -> Signature:
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    without_default = len(positional) - len(arguments.defaults)
    parameters = {
        argument.arg: Parameter(argument.arg, index < without_default, argument.annotation)
        for index, argument in enumerate(positional)
        if not (bound and index == 0) and argument not in arguments.posonlyargs
    }
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parameters[argument.arg] = Parameter(argument.arg, default is None, argument.annotation)
    return Signature(parameters, arguments.kwarg is not None)


def signature(definition: Definition) -> Signature | None:
    """Return what the target accepts by keyword, or None where the source does not tell."""
    if not isinstance(definition.node, ast.ClassDef):
        static = any(_dotted(item) == "staticmethod" for item in definition.node.decorator_list)
        return _from_function(definition.node, bound=definition.owner is not None and not static)
    line = ancestry(definition)
    for index, ancestor in enumerate(line):
        assert isinstance(ancestor.node, ast.ClassDef)
        for statement in ancestor.node.body:
            if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
                if ancestor.path == "torch.nn.modules.module.Module":
                    # it takes *args and **kwargs, only to refuse them
                    return Signature({}, False)
                return _from_function(statement, bound=True)
        if _is_dataclass(ancestor.node):
            parameters: dict[str, Parameter] = {}
            for base in reversed(line[index:]):
                assert isinstance(base.node, ast.ClassDef)
                if not _is_dataclass(base.node):
                    continue
                for field in _fields(base.node):
                    if isinstance(field, Parameter):
                        parameters[field.name] = field
                    else:
                        parameters.pop(field, None)
            return Signature(parameters, False)
    whole = all(isinstance(ancestor.node, ast.ClassDef) and _bases_known(ancestor, line) for ancestor in line)
    return Signature({}, False) if whole else None


def _bases_known(definition: Definition, line: list[Definition]) -> bool:
    """Whether every base of a class was found in source, or is one that takes no arguments."""
    assert isinstance(definition.node, ast.ClassDef)
    plain = {"object", "Protocol", "ABC", "Generic"}
    bases = (base.value if isinstance(base, ast.Subscript) else base for base in definition.node.bases)
    names = [(_dotted(base) or "").split(".")[-1] for base in bases]
    return all(name in plain or any(other.name == name for other in line) for name in names)
