"""Data sets, preprocessing and batches, on scikit-learn's digits and on small pictures made here."""

import json
import os
import struct
import sys
import urllib.error
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import dataloader
from torchvision import transforms
from torchvision.transforms import v2

from purecnn import augment, data, random


def worker_processes(test: Callable[..., None]) -> Any:
    """For tests with worker processes, of which Python 3.12 and torch warn on some machines."""
    of_python = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
    of_torch = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
    return of_python(of_torch(test))


def picture(path: Path, size: tuple[int, int] = (40, 30), color: Any = (200, 100, 0), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for half, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("ants", "bees")):
            for i in range(count):
                picture(tmp_path / half / name / f"{i}.png", color=(100 * label, 10 * i, 0))
    return tmp_path


@pytest.fixture(scope="module")
def digits() -> data.DataSet:
    return data.load("digits")


# Data sets -------------------------------------------------------------------------------------------------


def test_digits_are_split_in_proportion_and_always_alike(digits: data.DataSet) -> None:
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert digits.classes == tuple("0123456789")
    counts = np.bincount([digits.test[i][1] for i in range(360)], minlength=10)
    assert counts.min() >= 35
    assert counts.max() <= 37
    assert [digits.train[i][1] for i in range(8)] == [3, 9, 1, 3, 1, 9, 4, 4]
    assert digits.digest == data.load("digits").digest != ""
    image, _ = digits.train[0]
    assert (image.mode, image.size) == ("L", (8, 8))
    assert image.getextrema() == (0, 255)


def test_digits_have_the_mean_and_deviation_of_the_table(digits: data.DataSet) -> None:
    images, _ = next(iter(data.batches(digits.train, digits.preprocessing.evaluation(), 1437)))
    assert images.mean().item() == pytest.approx(0, abs=1e-3)
    assert images.std().item() == pytest.approx(1, abs=1e-3)


def test_a_folder_gives_classes_and_pictures(folder: Path) -> None:
    picture(folder / "train" / "ants" / "deep" / "er" / "3.gif", mode="P", color=3)
    picture(folder / "train" / "ants" / "no extension.png").rename(folder / "train" / "ants" / "no extension")
    (folder / "train" / "ants" / ".hidden").write_text("no picture")
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / "README.txt").write_text("beside the class folders")
    photographs = data.load(folder)
    assert photographs.classes == ("ants", "bees")
    assert (len(photographs.train), len(photographs.test)) == (8, 4)
    assert [photographs.train[i][1] for i in range(8)] == [0] * 5 + [1] * 3
    assert photographs.test[3][0].getpixel((0, 0)) == (100, 10, 0)
    assert photographs.skipped == ()
    assert data.load(str(folder)).classes == photographs.classes


@pytest.mark.parametrize("name", ["valid", "validation", "test"])
def test_the_held_out_half_has_several_names(folder: Path, name: str) -> None:
    (folder / "val").rename(folder / name)
    assert len(data.load(folder).test) == 4


def test_files_that_are_no_pictures_are_named(folder: Path) -> None:
    ants = folder / "train" / "ants"
    for i in range(12):
        (ants / f"note{i:02}.txt").write_text("not a picture")
    (ants / "a page.jpg").write_text("<html>")
    (folder / "val" / "bees" / "empty.png").touch()
    with pytest.raises(data.DataError, match="14 of 24 files") as caught:
        data.load(folder)
    message = str(caught.value)
    assert str(ants / "a page.jpg") in message
    assert message.count("note") == 9  # ten are named in all
    photographs = data.load(folder, skip_bad=True)
    assert len(photographs.skipped) == 14
    assert folder / "val" / "bees" / "empty.png" in photographs.skipped
    assert (len(photographs.train), len(photographs.test)) == (6, 4)


@worker_processes
def test_a_picture_cut_short_is_named_when_read_and_skipped_on_request(folder: Path) -> None:
    broken = folder / "train" / "bees" / "9.jpg"
    Image.effect_noise((64, 64), 50).save(broken)
    broken.write_bytes(broken.read_bytes()[:-500])
    photographs = data.load(folder)  # its header is whole
    assert len(photographs.train) == 7
    for workers in (0, 1):
        with pytest.raises(data.DataError, match=r"^cannot read the image .*9\.jpg") as caught:
            list(data.batches(photographs.train, photographs.preprocessing.evaluation(), 4, workers=workers))
        assert caught.value.__notes__ == ["--skip-bad, or skip_bad=True, leaves them out"]
    assert data.load(folder, skip_bad=True).skipped == (broken,)


def test_links_to_nowhere_are_bad_pictures(folder: Path) -> None:
    ants = folder / "train" / "ants"
    (ants / "gone.png").symlink_to(folder / "nowhere.png")
    (ants / "self.png").symlink_to(ants / "self.png")
    with pytest.raises(data.DataError, match=r"2 of 12 files .* are no pictures \(--skip-bad"):
        data.load(folder)
    assert data.load(folder, skip_bad=True).skipped == (ants / "gone.png", ants / "self.png")


def test_links_are_followed_but_not_round_in_circles(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    picture(elsewhere / "more" / "x.png")
    ants = folder / "train" / "ants"
    for link, target in (
        (elsewhere / "more" / "back", ants),
        (ants / "a link", elsewhere),
        (ants / "deep" / "up", ants),
        (ants / "all", folder),
    ):
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(target)
    photographs = data.load(folder)
    assert len(photographs.train) == 6 + 1
    assert isinstance(photographs.train, data._Files)
    assert photographs.train.files[1][0] == ants / "1.png"
    assert photographs.train.files[3][0] == ants / "a link" / "more" / "x.png"
    (folder / "train" / "wasps").symlink_to(folder / "train")
    picture(folder / "val" / "wasps" / "0.png")
    with pytest.raises(data.DataError, match=r"no pictures in .*wasps"):
        data.load(folder)


def test_a_file_that_the_system_refuses_is_not_taken_for_a_bad_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(data.DataError, match="Permission denied"):
        data.load(folder, skip_bad=True)


def test_classes_must_agree(folder: Path) -> None:
    picture(folder / "val" / "wasps" / "0.png")
    (folder / "val" / "bees").rename(folder / "val" / "Bees")
    with pytest.raises(data.DataError, match=r"only in .*train: bees; only in .*val: Bees, wasps"):
        data.load(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="names of bytes are Linux's")
def test_a_class_whose_name_is_no_text_is_named(folder: Path) -> None:
    for half in folder.iterdir():
        first = next(path for path in half.iterdir() if path.is_dir())
        first.rename(os.fsdecode(os.fsencode(half) + b"/caf\xe9"))
    with pytest.raises(data.DataError, match="is not UTF-8: rename it"):
        data.load(str(folder))


def test_layouts_that_are_no_data_set(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(data.DataError, match=r"must hold train/ and one of val/.*it holds ants/, bees/"):
        data.load(folder / "train")
    (tmp_path / "flat" / "train").mkdir(parents=True)
    (tmp_path / "flat" / "val").mkdir()
    with pytest.raises(data.DataError, match="train holds no folders"):
        data.load(tmp_path / "flat")
    for half in ("train", "val"):
        (tmp_path / "flat" / half / "ants").mkdir()
    with pytest.raises(data.DataError, match="train holds one class, ants"):
        data.load(tmp_path / "flat")
    (folder / "train" / "wasps").mkdir()
    (folder / "val" / "wasps").mkdir()
    with pytest.raises(data.DataError, match=r"no pictures in .*train.wasps"):
        data.load(folder)


def test_unknown_names_get_suggestions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(data.DataError, match="did you mean cifar10 or cifar100"):
        data.load("CIFAR-10")
    with pytest.raises(data.DataError, match=r"neither a folder nor a data set \(digits"):
        data.load(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    with pytest.raises(data.DataError, match="must hold train/"):
        data.load("./digits")


@pytest.mark.parametrize(
    ("name", "file"), [("mnist", "train-images-idx3-ubyte.gz"), ("cifar100", "cifar-100-python.tar.gz")]
)
def test_without_network_the_error_says_where_files_belong(
    name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(data.DataError, match=f"downloaded from http.*no route to host.*put .*{file}.* into") as e:
        data.load(name, root=tmp_path / "root")
    assert str(tmp_path / "root") in str(e.value)


def test_mnist_files(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for half, count in (("train", 5), ("t10k", 3)):
        header = struct.pack(">4i", 2051, count, 28, 28)
        (raw / f"{half}-images-idx3-ubyte").write_bytes(header + bytes(range(count)) * 784)
        (raw / f"{half}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + bytes(range(count)))
    mnist = data.load("mnist", root=tmp_path)
    assert mnist.classes == tuple("0123456789")
    assert (len(mnist.train), len(mnist.test)) == (5, 3)
    assert [mnist.test[i][1] for i in range(3)] == [0, 1, 2]
    images, labels = next(iter(data.batches(mnist.test, mnist.preprocessing.evaluation(), 2)))
    assert images.shape == (2, 1, 28, 28)
    assert labels.tolist() == [0, 1]


# One picture -----------------------------------------------------------------------------------------------


def test_read_image_turns_every_mode_into_grey_or_rgb(tmp_path: Path) -> None:
    for mode, color, file, expected in [
        ("L", 200, "grey.png", 200),
        ("LA", (200, 10), "grey alpha.png", 200),
        ("1", 1, "bits.png", 255),
        ("I;16", 200 * 256, "sixteen.png", 200),
        ("RGB", (200, 100, 0), "rgb.png", (200, 100, 0)),
        ("RGBA", (200, 100, 0, 10), "rgba.png", (200, 100, 0)),
        ("CMYK", (0, 0, 0, 255), "cmyk.tif", (0, 0, 0)),
    ]:
        assert data.read_image(picture(tmp_path / file, color=color, mode=mode)).getpixel((0, 0)) == expected
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 100, 0])
    palette.save(tmp_path / "palette.png", transparency=bytes([0, 255]))
    assert data.read_image(tmp_path / "palette.png").getpixel((0, 0)) == (200, 100, 0)


def test_read_image_knows_a_pgm_of_16_bits(tmp_path: Path) -> None:
    levels = (np.arange(256, dtype=np.uint16) * 256).reshape(16, 16)
    (tmp_path / "x.pgm").write_bytes(b"P5 16 16 65535\n" + levels.astype(">u2").tobytes())
    assert np.array_equal(np.asarray(data.read_image(tmp_path / "x.pgm")), levels >> 8)


def test_read_image_stands_a_photograph_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    Image.new("RGB", (40, 30)).save(tmp_path / "turned.jpg", exif=exif)
    assert data.read_image(tmp_path / "turned.jpg").size == (30, 40)


def test_read_image_names_what_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match=r"no such image file: .*gone\.png"):
        data.read_image(tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(data.DataError, match=r"not an image .*text\.png"):
        data.read_image(tmp_path / "text.png")
    picture(tmp_path / "float.tif", color=0.5, mode="F")
    with pytest.raises(data.DataError, match=r"float\.tif.*no fixed range"):
        data.read_image(tmp_path / "float.tif")


# Preprocessing ---------------------------------------------------------------------------------------------


def test_evaluation_is_torchvisions_own_recipe() -> None:
    image = Image.effect_noise((300, 400), 60).convert("RGB")
    recipe = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    found = data.Preprocessing().evaluation()(image)
    assert type(found) is torch.Tensor
    assert torch.equal(found, recipe(image))
    assert torch.equal(found, data.Preprocessing().evaluation()(v2.functional.pil_to_tensor(image)))
    assert torch.equal(found, data.Preprocessing().evaluation()(np.asarray(image)))


def test_bytes_normalised_on_the_device_are_the_same() -> None:
    prepare, image = data.Preprocessing(), Image.effect_noise((300, 400), 60).convert("RGB")
    later = augment.normalize(prepare.mean, prepare.std)(prepare.bytes()(image)[None], random.key(0))
    assert torch.equal(later[0], prepare.evaluation()(image))


def test_preprocessing_survives_json() -> None:
    for prepare in (data.Preprocessing(), data.Preprocessing(8, 1, None, (0.5,), (0.25,), "nearest")):
        assert data.Preprocessing.from_dict(json.loads(json.dumps(prepare.to_dict()))) == prepare
    stored = {**data.Preprocessing().to_dict(), "crop": 3}
    with pytest.raises(data.DataError, match="crop, std"):
        data.Preprocessing.from_dict({name: value for name, value in stored.items() if name != "std"})


@pytest.mark.parametrize(
    "wrong",
    [
        {"channels": 2},
        {"channels": 1},
        {"std": (0.0, 1.0, 1.0)},
        {"size": 0},
        {"resize": 200},
        {"interpolation": "cubic"},
    ],
)
def test_preprocessing_refuses_what_does_not_fit(wrong: dict[str, Any]) -> None:
    with pytest.raises(data.DataError):
        data.Preprocessing(**wrong)


@pytest.mark.parametrize("name", data.names())
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (8, 3), (48, 1), (48, 3)])
def test_every_set_adapts_to_every_network(name: str, size: int, channels: int) -> None:
    settings, augmentation = data._SETTINGS[name]
    prepare = settings.adapt(size=size, channels=channels)
    for image in (Image.new("L", (9, 30)), Image.new("RGBA", (90, 60)), Image.new("RGB", (1, 200))):
        for transform in (prepare.evaluation(), prepare.training(augmentation)):
            tensor = transform(image)
            assert (tensor.shape, tensor.dtype) == ((channels, size, size), torch.float32)


def test_adapt_keeps_proportions_and_normalisation() -> None:
    prepare = data.Preprocessing()
    assert prepare.adapt() == prepare
    assert (prepare.adapt(size=112).resize, prepare.adapt(size=299).resize) == (128, 342)
    grey = prepare.adapt(channels=1)
    assert grey.mean == pytest.approx((0.45891,), abs=1e-4)
    assert grey.adapt(channels=3).mean == grey.mean * 3
    with pytest.raises(data.DataError, match="1 or 3, not 4"):
        prepare.adapt(channels=4)


# Batches ---------------------------------------------------------------------------------------------------


def everything(batches: data.Batches) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [4, 4, 2]), (True, [4, 4])])
def test_batches_in_order(drop_last: bool, sizes: list[int]) -> None:
    examples = [(Image.new("L", (8, 8), i), i) for i in range(10)]
    batches = data.batches(examples, v2.PILToTensor(), 4, drop_last=drop_last)
    assert len(batches) == len(sizes)
    assert [len(images) for images, _ in batches] == sizes
    images, labels = everything(batches)
    assert labels.dtype == torch.int64
    assert labels.tolist() == images[:, 0, 0, 0].tolist() == list(range(sum(sizes)))


@worker_processes
def test_a_key_alone_decides_order_and_augmentation(digits: data.DataSet) -> None:
    examples = [digits.train[i] for i in range(50)]
    transform = digits.preprocessing.training(digits.augmentation)

    def run(seed: int, batch_size: int = 16, workers: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        key = random.key(seed)
        return everything(data.batches(examples, transform, batch_size, key=key, workers=workers))

    images, labels = run(0)
    assert sorted(labels.tolist()) == sorted(label for _, label in examples)
    for again in (run(0), run(0, batch_size=7), run(0, workers=2)):
        assert torch.equal(again[0], images)
        assert torch.equal(again[1], labels)
    assert not torch.equal(run(1)[0], images)
    batches = data.batches(examples, transform, 16, key=random.key(0))
    assert torch.equal(everything(batches)[0], everything(batches)[0])


def test_every_picture_is_varied_on_its_own_and_anew_with_every_key(digits: data.DataSet) -> None:
    examples = [digits.train[0]] * 20
    transform = digits.preprocessing.training(digits.augmentation)
    first, _ = everything(data.batches(examples, transform, 20, key=random.key(0)))
    second, _ = everything(data.batches(examples, transform, 20, key=random.key(1)))
    assert len(torch.cat([first, second]).unique(dim=0)) == 40


@worker_processes
@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generator_is_left_alone(digits: data.DataSet, workers: int) -> None:
    transform = digits.preprocessing.training(digits.augmentation)
    examples = [digits.train[i] for i in range(8)]
    before = torch.get_rng_state()
    list(data.batches(examples, transform, 4, key=random.key(0), workers=workers))
    assert torch.equal(torch.get_rng_state(), before)
    list(data.batches(examples, digits.preprocessing.evaluation(), 4, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


@worker_processes
def test_threads_do_not_draw_each_others_numbers(digits: data.DataSet) -> None:
    examples = [digits.train[i] for i in range(100)]
    transform = digits.preprocessing.training(digits.augmentation)

    def run(seed: int, workers: int = 0) -> torch.Tensor:
        return everything(data.batches(examples, transform, 50, key=random.key(seed), workers=workers))[0]

    before = torch.get_rng_state()
    with ThreadPoolExecutor(3) as pool:
        others = pool.map(run, range(8))
        mine = [run(seed, workers=1) for seed in range(2)]  # while others draw, a process is begun
        together = list(others)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(images, run(seed)) for seed, images in (*enumerate(together), *enumerate(mine)))


@worker_processes
def test_workers_of_a_pools_threads_end_well(digits: data.DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else torch raises in the main thread, wherever that is."""
    codes: list[int | None] = []
    shut_down = dataloader._MultiProcessingDataLoaderIter._shutdown_workers

    def note(self: Any) -> None:
        workers = list(self._workers)
        shut_down(self)
        codes.extend(worker.exitcode for worker in workers)

    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter, "_shutdown_workers", note)
    examples, transform = [digits.train[i] for i in range(6)], digits.preprocessing.evaluation()
    with ThreadPoolExecutor(3) as pool:
        several = list(pool.map(lambda _: everything(data.batches(examples, transform, 2, workers=1)), range(6)))
    assert all(torch.equal(images, several[0][0]) for images, _ in several)
    assert len(codes) >= 6
    assert set(codes) == {0}


def test_resident_pictures_are_those_of_batches(digits: data.DataSet) -> None:
    prepare = digits.preprocessing.adapt(size=12)
    expected = list(data.batches(digits.test, prepare.evaluation(), 50))
    ready = data.resident(digits.test, 50, preprocessing=prepare, as_bytes=False)
    stored = data.resident(digits.test, 50, preprocessing=prepare)
    scale = augment.normalize(prepare.mean, prepare.std)
    for (x, labels), (y, same), (z, _) in zip(expected, ready, stored, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(labels, same)
        assert z.dtype == torch.uint8
        torch.testing.assert_close(scale(z, random.key(0)), x)


def test_means_are_those_of_the_channels() -> None:
    with pytest.raises(ValueError, match="2 means and 1 deviations"):
        augment.normalize([0.1, 0.2], [0.3])
    with pytest.raises(ValueError, match="normalize has 3 means, and the images have 1 channels"):
        augment.normalize([0.1] * 3, [0.3] * 3)(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), random.key(0))


def test_batches_that_cannot_be() -> None:
    examples = [(Image.new("L", (8, 8)), 0)] * 3
    for wrong in ({"batch_size": 0}, {"batch_size": 4, "workers": -1}, {"batch_size": 4, "drop_last": True}):
        with pytest.raises(data.DataError):
            data.batches(examples, v2.PILToTensor(), **wrong)  # type: ignore[arg-type]
    for size in (0, -1):
        with pytest.raises(data.DataError, match=f"batch_size must be at least 1, not {size}"):
            data.resident(examples, size, preprocessing=data.Preprocessing())
    with pytest.raises(data.DataError, match="0 pictures make no batch of 4"):
        data.resident([], 4, preprocessing=data.Preprocessing())
    with pytest.raises(data.DataError, match="0 pictures"):
        data.batches([], v2.PILToTensor(), 4)
