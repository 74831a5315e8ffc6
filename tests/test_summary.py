"""The summary counts what each layer does, and for nobody else."""

import pytest

import purecnn
from purecnn import Model, numbered, serial
from purecnn.layers import conv, global_avg_pool, linear, relu
from purecnn.summary import summarize
from tests.table import CASES, Case


def test_layers_without_a_name_count_for_what_they_are_in() -> None:
    stage = numbered(serial(conv(8, 3), conv=conv(8, 1)), relu)
    layer = serial(conv(8, 3), stage1=stage, head=serial(global_avg_pool, linear=linear(5)))
    rows = {row.path: row for row in summarize(Model.of(layer, num_classes=5, image_size=8))}
    pixels, first, second, third, last = 8 * 8, 3 * 8 * 9, 8 * 8 * 9, 8 * 8, 8 * 5
    assert rows["stage1.0.conv"].macs == pixels * third
    assert rows["stage1.0"].macs == rows["stage1"].macs == pixels * (second + third)
    assert rows["head"].macs == rows["head.linear"].macs == last
    assert rows[""].macs == pixels * (first + second + third) + last


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_parts_make_up_the_whole(case: Case) -> None:
    model = case.model()
    rows = summarize(model)
    parts = [row for row in rows if row.path and "." not in row.path]
    assert sum(row.macs for row in parts) == rows[0].macs
    auxiliary = sum(purecnn.tree.size(leaves) for name, leaves in model.spec()[0].items() if name.startswith("aux"))
    assert sum(row.parameters for row in parts) == rows[0].parameters - auxiliary
