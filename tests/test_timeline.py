"""The history: groups, published results and their sources, on the command line and in the page."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import purecnn
from converters import cli
from purecnn.model import find
from purecnn.paper import Group
from tests.table import TABLE

DOCS = Path(__file__).parent.parent / "docs"
METRICS = {"top-1 error", "top-1 accuracy", "top-5 error", "test error", "test accuracy"}
DATA = {"ImageNet", "CIFAR-10", "MNIST", "zip codes"}

Row = dict[str, Any]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return cli.timeline(purecnn.list_models())


def call(*words: str) -> Result:
    result = CliRunner().invoke(cli.app, ["list", *words])
    assert result.exit_code == 0, result.output
    return result


def test_every_network_is_there_once(rows: list[Row]) -> None:
    assert sorted(row["name"] for row in rows) == sorted(purecnn.list_models())


def test_order_is_by_year_and_then_by_group(rows: list[Row]) -> None:
    order = list(Group)
    keys = [(row["year"], order.index(row["groups"][0])) for row in rows]
    assert keys == sorted(keys)


def test_parameters_are_those_of_the_table(rows: list[Row]) -> None:
    assert {row["name"]: row["parameters"] for row in rows} == {name: row.parameters for name, row in TABLE.items()}


@pytest.mark.parametrize("name", purecnn.list_models())
def test_groups(name: str) -> None:
    """Each paper has some, in their order; those of the survey's papers are the survey's."""
    paper, order = find(name).paper, list(Group)
    assert paper.groups
    assert list(paper.groups) == sorted(set(paper.groups), key=order.index)
    if paper.in_survey:
        assert all(group.in_survey for group in paper.groups)


def test_the_survey_has_seven_groups() -> None:
    """Abstract of arXiv:1901.06032."""
    assert [group.value for group in Group if group.in_survey] == [
        "spatial exploitation",
        "depth",
        "multi-path",
        "width",
        "feature-map exploitation",
        "channel boosting",
        "attention",
    ]


def test_every_network_has_a_published_result_with_its_source(rows: list[Row]) -> None:
    for row in rows:
        published = row["published"]
        assert published is not None, row["name"]
        assert 0 < published["value"] < 100
        assert published["metric"] in METRICS
        assert published["data"] in DATA
        assert published["source"]
        assert published["metric"].startswith("top-") == (published["data"] == "ImageNet")


def test_torchvisions_weights_stand_near_the_papers_results(rows: list[Row]) -> None:
    """Two sources for one network: the nearest of torchvision's is within four points.

    The farthest is ``resnext101_64x4d``, which torchvision has trained with its later, longer recipe alone.
    """
    both = 0
    for row in rows:
        published, scores = row["published"], [score["acc@1"] for score in row["weights"].values() if score]
        if find(row["name"]).published is None or not scores or not published["metric"].startswith("top-1"):
            continue
        value = published["value"]
        accuracy = 100 - value if published["metric"].endswith("error") else value
        assert min(abs(accuracy - score) for score in scores) < 4, row["name"]
        both += 1
    assert both > 40


def test_command() -> None:
    output = call("lenet5*", "--timeline").output
    assert re.search(r"1998\s+spatial exploitation\s+lenet5_1998\s+60,000\s+0\.95 test error\s+MNIST\s+authors", output)
    output = call("resnet18", "--timeline").output
    assert re.search(r"depth, multi-path\s+resnet18\s+11,689,512\s+69\.758 top-1 accuracy\s+ImageNet\s+torchv", output)
    assert "arXiv:1901.06032" in output
    assert re.search(r"mobile\s+squeezenet1_0 \*", call("squeezenet*", "--timeline").output)


def test_command_for_scripts() -> None:
    (row,) = json.loads(call("shufflenet_v2_x1_0", "--timeline", "--json").stdout)
    assert row == {
        "year": 2018,
        "groups": ["mobile"],
        "in_survey": False,
        "name": "shufflenet_v2_x1_0",
        "parameters": 2278604,
        "published": {
            "value": 30.6,
            "metric": "top-1 error",
            "data": "ImageNet",
            "source": "authors' repository",
        },
        "paper": "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design",
        "reference": "arXiv:1807.11164",
        "weights": {"IMAGENET1K_V1": {"acc@1": 69.362, "acc@5": 88.316}},
    }


def test_the_page_says_what_the_code_says(rows: list[Row]) -> None:
    """Else run ``python docs/make_history.py``."""
    page = (DOCS / "history.md").read_text()
    assert runpy.run_path(str(DOCS / "make_history.py"))["filled"](page, rows) == page


def test_a_year_without_a_place_in_the_page(rows: list[Row]) -> None:
    filled = runpy.run_path(str(DOCS / "make_history.py"))["filled"]
    with pytest.raises(ValueError, match="no table for 1998"):
        filled("<!-- 1989 -->\n<!-- end -->\n", [row for row in rows if row["year"] < 2000])
