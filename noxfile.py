"""The project's tasks. ``nox`` runs what CI runs; ``nox -s NAME`` runs wide, peers, bench or verify on demand."""

import shutil
import subprocess

import nox

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["lint", "types", "tests", "docs"]


def _works(version: str) -> bool:
    program = shutil.which(f"python{version}")
    return program is not None and subprocess.run([program, "--version"], capture_output=True).returncode == 0


PYTHONS = [version for version in ("3.11", "3.12", "3.13", "3.14") if _works(version)]


def _group(name: str) -> tuple[str, ...]:
    return nox.project.dependency_groups(nox.project.load_toml("pyproject.toml"), name)


GROUPS = _group("test")


@nox.session(python=PYTHONS or None)
def tests(session: nox.Session) -> None:
    """All tests except slow ones and examples, in two processes; ``nox -s tests -- -k rules`` runs some of them."""
    session.install(".", *GROUPS)
    session.run("pytest", "-n", "2", "--dist", "worksteal", "--ignore", "tests/test_docs.py", *session.posargs)


@nox.session
def wide(session: nox.Session) -> None:
    """All tests, including the slow ones, with ten times as many examples of every hypothesis law."""
    session.install(".", *GROUPS)
    session.env["HYPOTHESIS_PROFILE"] = "wide"
    everything = ("pytest", "-m", "", *session.posargs)
    session.run(*everything, "-n", "2", "--dist", "worksteal", "--ignore", "tests/test_variants.py")
    session.run(*everything, "tests/test_variants.py")  # in one process, since some need half of the memory


@nox.session
def peers(session: nox.Session) -> None:
    """Comparisons with other libraries, which are installed: networks, gradients, curvature, explanations."""
    session.install(".[privacy]", *GROUPS, "pytorchcv", "timm")
    session.run("pytest", "tests/test_peers.py", *session.posargs)
    session.install(
        "opacus", "backpack-for-pytorch", "curvlinops-for-pytorch", "captum", "jax", "torchopt", "kronfluence"
    )
    derived = ("per_sample", "privacy", "curvature", "kfac", "kernels", "explain", "adversarial")
    tests = (*derived, "optimizers", "random", "initializers")
    session.run("pytest", *(f"tests/test_{name}.py" for name in tests), *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and common mistakes."""
    session.install(*_group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of both packages, strictly."""
    session.install(".", *_group("types"))
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Run every example in the docstrings, the README and the pages of ``docs``."""
    session.install(".", *GROUPS)
    session.run("pytest", "-n", "2", "tests/test_docs.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmarks against other libraries; the results go to ``docs/benchmarks.md``."""
    session.install(".", "opacus", "jax", "optax", "torchopt")
    session.run("python", "-m", "tests.benchmarks", *session.posargs)


@nox.session
def verify(session: nox.Session) -> None:
    """Compare every model that torchvision has with torchvision's, bit for bit."""
    session.install(".")
    session.run("purecnn", "verify", "--all", *session.posargs)
