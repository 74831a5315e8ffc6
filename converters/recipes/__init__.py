"""Experiments, one command and one file each: ``purecnn recipe NAME``.

A recipe is a module with a function ``run`` whose arguments are the command's; its docstring is the help. `RECIPES`
names them all.
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
"""The modules of this package that are recipes; a command's name has dashes for underscores."""


def commands() -> typer.Typer:
    """All recipes as commands."""
    app = typer.Typer(no_args_is_help=True, help="Run an experiment from the history of the field.")
    for name in RECIPES:
        run = importlib.import_module(f"converters.recipes.{name}").run
        app.command(name.replace("_", "-"))(run)
    return app
