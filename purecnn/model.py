"""Models: a network together with its name, its settings and its kind of images; and the table to create them from."""

import bisect
import difflib
import fnmatch
import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from purecnn import tree
from purecnn.layer import Around, Law, Layer, Mode, Tap, logits_of
from purecnn.paper import Loss, Paper, Variant, softmax
from purecnn.tree import Tree
from purecnn.zoo import VARIANTS


@dataclass(frozen=True, eq=False)  # functions cannot be compared, so a model equals only itself
class Model:
    """A convolutional network as two pure functions, `init` and `apply`.

    Both work with ``torch.func``, ``torch.compile`` and ``torch.export`` without changes:
    ``vmap(model.init)(random.split(key, n))`` makes an ensemble, and ``vmap(model.apply, in_dims=(0, 0, None))``
    runs it.
    """

    name: str
    layer: Layer
    settings: Mapping[str, Any]
    """What it was built with, JSON-able. For a model that `create` built, these are all settings, and
    ``create(model.name, **model.settings)`` builds it again; for one made by `Model.of`, only ``num_classes``."""
    paper: Paper
    in_channels: int
    image_size: int
    """Side, in pixels, of the images that the shapes of the parameters are computed for."""
    norm: Literal["batch", "group"] = "batch"
    """The normalisation used where the paper has batch normalisation: see `create`."""
    loss: Loss | None = None
    """The paper's own loss, if it is not cross-entropy."""
    probabilities: Callable[[Tensor], Tensor] = softmax
    """Converts outputs to probabilities, both (batch, classes): the softmax, unless the paper's outputs are not logits;
    then the probabilities need not sum to one."""
    pixels: tuple[float, float] | None = None
    """The values of black and white pixels for this network, if its paper states them."""
    built: Layer | None = field(default=None, repr=False)
    """The layer that `create` built."""

    @classmethod
    def of(
        cls,
        layer: Layer,
        *,
        num_classes: int,
        in_channels: int = 3,
        image_size: int = 224,
        norm: Literal["batch", "group"] = "batch",
        name: str = "custom",
        loss: Loss | None = None,
        probabilities: Callable[[Tensor], Tensor] = softmax,
    ) -> "Model":
        """Make a model from your own layer; `create` and files cannot build it again, since it is not in the table.

        Args:
            layer: maps images ``(batch, in_channels, height, width)`` to logits ``(batch, num_classes)`` or `Outputs`.
            num_classes: how many logits it returns for an image.
            in_channels, image_size: channels and side of the images that the shapes of its parameters are computed for.
            norm: see `create`.
            name: its name in errors.
            loss: maps outputs and labels to a scalar; by default cross-entropy.
            probabilities: converts outputs to probabilities.

        Raises:
            ValueError: if the layer returns another number of logits (which may have further axes, such as height and
                width), ``norm`` is neither ``"batch"`` nor ``"group"``, or a number of classes, channels or pixels is
                not a positive integer.

        >>> import purecnn
        >>> from purecnn.layers import conv, global_avg_pool, linear, relu
        >>> layer = purecnn.serial(stem=conv(8, 3), relu=relu, head=purecnn.serial(global_avg_pool, linear=linear(10)))
        >>> params, state = Model.of(layer, num_classes=10, image_size=32).init(purecnn.random.key(0))
        """
        paper = Paper(name, "", 0, "")
        num_classes, in_channels, image_size = _counts(name, num_classes, in_channels, image_size, norm)
        settings = MappingProxyType({"num_classes": num_classes})
        model = cls(name, layer, settings, paper, in_channels, image_size, norm, loss, probabilities)
        shape = logits_of(model._init(Mode(train=True, batch_statistics=True, norm=norm))[2]).shape
        if len(shape) < 2 or shape[1] != num_classes:
            sizes = ", ".join(("batch", *map(str, shape[1:])))
            raise ValueError(f"the layer should give logits (batch, {num_classes}), found ({sizes})")
        return model

    def __copy__(self) -> "Model":
        return self  # it is immutable

    def __deepcopy__(self, memo: Any) -> "Model":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle: a model of the table is built again by name, since its functions cannot be pickled."""
        if not self.is_built:
            raise TypeError(
                f"{self.name!r} has a layer that purecnn.create did not build, which cannot be pickled: build it where "
                "it is used"
            )
        again = create(self.name, **self.settings)
        names = {each.name for each in fields(self)} - {"layer", "built", "settings"}
        changed = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(again, name)}
        return _again, (self.name, dict(self.settings), changed)

    @property
    def is_built(self) -> bool:
        """Whether its layer is what `create` built: not made by `Model.of`, and not folded or otherwise changed."""
        return self.layer is self.built

    @property
    def num_classes(self) -> int:
        """How many logits it returns for an image."""
        return int(self.settings["num_classes"])

    def init(self, key: Tensor, *, law: Law | Literal["paper"] | None = None) -> tuple[Tree, Tree]:
        """Draw parameters and running statistics, on the key's device.

        Args:
            key: the key that all draws are derived from.
            law: how to draw. By default as torchvision does, or as the paper does if torchvision does not have the
                network. ``"paper"`` draws as the paper states, where it does. A function is called for each parameter,
                as ``law(path, shape)``, and returns an initializer, a number, or None for the default.

        Raises:
            ValueError: if ``law`` is none of these, or is ``"paper"`` for a model that `create` did not build.
            RuntimeError: if images of the model's ``image_size`` are too small for it; states the size that it needs.

        >>> import purecnn
        >>> params, state = purecnn.create("lenet5").init(purecnn.random.key(0))
        >>> params["head"]["linear"]["weight"].shape
        torch.Size([10, 84])
        >>> params, state = purecnn.create("lenet5").init(purecnn.random.key(0), law=lambda path, shape: 0.5)
        >>> params["head"]["linear"]["bias"][:2]
        tensor([0.5000, 0.5000])
        """
        if law == "paper":
            if self.built is None:
                raise ValueError(
                    f"{self.name!r} has a layer that purecnn.create did not build, so it has no paper: law is a "
                    "function or None"
                )
            law = find(self.name).paper_law
        if law is not None and not callable(law):
            raise ValueError(f"law is 'paper', a function law(path, shape) or None, found {law!r}")
        return self._init(Mode(train=True, batch_statistics=True, key=key, law=law, norm=self.norm))[:2]

    def spec(self) -> tuple[Tree, Tree]:
        """Parameters and running statistics as meta tensors: names, shapes and types without values.

        Raises:
            RuntimeError: as from `init`.
        """
        return self._init(Mode(train=True, batch_statistics=True, norm=self.norm))[:2]

    def _init(self, mode: Mode) -> tuple[Tree, Tree, Any]:
        try:
            return self._sized(mode, self.image_size)
        except RuntimeError as error:
            shapes = functools.partial(self._sized, mode._replace(key=None, law=None))
            self._check_size(error, (self.image_size, self.image_size), shapes, (64, 128, 256, 512, 1024))
            raise

    def _sized(self, mode: Mode, size: int) -> tuple[Tree, Tree, Any]:
        return self.layer.init(self._images(size), mode)

    def _images(self, size: int) -> Tensor:
        return torch.empty(2, self.in_channels, size, size, dtype=torch.float32, device="meta")

    def _check_size(
        self, error: RuntimeError, found: tuple[int, ...], run: Callable[[int], object], larger: Iterable[int]
    ) -> None:
        """If the images are too small, raise an error that says so and what size is needed.

        Args:
            error: the error that a layer raised.
            found: height and width of the images.
            run: runs the same with images of another size, on meta tensors.
            larger: sizes that may be large enough.
        """

        def fits(size: int) -> bool:
            try:
                run(size)
            except (RuntimeError, ValueError):
                return False
            return True

        small = min(found)
        enough = next((size for size in larger if size > small and fits(size)), None)
        if enough is None or fits(small):
            return
        sizes = range(small + 1, enough + 1)
        needed = sizes[bisect.bisect_left(sizes, True, key=fits)]
        clear = RuntimeError(
            f"images of {found[0]} x {found[1]} pixels are too small for {self.name}, which needs {needed} x {needed}"
        )
        for note in getattr(error, "__notes__", []):
            clear.add_note(note)
        raise clear from error

    def check(self, params: Tree, state: Tree) -> None:
        """Check that two trees have the names and shapes of this model's parameters and statistics.

        Raises:
            TypeError: if they are not trees.
            ValueError: if they differ; names what differs.

        >>> import purecnn
        >>> params, state = purecnn.create("resnet34").spec()
        >>> purecnn.create("resnet18").check(params, state)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: the parameters are not those of resnet18: ...
        """
        for what, meta, given in zip(("parameters", "statistics"), self.spec(), (params, state), strict=True):
            if not isinstance(given, Mapping):
                raise TypeError(f"the {what} must be nested dictionaries, found {type(given).__name__}")
            if different := tree.differences(meta, given):
                raise ValueError(f"the {what} are not those of {self.name}: {tree.some(different)}")
            if given.keys() != meta.keys():
                raise ValueError(f"the {what} are flat: purecnn.tree.unflatten makes nested dictionaries of them")

    def apply(
        self,
        params: Tree,
        state: Tree,
        x: Tensor,
        *,
        train: bool = False,
        key: Tensor | None = None,
        statistics: Literal["batch", "running", "global"] | None = None,
        tap: Tap | None = None,
        around: Around | None = None,
        remat: bool = False,
    ) -> tuple[Any, Tree]:
        """Run the network.

        Args:
            params: its parameters.
            state: its running statistics.
            x: images, ``(batch, channels, height, width)``.
            train: draw random numbers, and return `Outputs` if there are auxiliary heads.
            key: the key of the random numbers; networks with dropout need it in training.
            statistics: the statistics that batch normalisation uses; by default the batch's in training and the
                running ones in evaluation. ``train=True, statistics="running"`` trains with frozen statistics;
                ``"global"`` are those of the batches of all processes together (`purecnn.distributed`).
            tap: called as ``tap(path, input, output)`` after each named layer; its result replaces the output. It
                serves to inspect activations, and to differentiate with respect to them.
            around: called in place of each layer that has its own tensors; see `purecnn.layer.Around`.
            remat: save memory: recompute the activations inside blocks in the backward pass, instead of keeping them
                (`purecnn.remat`). Gradients stay the same.

        Returns:
            The logits ``(batch, classes)``, or `Outputs`; and the new running statistics.

        Raises:
            ValueError: if ``x`` is not a batch of images with the model's channels, or settings exclude each other.
            RuntimeError: if the images are too small; states the size that is needed, and in a note the layer that
                failed.

        If anything fails and the trees are not this model's, or have another dtype than the images, a note on the error
        says so.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"{self.name} takes images (batch, {self.in_channels}, height, width), found {tuple(x.shape)}"
            )
        if statistics not in (None, "batch", "running", "global"):
            raise ValueError(f"statistics is 'batch', 'running', 'global' or None, found {statistics!r}")
        if remat and (around is not None or tap is not None):
            raise ValueError("around and tap see each layer once, but remat runs layers twice: use one or the other")
        batch_statistics = train if statistics is None else statistics != "running"
        synchronized = statistics == "global"
        mode = Mode(train, batch_statistics, key, tap, None, self.norm, synchronized, around, remat)
        try:
            return self.layer.apply(params, state, x, mode)
        except Exception as error:
            self._note(error, params, state, x)
            if isinstance(error, RuntimeError) and min(x.shape[2:]) < self.image_size:
                key = None if key is None else key.to("meta")
                shapes = mode._replace(key=key, tap=None, around=None, synchronized=False, remat=False)
                trees = self.spec()
                self._check_size(
                    error,
                    tuple(x.shape[2:]),
                    lambda size: self.layer.apply(*trees, self._images(size), shapes),
                    (self.image_size,),
                )
            raise

    def _note(self, error: Exception, params: Tree, state: Tree, x: Tensor) -> None:
        """If the trees or images do not fit the model, add a note to the error that says so."""
        replaced = self.built is not None and not self.is_built  # such as a folded model, which has fewer parameters
        if torch.compiler.is_compiling() or replaced:
            return
        try:
            self.check(params, state)
            types = {leaf.dtype for leaf in tree.flatten(params).values()}
            if types != {x.dtype}:
                error.add_note(f"images are {x.dtype}, parameters {', '.join(sorted(map(str, types)))}")
        except (ValueError, TypeError) as other:
            error.add_note(str(other))

    def features(self, params: Tree, state: Tree, x: Tensor) -> dict[str, Tensor]:
        """The outputs of stem, stages and head in evaluation mode, by name.

        Args:
            params, state: the network's parameters and running statistics.
            x: images, ``(batch, channels, height, width)``.

        Raises:
            ValueError, RuntimeError: as from `apply`.

        >>> import purecnn
        >>> model = purecnn.create("lenet5")
        >>> features = model.features(*model.init(purecnn.random.key(0)), torch.zeros(1, 1, 32, 32))
        >>> {name: tuple(value.shape) for name, value in features.items()}
        {'stem': (1, 6, 14, 14), 'stage1': (1, 16, 5, 5), 'stage2': (1, 84), 'head': (1, 10)}
        """
        found: dict[str, Tensor] = {}

        def tap(path: str, x: Any, y: Any) -> Any:
            if "." not in path:
                found[path] = y
            return y

        self.apply(params, state, x, tap=tap)
        return found


def _again(name: str, settings: dict[str, Any], changed: dict[str, Any]) -> Model:
    return replace(create(name, **settings), **changed)


def replace_head(model: Model, params: Tree, state: Tree, num_classes: int, key: Tensor) -> tuple[Model, Tree, Tree]:
    """The network with newly drawn heads for another number of classes; all other parameters are kept.

    Args:
        model: a model as `create` returns it.
        params, state: its parameters and running statistics; they are not changed.
        num_classes: number of classes of the new heads: ``head``, and auxiliary ones.
        key: key of their initial values.

    Returns:
        The model for that many classes, its parameters and its running statistics; what is kept is not copied.

    Raises:
        ValueError: if `create` did not build the model, so that it cannot be built again, or if the trees are not the
            model's.

    >>> import purecnn
    >>> model = purecnn.create("squeezenet1_1")
    >>> params, state = model.init(purecnn.random.key(0))
    >>> model, params, state = purecnn.replace_head(model, params, state, 2, purecnn.random.key(1))
    >>> params["head"]["conv"]["weight"].shape
    torch.Size([2, 512, 1, 1])
    """
    if not model.is_built:
        raise ValueError(
            f"{model.name!r} has a layer that purecnn.create did not build: build it again yourself for {num_classes} "
            "classes"
        )
    model.check(params, state)
    new = create(model.name, **{**model.settings, "num_classes": num_classes})
    new = replace(new, loss=model.loss, probabilities=model.probabilities)
    fresh = new.init(key)
    like: Tensor = next(iter(tree.flatten(params).values()))

    def graft(old: Tree, drawn: Tree) -> Tree:
        drawn = tree.map(lambda leaf: leaf.to(like) if leaf.is_floating_point() else leaf.to(like.device), drawn)
        return {part: drawn[part] if part.startswith(("head", "aux")) else old[part] for part in drawn}

    return new, graft(params, fresh[0]), graft(state, fresh[1])


class UnknownModelError(ValueError):
    """There is no model of that name; the message suggests the nearest names."""


def create(
    name: str,
    *,
    in_channels: int | None = None,
    image_size: int | None = None,
    norm: Literal["batch", "group"] = "batch",
    **settings: Any,
) -> Model:
    """Build a model by its name.

    Args:
        name: one of `list_models`.
        in_channels: channels of its images; by default the paper's.
        image_size: side of its images in pixels, for networks whose parameters depend on it; by default the paper's.
        norm: ``"group"`` replaces batch normalisation by group normalisation (`purecnn.layers.group_norm`), as
            per-sample gradients, privacy and batches of one image need. The parameters keep their names.
        settings: settings of the family, such as ``num_classes`` and ``dropout``; see its module in `purecnn.zoo`.

    >>> create("resnet18", num_classes=10).settings["num_classes"]
    10
    >>> create("resnet18", norm="group").spec()[1]  # no running statistics
    {}

    Raises:
        UnknownModelError: if there is no such model.
        TypeError: if the family has no such setting.
        ValueError: if ``norm`` is neither ``"batch"`` nor ``"group"``, or a number of classes, channels or pixels is
            not a positive integer.
    """
    variant = find(name)
    try:
        bound = inspect.signature(variant.build).bind(**{**variant.settings, **settings})
    except TypeError as error:
        known = ", ".join(inspect.signature(variant.build).parameters)
        raise TypeError(f"{name}: {error}; its settings are in_channels, image_size, norm, {known}") from None
    bound.apply_defaults()
    in_channels = variant.in_channels if in_channels is None else in_channels
    image_size = variant.image_size if image_size is None else image_size
    # Lists become tuples: settings read from a file have lists.
    own = {setting: _fixed(value) for setting, value in bound.arguments.items()}
    classes, in_channels, image_size = _counts(name, own["num_classes"], in_channels, image_size, norm)
    own["num_classes"] = classes
    chosen = {**own, "in_channels": in_channels, "image_size": image_size, "norm": norm}
    layer = variant.build(**own)
    return Model(
        name,
        layer,
        MappingProxyType(chosen),
        variant.paper,
        in_channels,
        image_size,
        norm,
        variant.loss,
        variant.probabilities,
        variant.pixels,
        layer,
    )


def _counts(name: str, num_classes: Any, in_channels: Any, image_size: Any, norm: str) -> tuple[int, int, int]:
    """Check that these are positive integers (NumPy's are accepted), and that ``norm`` is valid."""
    if norm not in ("batch", "group"):
        raise ValueError(f"norm is 'batch' or 'group', found {norm!r}")

    def checked(what: str, value: Any) -> int:
        try:
            count = operator.index(value)
        except TypeError:
            count = 0
        if count < 1 or isinstance(value, bool):
            raise ValueError(f"{what} of {name} is a whole number of at least 1, found {value!r}")
        return count

    return checked("num_classes", num_classes), checked("in_channels", in_channels), checked("image_size", image_size)


def _fixed(value: Any) -> Any:
    return tuple(map(_fixed, value)) if isinstance(value, (list, tuple)) else value


_ALSO_CALLED = {"inception_v1": "googlenet", "inception_v2": "bn_inception", "lenet": "lenet5"}
"""Only for the hint in the error: these names do not create models."""


def find(name: str) -> Variant:
    """The row of a model in the table.

    Raises:
        UnknownModelError: if there is no such model.
    """
    if name not in VARIANTS:
        plain = name.lower().replace("-", "_")
        near = [_ALSO_CALLED[plain]] if plain in _ALSO_CALLED else difflib.get_close_matches(plain, VARIANTS, 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see list_models(), or purecnn list in a shell"
        raise UnknownModelError(f"there is no model {name!r}; {hint}")
    return VARIANTS[name]


def list_models(pattern: str = "*") -> list[str]:
    """The names of all models that match a shell-style pattern, in historical order.

    >>> list_models("vgg1?")
    ['vgg11', 'vgg13', 'vgg16', 'vgg19']
    """
    return [name for name in VARIANTS if fnmatch.fnmatchcase(name, pattern)]
