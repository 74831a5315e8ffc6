"""Networks and functions as files that other programs run.

    whole = program(model, params, state)            # a batch of images of any size -> logits
    save_onnx("model.onnx", whole)                   # for ONNX Runtime and others
    save_program("model.pt2", whole)                 # for torch.export.load, ExecuTorch and others
    package("step.pt2", step, train_state, batch)    # compiled: loading it traces and compiles nothing
    step = load("step.pt2")

Since the exported functions are pure, a file computes what the function computed, including the gradients and the
update of a training step.
"""

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from converters.files import FileError
from purecnn import Model
from purecnn.eager import is_transformed
from purecnn.files import replacing
from purecnn.step import NO_LAYOUT
from purecnn.tree import Tree

Notes: TypeAlias = Mapping[str, str]

_ABOUT = "purecnn"
"""The metadata key under which a package stores the names of its inputs and outputs."""

# A package is compiled once, so precompiled headers do not pay off, and its wrapper only calls kernels, so optimising
# it gains nothing.
_OPTIONS: dict[str, Any] = {"aot_inductor.precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0"}


class ExportError(ValueError):
    """A function cannot be exported, or a package is called with arguments that it was not made for."""


class _Called(nn.Module):
    """A function as a module, since torch.export accepts only modules."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def program(model: Model, params: Tree, state: Tree, *, image_size: int | None = None) -> ExportedProgram:
    """A network with its weights, in evaluation: images (batch, channels, height, width) to logits (batch, classes).

    The batch may have any size; height and width are ``image_size``, by default the model's. The logits equal those of
    ``model.apply`` bit for bit.

    >>> import purecnn
    >>> model = purecnn.create("lenet5")
    >>> params, state = model.init(purecnn.random.key(0))
    >>> program(model, params, state).module()(torch.zeros(3, 1, 32, 32)).shape
    torch.Size([3, 10])
    """

    def logits(images: Tensor) -> Any:
        return model.apply(params, state, images)[0]

    result = _open(logits, (example(model, params, image_size),))
    result.example_inputs = None  # zeros, which would be written into the file
    return result


def example(model: Model, params: Tree, image_size: int | None = None) -> Tensor:
    """An example input: two images of zeros, of the network's size and of its parameters' dtype and device."""
    weight = next(leaf for leaf in _leaves((params,)).values() if leaf.is_floating_point())
    size = image_size or model.image_size
    return weight.new_zeros(2, model.in_channels, size, size)


class _Watch(TorchFunctionMode):
    """Records whether anything was computed inside one of torch.func's transformations."""

    transformed = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.transformed |= peek_interpreter_stack() is not None
        return function(*args, **(kwargs or {}))


def _open(function: Callable[..., Any], arguments: tuple[Tensor, ...]) -> ExportedProgram:
    """Export the function with a first axis of any size in all arguments.

    torch.export traces operations before torch.func's transformations are applied, and silently loses these, so
    functions that use them are refused.
    """
    batch = Dim("batch")
    with torch.no_grad():
        with _Watch() as watch:
            function(*arguments)
        if watch.transformed:
            raise ExportError("a batch of any size is only for functions without torch.func's transformations inside")
        shapes = (tuple({0: batch} for _ in arguments),)
        return torch.export.export(_Called(function), arguments, dynamic_shapes=shapes, strict=False)


def save_program(path: str | os.PathLike[str], program: ExportedProgram, notes: Notes | None = None) -> None:
    """Write a program for ``torch.export.load``, atomically: the whole file or nothing.

    Args:
        path: the file, ``.pt2``; an existing one is replaced.
        program: from `program` or ``torch.export.export``.
        notes: texts to store in the file, by names such as ``"classes"``; ``torch.export.load(path, extra_files=...)``
            reads them.

    Raises:
        FileError: if the name has another ending.
    """
    _check_ending(path, ".pt2")
    # Save to memory first: on a full disk torch would abort instead of raising.
    held = io.BytesIO()
    torch.export.save(program, held, extra_files=dict(notes or {}))
    with replacing(path) as file, held.getbuffer() as view:
        file.write_bytes(view)


def save_onnx(path: str | os.PathLike[str], program: ExportedProgram, notes: Notes | None = None) -> None:
    """Write a network for ONNX Runtime and others, atomically: the whole file or nothing.

    The input is named ``images``, the output ``logits``, and the first axis of both ``batch``.

    Args:
        path: the file, ``.onnx``; an existing one is replaced.
        program: from `program`.
        notes: texts to store in the file's ``metadata_props``, by names such as ``"classes"``.

    Raises:
        FileError: if the name has another ending.
        ModuleNotFoundError: if ``onnx`` or ``onnxscript`` is missing.
    """
    _check_ending(path, ".onnx")
    try:
        converted = torch.onnx.export(
            program,
            (),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),  # the name of the axis, which a program does not store
            dynamo=True,
            verbose=False,
        )
    except ImportError as error:
        raise ModuleNotFoundError(f"{path}: writing ONNX needs packages: pip install onnx onnxscript") from error
    assert converted is not None
    converted.model.metadata_props.update(notes or {})
    with replacing(path) as file:
        converted.save(file, external_data=False)


def package(
    path: str | os.PathLike[str],
    function: Callable[..., Any],
    *arguments: Any,
    open_batch: bool = False,
    notes: Notes | None = None,
) -> None:
    """Compile a pure function ahead of time, for this kind of machine and version of torch, into a file for `load`.

    The function takes and returns tensors or trees of tensors: a network, ``torch.func`` derivatives of it, or a whole
    step of `purecnn.step.make_step` (with ``donate=False``, since a package does not reuse its inputs' memory).
    AOTInductor compiles it; tensors that the function closes over are stored in the file. C++ programs can run the file
    without Python (``torch::inductor::AOTIModelPackageLoader``); its ``purecnn`` metadata list the names of its inputs
    and outputs in order.

    Args:
        path: the file, ``.pt2``; an existing one is replaced.
        function: any pure function; random numbers must come from a key among its arguments.
        arguments: examples that fix the shapes and dtypes.
        open_batch: whether the first axis of every argument is a batch of any size. Only for functions without
            ``torch.func`` transformations inside.
        notes: texts to store in the file's metadata, by names such as ``"classes"``.

    Raises:
        ExportError: if the function's arguments or results are not trees of tensors only, or two tensors share a name;
            with ``open_batch``, if there are transformations inside, or the arguments' first axes differ in size.
        FileError: if the name has another ending.
    """
    _check_ending(path, ".pt2")
    given = {name: leaf.contiguous() for name, leaf in _leaves(arguments).items()}  # as `load` passes them
    if not given:
        raise ExportError("the function of a package must take at least one tensor, found none in its arguments")
    if open_batch:
        _check_batch(given)
    results: Any = None

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        nonlocal results
        byname = dict(zip(given, tensors, strict=True))
        results = function(*_mapped(arguments, lambda name, _: byname[name]))
        return tuple(_leaves(results).values())

    tensors = tuple(given.values())
    if open_batch:
        whole = _open(flat, tensors)
    else:
        with torch.no_grad():
            whole = torch.export.export(_Called(make_fx(flat)(*tensors)), tensors)
    shapes = {name: [None, *leaf.shape[1:]] if open_batch else list(leaf.shape) for name, leaf in given.items()}
    about = {
        "arguments": _mapped(arguments, lambda name, _: name),
        "tensors": [
            {"name": name, "shape": shapes[name], "dtype": str(leaf.dtype), "device": leaf.device.type}
            for name, leaf in given.items()
        ],
        "results": _mapped(results, lambda name, _: name),
    }
    options = {**_OPTIONS, "aot_inductor.metadata": {**(notes or {}), _ABOUT: json.dumps(about)}}
    if all(leaf.is_cpu for leaf in tensors):
        # Without a backward pass, freezing converts the function's own tensors once to the fastest layout.
        options |= NO_LAYOUT if _is_backward(whole) else {"freezing": True}
    with replacing(path) as file, torch.no_grad():
        torch._inductor.aoti_compile_and_package(whole, package_path=str(file), inductor_configs=options)


def _is_backward(program: ExportedProgram) -> bool:
    """Whether the program computes gradients of convolutions."""
    return any(node.target is torch.ops.aten.convolution_backward.default for node in program.graph.nodes)


def load(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """Load the function from a file that `package` wrote; nothing is traced or compiled.

    A package is machine code: load only files that you trust.

    Returns:
        A function that takes arguments like the examples. Named tuples, such as a train state, are returned as plain
        tuples: ``TrainState(*result)``. It raises `ExportError` if the arguments have other names, shapes, dtypes or
        devices, or if it is differentiated or mapped: put the derivative into the package instead.

    Raises:
        FileError: if the file is missing, damaged or not a package for this machine and version of torch.
    """
    if not Path(path).is_file():
        raise FileError(f"{path} does not exist")
    try:
        compiled = torch._inductor.aoti_load_package(str(path))
        about = json.loads(compiled.get_metadata()[_ABOUT])
        template, expected, results = about["arguments"], about["tensors"], about["results"]
    except (RuntimeError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileError(f"{path} is not a package for this machine and torch {torch.__version__}: {reason}") from error
    shapes = [tuple(each["shape"]) for each in expected]
    dtypes = [getattr(torch, each["dtype"].removeprefix("torch.")) for each in expected]
    devices = [each["device"] for each in expected]
    places = {kind: (attrgetter(f"is_{kind}"), [kind == each for each in devices]) for kind in set(devices)}
    read, write = _reader(template), _writer(results)

    def run(*arguments: Any) -> Any:
        tensors: list[Tensor] = []
        # This is the whole cost of a call on the host; the reason for a mismatch is worked out only afterwards.
        if not (read(arguments, tensors) and all(isinstance(leaf, Tensor) for leaf in tensors)):
            different = {each["name"] for each in expected} ^ _leaves(arguments).keys()
            raise ExportError(
                f"the package in {path} was made for other tensors; missing or unexpected: "
                f"{', '.join(sorted(different)[:5])}"
            )
        if [leaf.dtype for leaf in tensors] != dtypes or [leaf.shape for leaf in tensors] != shapes:
            for leaf, each, shape, dtype in zip(tensors, expected, shapes, dtypes, strict=True):
                _check(each["name"], leaf, shape, dtype)
            if any(shape[:1] == (None,) for shape in shapes):
                _check_batch({each["name"]: leaf for each, leaf in zip(expected, tensors, strict=True)})
        if any(list(map(is_there, tensors)) != all_there for is_there, all_there in places.values()):
            raise ExportError(f"the package in {path} was made for tensors on {', '.join(sorted(set(devices)))}")
        if is_transformed(*tensors):
            raise ExportError(
                f"the package in {path} is machine code, which cannot be differentiated, mapped or traced"
            )
        # The compiled code ignores strides.
        if not all(map(Tensor.is_contiguous, tensors)):
            tensors = list(map(Tensor.contiguous, tensors))
        return write(iter(compiled.loader.boxed_run(tensors)))

    return run


def _check(name: str, leaf: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype) -> None:
    fits = leaf.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, leaf.shape, strict=True))
    if not fits or leaf.dtype != dtype:
        words = ", ".join("any" if n is None else str(n) for n in shape)
        raise ExportError(
            f"argument {name} should be of shape ({words}) and {dtype}, found {tuple(leaf.shape)} and {leaf.dtype}"
        )


def _check_batch(tensors: Mapping[str, Tensor]) -> None:
    """Check that all arguments have the same batch size, since machine code does not."""
    sizes = {name: leaf.shape[0] if leaf.ndim else None for name, leaf in tensors.items()}
    if None in sizes.values() or len(set(sizes.values())) > 1:
        words = ", ".join(f"{name} has {'none' if size is None else size}" for name, size in sizes.items())
        raise ExportError(f"the first axis of every argument must be the batch, of one size: {words}")


def _check_ending(path: str | os.PathLike[str], ending: str) -> None:
    if Path(path).suffix != ending:
        raise FileError(f"{path} should end in {ending}")


def _mapped(value: Any, function: Callable[[str, Tensor], Any], path: str = "") -> Any:
    """The same tree of dictionaries and tuples with ``function(name, tensor)`` in place of each tensor."""

    def inner(name: object, part: Any) -> Any:
        return _mapped(part, function, f"{path}.{name}" if path else str(name))

    if isinstance(value, Tensor):
        return function(path, value)
    if isinstance(value, Mapping):
        if numbers := [name for name in value if not isinstance(name, str)]:
            raise ExportError(f"the keys of a package's trees must be strings, found {numbers[0]!r} at {path!r}")
        return {name: inner(name, part) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [inner(i, part) for i, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    raise ExportError(
        f"the function of a package takes and returns only trees of tensors, found {type(value).__name__} at {path!r}"
    )


def _leaves(value: Any) -> dict[str, Tensor]:
    """The tensors of a tree by their names."""
    found: dict[str, Tensor] = {}

    def add(name: str, leaf: Tensor) -> None:
        if name in found:
            raise ExportError(f"two of a package's tensors have the same name {name!r}")
        found[name] = leaf

    _mapped(value, add)
    return found


def _reader(template: Any) -> Callable[[Any, list[Any]], bool]:
    """Make ``read(tree, found)``: it appends a tree's leaves in the template's order; False if the trees differ.

    It is made once, because a network has hundreds of leaves and a call has to be cheap.
    """
    kinds = (dict, Mapping) if isinstance(template, dict) else (tuple, list)  # dict first: abstract types are slower
    names = list(template if isinstance(template, dict) else range(len(template)))
    inner = [(name, None if isinstance(template[name], str) else _reader(template[name])) for name in names]

    def read(value: Any, found: list[Any]) -> bool:
        if not isinstance(value, kinds) or len(value) != len(names):
            return False
        try:
            for name, below in inner:
                if below is None:
                    found.append(value[name])
                elif not below(value[name], found):
                    return False
        except KeyError:
            return False
        return True

    return read


def _writer(template: Any) -> Callable[[Iterator[Tensor]], Any]:
    """Make ``write(leaves)``: it returns the template's tree with leaves in place of names, and tuples for lists."""
    if isinstance(template, str):
        return next
    if isinstance(template, dict):
        parts = [(name, _writer(part)) for name, part in template.items()]
        return lambda leaves: {name: write(leaves) for name, write in parts}
    writers = [_writer(part) for part in template]
    return lambda leaves: tuple([write(leaves) for write in writers])
