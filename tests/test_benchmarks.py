"""The races run at toy size, and their table says what was measured. How fast they are is no test's business."""

import importlib
import warnings
from pathlib import Path

import pytest
import torch

from tests.benchmarks import picture, table
from tests.benchmarks.__main__ import FIRST_ON_GPU, RACES
from tests.benchmarks.race import Row, Setting, check, rows, take_turns

TOY = Setting(toy=True, seconds=0.0)


@pytest.mark.parametrize("name", [name for name in RACES if name != "B8"])  # which starts processes
def test_race_runs(name: str) -> None:
    module = importlib.import_module(f"tests.benchmarks.{RACES[name]}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers'
        found = list(module.run(TOY))
    assert found
    for row in found:
        assert row.race == name
        assert row.ratio is not None
        assert row.ratio > 0
        assert row.machine
        assert row.versions
    assert len({row.key for row in found}) == len(found)


def test_first_compiled_step() -> None:
    from tests.benchmarks.b8_compile import first_step

    times = [first_step("squeezenet1_1", side, "cpu", True) for side in ("ours", "torchvision")]
    torch.compiler.reset()
    assert min(times) > 0


def test_order_on_a_gpu() -> None:
    """The most wanted first; B9 is a CPU's."""
    assert FIRST_ON_GPU[:5] == ("B3", "B4", "B2", "B5", "B1")
    assert set(FIRST_ON_GPU) == set(RACES) - {"B9"}


def test_turns() -> None:
    """Each has the same number, and none always follows the same one."""
    order: list[str] = []
    runners = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = take_turns(TOY, runners, warmup=1)
    assert {len(each) for each in times.values()} == {1}
    order.clear()
    take_turns(Setting(seconds=0.0), runners, warmup=0)
    assert "".join(order).startswith("abcbcacab")
    assert {order.count(name) for name in "abc"} == {5}


def test_check() -> None:
    one = {"a": torch.ones(2)}
    check(one, {"a": torch.ones(2) + 1e-6})
    with pytest.raises(AssertionError, match="differs by up to 1"):
        check(one["a"], torch.zeros(2), exact=True)
    with pytest.raises(AssertionError):
        check(one, {"a": torch.zeros(2)})


def row(what: str, ratio: float | None, **others: str) -> Row:
    return Row(
        "B9", what, "torchvision", 1.0, 2.0, 0.8, ratio, 5, machine="a machine", versions="v", date="d"
    )._replace(**others)


def test_ratio_is_of_rounds() -> None:
    (found,) = rows(TOY, "B9", "nothing", lambda: None, {"peer": lambda: None}, goals={"peer": 0.5})
    assert found.ratio == pytest.approx(found.ours / found.theirs)  # type: ignore[operator]
    assert found.goal == 0.5


class TestTable:
    def test_new_rows_replace_old_ones(self) -> None:
        old = [row("x", 0.9), row("y", 0.8)]
        assert [each.ratio for each in table.merge(old, [row("x", 0.7)])] == [0.7, 0.8]

    def test_another_machine_has_its_own_row(self) -> None:
        assert len(table.merge([row("x", 0.9)], [row("x", 0.7, machine="another")])) == 2

    def test_not_measured_goes_once_it_is(self) -> None:
        missing = Row("B9", "all", "", note="not measured: no GPU", device="cuda")
        assert missing in table.merge([row("x", 0.9)], [missing])
        assert missing not in table.merge([missing], [row("x", 0.9, device="cuda")])

    def test_render(self) -> None:
        missing = Row("B3", "all", "", note="not measured: no GPU")
        found = [row("x", 0.7), row("y", 0.9), row("x", 0.6, machine="a GPU", device="cuda", note="of 1.0")]
        text = table.render([missing, *found])
        assert "All: not measured: no GPU." in text
        assert "| what | against | goal | a | b |" in text
        assert "| x | torchvision (of 1.0) | 0.80 | 0.70 | 0.60 (1 ms, 2 ms) |" in text
        assert "| y | torchvision | 0.80 | **0.90** |  |" in text  # the goal was missed
        assert text.endswith("a: a machine; v; d.  \nb: a GPU; v; d.\n")

    def test_round_trip_and_page(self, tmp_path: Path) -> None:
        file, page = tmp_path / "rows.json", tmp_path / "page.md"
        table.write(file, [row("x", 0.7)])
        assert table.read(file) == [row("x", 0.7)]
        page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
        table.update(table.read(file), page)
        text = page.read_text()
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert "old" not in text
        assert text.count(table.BEGIN) == text.count(table.END) == 1


def test_picture(tmp_path: Path) -> None:
    old = row("x", 0.9, date="2026-01-01")
    new = row("x", 0.7, date="2026-01-02", machine="another")
    missing = Row("B3", "all", "", note="not measured: no GPU")
    assert picture.latest([new, old, missing]) == [new]
    picture.draw([new, old, missing], tmp_path / "races.png")
    assert (tmp_path / "races.png").read_bytes().startswith(b"\x89PNG")
