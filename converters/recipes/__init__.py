"""Experiments, one command and one file each: ``purecnn recipe NAME``.

A recipe is a module with a function ``run``: its arguments are the command's options, and its docstring is the help
text. `RECIPES` lists all recipes.
"""

import importlib

import typer

RECIPES = (
    "lenet_cifar10",
    "alexnet_hymenoptera",
    "resnet20_cifar10",
    "channel_boosting",
    "digit_ensemble",
    "few_shot_digits",
    "influential_digits",
    "private_digits",
)
"""The modules of this package that are recipes; a command has its module's name, with dashes for underscores."""


def commands() -> typer.Typer:
    """All recipes as commands."""
    app = typer.Typer(no_args_is_help=True, help="Run an experiment from the history of the field.")
    for name in RECIPES:
        run = importlib.import_module(f"converters.recipes.{name}").run
        app.command(name.replace("_", "-"))(run)
    return app
