"""Write ``reference.md``: every public name, with its arguments and a description from its docstring."""

import ast
import importlib
import inspect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

PAGE = Path(__file__).with_name("reference.md")
ROOMS = {
    "Networks": (
        "purecnn",
        "purecnn.layer",
        "purecnn.layers",
        "purecnn.initializers",
        "purecnn.random",
        "purecnn.tree",
    ),
    "Training": (
        "purecnn.training",
        "purecnn.optimizers",
        "purecnn.rule",
        "purecnn.schedules",
        "purecnn.augment",
        "purecnn.data",
        "purecnn.precision",
        "purecnn.distributed",
        "purecnn.capture",
    ),
    "Built on derivatives": (
        "purecnn.per_sample",
        "purecnn.privacy",
        "purecnn.ensembles",
        "purecnn.curvature",
        "purecnn.kfac",
        "purecnn.kernels",
        "purecnn.influence",
        "purecnn.laplace",
        "purecnn.meta",
        "purecnn.explain",
        "purecnn.adversarial",
    ),
    "To look at and to run": ("purecnn.summary", "purecnn.fold", "purecnn.pictures"),
    "Names and files": (
        "converters.torchvision",
        "converters.timm",
        "converters.pytorchcv",
        "converters.checkpoint",
        "converters.files",
        "converters.export",
        "converters.verify",
    ),
}
"""The modules that users import from, grouped by purpose."""

HEAD = """# Reference

Every public name, from its docstring; `help(name)` has the shapes, the errors, the source and an example. An asterisk
stands before what is given by keyword. The architectures are [the zoo's](zoo.md), and their names those of
`purecnn list`. Made by `docs/make_reference.py`.
"""


def documented(module: ModuleType) -> dict[str, str]:
    """The docstrings of a module's values: the strings that follow their definitions, here or where they come from."""
    body = ast.parse(inspect.getsource(module)).body
    origins = [node.module for node in body if isinstance(node, ast.ImportFrom) and node.module and node.level == 0]
    imported = (
        {}
        if not hasattr(module, "__all__")
        else {
            name: text
            for origin in origins
            if origin.startswith(("purecnn.", "converters."))
            for name, text in documented(importlib.import_module(origin)).items()
        }
    )
    return imported | {
        name.id: ast.literal_eval(text.value)
        for value, text in itertools.pairwise(body)
        if isinstance(value, ast.Assign | ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        for name in (value.targets if isinstance(value, ast.Assign) else [value.target])
        if isinstance(name, ast.Name)
    }


def arguments(value: Any) -> str:
    """The names of a function's arguments, or of the arguments of a class's constructor or of a protocol's call."""
    if inspect.isclass(value) and issubclass(value, Exception):
        return ""
    signature = inspect.signature(value.__call__ if getattr(value, "_is_protocol", False) else value)
    parameters = [each for name, each in signature.parameters.items() if name not in ("self", "cls")]
    words = [{"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(each.kind.name, "") + each.name for each in parameters]
    keyword = [each.kind is each.KEYWORD_ONLY for each in parameters]
    if any(keyword) and not any(each.kind is each.VAR_POSITIONAL for each in parameters):
        words.insert(keyword.index(True), "*")
    return f"({', '.join(words)})"


def sentence(text: str | None) -> str:
    """The first paragraph of a docstring, on one line."""
    words = " ".join((text or "").partition("\n\n")[0].split())
    return re.sub(":[a-z]+:`", "`", words.replace("``", "`")).replace("|", "\\|")


def row(name: str, value: Any) -> str:
    """The table row of a function or a class."""
    return f"| `{name}{arguments(value)}` | {sentence(value.__doc__)} |\n"


def rows(module: ModuleType, seen: set[int]) -> Iterator[str]:
    """The rows of all names not listed before: those in ``__all__``, or else those that the module defines."""
    values, stated = documented(module), getattr(module, "__all__", None)
    for name in vars(module) if stated is None else stated:
        value = getattr(module, name)
        if name.startswith("_") or id(value) in seen:
            continue
        if name in values:
            yield f"| `{name}` | {sentence(values[name])} |\n"
        elif inspect.isclass(value) and (stated or value.__module__ == module.__name__):
            yield row(name, value)
            for method, each in vars(value).items():
                function = getattr(each, "__func__", each)
                if inspect.isfunction(function) and not method.startswith("_") and function.__doc__:
                    yield row(f"{name}.{method}", function)
        elif inspect.isroutine(value) and (stated or value.__module__ in (module.__name__, "converters.library")):
            yield row(name, value)
        else:
            continue
        seen.add(id(value))


def page() -> str:
    """The whole page."""
    text, seen = HEAD, set[int]()
    for room, modules in ROOMS.items():
        text += f"\n## {room}\n"
        for name in modules:
            module = importlib.import_module(name)
            path = Path(*name.split("."))
            path = path / "__init__.py" if hasattr(module, "__path__") else path.with_suffix(".py")
            table = "".join(rows(module, seen))
            text += f"\n### [{name}](../{path.as_posix()})\n\n{sentence(module.__doc__)}\n"
            text += f"\n| | |\n|---|---|\n{table}" if table else ""
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
