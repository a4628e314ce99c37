"""The shape of the package: which folder may import which, how long things get, and a few habits.

Each rule is a function from a module to its complaints. Every rule is tried on every file of the package, and on
snippets that break it, so that a rule which no longer bites is found out.
"""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "latteflow"
LAYERS = ("flow", "nn", "models", "pipeline", "data", "train", "evaluate", "benchmark", "serve", "cli")
"""A folder imports from itself and from those to its left; `errors` and the package's own names are for everyone."""
LAZY_LAYER = "pipeline"
"""The highest layer that `latteflow/__init__.py` hands out names from."""
MOST_FILE_LINES = 400
MOST_FUNCTION_LINES = 60
NAMES_THAT_SAY_NOTHING = {"util", "utils", "common", "helper", "helpers", "misc"}
CONFIG_PACKAGES = {"omegaconf", "pydantic", "pydantic_settings", "yaml"}
CONFIG_NAMES = {"ConfigMixin", "register_to_config", "FrozenDict", "PretrainedConfig", "PreTrainedConfig", "DictConfig"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One source file: ``file`` is relative to the package, with forward slashes."""

    file: str
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def parts(self) -> list[str]:
        return self.file.removesuffix(".py").split("/")

    @property
    def layer(self) -> str:
        return "cli" if self.parts[0] == "__main__" else self.parts[0]


MODULES = [
    Module(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")) for file in sorted(ROOT.rglob("*.py"))
]


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, name.name) for name in names)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                yield from ((node.lineno, f"{module}.{name.name}") for name in names)
            case ast.Call(
                func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(value=str(name)), *_]
            ):
                if called in ("import_module", "__import__"):
                    yield node.lineno, name


def imports_downwards(module: Module) -> Iterator[str]:
    if module.file == "__init__.py":
        yield from imports_lightly(module)
        return
    if module.layer not in (*LAYERS, "errors"):
        yield f"1: {module.file} belongs to no layer"
        return
    own = LAYERS.index(module.layer) if module.layer in LAYERS else -1
    for line, name in imports(module.tree):
        package, _, rest = name.partition(".")
        if package != "latteflow" or not rest:
            continue
        target = rest.split(".")[0]
        if target in ("errors", "__version__"):
            continue
        if LAYERS.index(target if target in LAYERS else LAZY_LAYER) > own:
            yield f"{line}: {module.layer} imports {name}"


def imports_lightly(module: Module) -> Iterator[str]:
    """The package itself loads nothing but the standard library when it is imported."""
    for node in module.tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for line, name in imports(node):
                if name.split(".")[0] not in ("__future__", "importlib", "typing"):
                    yield f"{line}: {name} is imported with the package"


def imports_absolutely(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield f"{node.lineno}: relative import"


def files_are_short(module: Module) -> Iterator[str]:
    lines = len(module.source.splitlines())
    if lines > MOST_FILE_LINES:
        yield f"1: {lines} lines, at most {MOST_FILE_LINES}"


def functions_are_short(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, Function):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MOST_FUNCTION_LINES:
                yield f"{node.lineno}: {node.name} has {lines} lines, at most {MOST_FUNCTION_LINES}"


def names_say_something(module: Module) -> Iterator[str]:
    for part in module.parts:
        if part.strip("_") in NAMES_THAT_SAY_NOTHING:
            yield f"1: {part} does not say what is inside"


def public(body: list[ast.stmt], inside: str = "") -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Public functions, classes and methods with their dotted names; dunder methods go without saying."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield f"{inside}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{inside}{node.name}.")
        elif isinstance(node, ast.If | ast.Try):
            yield from public(node.body, inside)
            yield from public(node.orelse, inside)


def decorators(node: Function | ast.ClassDef) -> set[str]:
    return {ast.unparse(decorator).split("(")[0].split(".")[-1] for decorator in node.decorator_list}


def public_things_have_docstrings(module: Module) -> Iterator[str]:
    for name, node in public(module.tree.body):
        if not decorators(node) & {"overload", "setter"} and not (ast.get_docstring(node) or "").strip():
            yield f"{node.lineno}: {name} has no docstring"


def public_arguments_are_annotated(module: Module) -> Iterator[str]:
    for name, node in public(module.tree.body):
        if not isinstance(node, Function):
            continue
        given = node.args
        positional = [*given.posonlyargs, *given.args]
        if "." in name and "staticmethod" not in decorators(node):
            positional = positional[1:]  # self or cls
        for argument in [*positional, *given.kwonlyargs, given.vararg, given.kwarg]:
            if argument is not None and argument.annotation is None:
                yield f"{node.lineno}: {name} says no type for {argument.arg}"


def only_the_command_prints(module: Module) -> Iterator[str]:
    if module.layer == "cli":
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{node.lineno}: print"


def exceptions_are_named(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            for kind in caught:
                if kind is None or ast.unparse(kind).split(".")[-1] in ("Exception", "BaseException"):
                    yield f"{node.lineno}: catches everything"


def mathematics_takes_no_config(module: Module) -> Iterator[str]:
    if module.layer not in ("flow", "nn"):
        return
    for line, name in imports(module.tree):
        if name.split(".")[0] in CONFIG_PACKAGES or name.split(".")[-1] in CONFIG_NAMES:
            yield f"{line}: imports {name}"
    for node in ast.walk(module.tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) if name in CONFIG_NAMES:
                yield f"{node.lineno}: mentions {name}"


Rule = Callable[[Module], Iterator[str]]
RULES: list[Rule] = [
    imports_downwards,
    imports_absolutely,
    files_are_short,
    functions_are_short,
    names_say_something,
    public_things_have_docstrings,
    public_arguments_are_annotated,
    only_the_command_prints,
    exceptions_are_named,
    mathematics_takes_no_config,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.file)
def test_the_package_keeps_the_rule(module, rule):
    assert [f"src/latteflow/{module.file}:{complaint}" for complaint in rule(module)] == []


def test_the_package_was_found():
    files = {module.file for module in MODULES}
    assert {"__init__.py", "errors.py", "pipeline.py", "flow/intervals.py", "cli/main.py"} <= files


def function_of(lines: int) -> str:
    return "def f() -> None:\n" + "    pass\n" * (lines - 1)


BROKEN: list[tuple[Rule, str, str]] = [
    (imports_downwards, "flow/a.py", "import latteflow.nn.norm"),
    (imports_downwards, "flow/a.py", "from latteflow import nn"),
    (imports_downwards, "flow/a.py", "from latteflow import LatteFlowTransformer"),
    (imports_downwards, "flow/a.py", "from latteflow import *"),
    (imports_downwards, "nn/a.py", "def f():\n    from latteflow.models.context import Context"),
    (
        imports_downwards,
        "models/backbones/a.py",
        "if TYPE_CHECKING:\n    from latteflow.pipeline import LatteFlowPipeline",
    ),
    (imports_downwards, "pipeline.py", "from latteflow.data.grid import grid"),
    (imports_downwards, "data/emoji/a.py", "from latteflow.train.loop import train"),
    (imports_downwards, "train/a.py", "import importlib\nimportlib.import_module('latteflow.evaluate.cost')"),
    (imports_downwards, "evaluate/a.py", "import torch, latteflow.serve"),
    (imports_downwards, "evaluate/a.py", "from latteflow.benchmark.measure import interleaved"),
    (imports_downwards, "serve/a.py", "try:\n    import latteflow.cli.main\nexcept ImportError:\n    pass"),
    (imports_downwards, "errors.py", "from latteflow.flow.path import interpolate"),
    (imports_downwards, "elsewhere/a.py", ""),
    (imports_downwards, "elsewhere.py", ""),
    (imports_downwards, "__init__.py", "import torch"),
    (imports_downwards, "__init__.py", "from latteflow.pipeline import LatteFlowPipeline"),
    (imports_absolutely, "nn/a.py", "from . import norm"),
    (imports_absolutely, "nn/a.py", "def f():\n    from ..flow.path import interpolate"),
    (files_are_short, "nn/a.py", "x = 1\n" * (MOST_FILE_LINES + 1)),
    (functions_are_short, "nn/a.py", function_of(MOST_FUNCTION_LINES + 1)),
    (functions_are_short, "nn/a.py", "async " + function_of(MOST_FUNCTION_LINES + 1)),
    (functions_are_short, "nn/a.py", "class _A:\n    def f(self):\n" + "        pass\n" * MOST_FUNCTION_LINES),
    (names_say_something, "nn/utils.py", ""),
    (names_say_something, "nn/_misc.py", ""),
    (names_say_something, "train/common/loop.py", ""),
    (names_say_something, "helpers.py", ""),
    (public_things_have_docstrings, "nn/a.py", "def f(): pass"),
    (public_things_have_docstrings, "nn/a.py", "async def f(): ''"),
    (public_things_have_docstrings, "nn/a.py", "class A: pass"),
    (public_things_have_docstrings, "nn/a.py", "class A:\n    'An A.'\n    def f(self): pass"),
    (public_things_have_docstrings, "nn/a.py", "if True:\n    def f(): pass"),
    (public_arguments_are_annotated, "nn/a.py", "def f(x): pass"),
    (public_arguments_are_annotated, "nn/a.py", "def f(x: int, *, y=1): pass"),
    (public_arguments_are_annotated, "nn/a.py", "def f(*x, **y: int): pass"),
    (public_arguments_are_annotated, "nn/a.py", "class A:\n    def f(self, x): pass"),
    (public_arguments_are_annotated, "nn/a.py", "class A:\n    @staticmethod\n    def f(x): pass"),
    (only_the_command_prints, "nn/a.py", "def f():\n    print('x')"),
    (exceptions_are_named, "nn/a.py", "try:\n    f()\nexcept:\n    pass"),
    (exceptions_are_named, "cli/a.py", "try:\n    f()\nexcept Exception:\n    pass"),
    (exceptions_are_named, "nn/a.py", "try:\n    f()\nexcept (OSError, builtins.BaseException) as error:\n    pass"),
    (mathematics_takes_no_config, "flow/a.py", "from diffusers.configuration_utils import ConfigMixin"),
    (mathematics_takes_no_config, "nn/a.py", "import diffusers\nclass A(diffusers.ConfigMixin): pass"),
    (mathematics_takes_no_config, "nn/a.py", "from omegaconf import OmegaConf"),
    (mathematics_takes_no_config, "flow/a.py", "def f():\n    import pydantic"),
]

SOUND: list[tuple[Rule, str, str]] = [
    (
        imports_downwards,
        "flow/a.py",
        "import torch\nfrom latteflow.errors import UserError\nimport latteflow.flow.path",
    ),
    (imports_downwards, "flow/a.py", "from latteflow import __version__\nimport latteflow"),
    (imports_downwards, "pipeline.py", "from latteflow.models.context import Context\nfrom latteflow.flow import path"),
    (imports_downwards, "cli/a.py", "from latteflow.serve import api\nfrom latteflow import LatteFlowPipeline"),
    (imports_downwards, "__main__.py", "from latteflow.cli.main import main"),
    (imports_downwards, "nn/a.py", "import latteflow_extras.cli"),
    (imports_downwards, "__init__.py", "def __getattr__(name):\n    from latteflow.pipeline import LatteFlowPipeline"),
    (imports_downwards, "__init__.py", "if TYPE_CHECKING:\n    from latteflow.pipeline import LatteFlowPipeline"),
    (imports_absolutely, "nn/a.py", "from latteflow.nn import norm"),
    (files_are_short, "nn/a.py", "x = 1\n" * MOST_FILE_LINES),
    (functions_are_short, "nn/a.py", function_of(MOST_FUNCTION_LINES)),
    (names_say_something, "nn/commonality.py", ""),
    (public_things_have_docstrings, "nn/a.py", "def f(): 'Do.'\ndef _g(): pass\nclass _A:\n    def f(self): pass"),
    (public_things_have_docstrings, "nn/a.py", "class A:\n    'An A.'\n    def __len__(self): return 1"),
    (public_things_have_docstrings, "nn/a.py", "def f():\n    'Do.'\n    def g(): pass"),
    (public_arguments_are_annotated, "nn/a.py", "def f(x: int, *y: int): pass\ndef _g(x): pass"),
    (public_arguments_are_annotated, "nn/a.py", "class A:\n    @classmethod\n    def f(cls, x: int): pass"),
    (public_arguments_are_annotated, "nn/a.py", "class A:\n    def __init__(self, x): pass"),
    (only_the_command_prints, "cli/a.py", "print('x')"),
    (exceptions_are_named, "nn/a.py", "try:\n    f()\nexcept (OSError, ValueError):\n    pass"),
    (mathematics_takes_no_config, "models/a.py", "from diffusers import ConfigMixin\nimport pydantic"),
    (mathematics_takes_no_config, "flow/a.py", "def f(scheduler: object): return scheduler.config"),
]


def named(case: object) -> str | None:
    return case.__name__ if callable(case) else None


@pytest.mark.parametrize(("rule", "file", "source"), BROKEN, ids=named)
def test_the_rule_bites(rule, file, source):
    assert list(rule(Module(file, source)))


@pytest.mark.parametrize(("rule", "file", "source"), SOUND, ids=named)
def test_the_rule_leaves_sound_code_alone(rule, file, source):
    assert list(rule(Module(file, source))) == []


def test_every_rule_has_been_seen_to_bite():
    assert {rule for rule, _, _ in BROKEN} == set(RULES)
    assert {rule for rule, _, _ in SOUND} == set(RULES)


def test_a_folder_may_import_from_exactly_those_to_its_left():
    for own in LAYERS:
        for target in LAYERS:
            complaints = list(imports_downwards(Module(f"{own}/a.py", f"import latteflow.{target}.b")))
            assert bool(complaints) == (LAYERS.index(target) > LAYERS.index(own)), (own, target)
