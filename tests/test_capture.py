"""Laws of a step that is recorded: on a CPU its tensors are used in the same way, without the recording."""

from typing import Any

import pytest
import torch

from purecnn import random, tree
from purecnn.capture import captured
from purecnn.optimizers import adamw, clipped, sgd
from purecnn.precision import POLICIES
from purecnn.step import TrainState, make_step
from purecnn.training import fit
from tests.test_training import TINY, batch, equal, start

SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (sgd(0.1, momentum=0.9), {}),
    "adamw, clipped, with a mean": (clipped(adamw(1e-2), 1.0), {"average": 0.9}),
    "half precision": (sgd(0.1), {"policy": POLICIES["float16"]}),
}
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"))


def begun(optimizer: Any, settings: dict[str, Any], device: str = "cpu") -> TrainState:
    params, state = TINY.init(random.key(0, device))
    policy = settings.get("policy")
    return TrainState.start(params, state, optimizer, policy=policy, average="average" in settings)


@pytest.mark.parametrize("donate", [True, False], ids=["donating", "pure"])
@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", SETTINGS)
def test_recorded_steps_are_steps(name: str, device: str, donate: bool) -> None:
    optimizer, settings = SETTINGS[name]
    plain = make_step(TINY, optimizer, compile=False, **settings)
    recorded = captured(make_step(TINY, optimizer, compile=False, donate=donate, **settings))
    key = random.key(1, device)
    a, b = (begun(optimizer, settings, device) for _ in range(2))
    first = tree.map(torch.clone, b._asdict())
    for i in range(5):
        images, labels = (each.to(device) for each in batch(i))
        if i == 3:  # the last of an epoch
            images, labels = images[:3], labels[:3]
        a, expected = plain(a, (images, labels), key)
        b, metrics = recorded(b, (images, labels), key)
        torch.testing.assert_close(metrics.loss, expected.loss, rtol=0 if device == "cpu" else 1e-5, atol=0)
        assert int(b.step) == i + 1
    if device == "cpu":
        assert equal(a, b)
    else:
        tree.map(torch.testing.assert_close, a._asdict(), b._asdict())
    assert equal(TrainState(**first), begun(optimizer, settings, device)), "the first train state was overwritten"


def test_a_train_state_may_come_from_elsewhere() -> None:
    optimizer = sgd(0.1, momentum=0.9)
    recorded, plain = captured(make_step(TINY, optimizer, donate=True)), make_step(TINY, optimizer)
    now, earlier = start(TINY, optimizer), start(TINY, optimizer)
    for i in range(3):
        now, _ = recorded(now, batch(i), random.key(1))
    again, metrics = recorded(earlier, batch(7), random.key(1))
    expected, reference = plain(earlier, batch(7), random.key(1))
    assert again is now
    assert equal(again, expected)
    assert torch.equal(metrics.loss, reference.loss)


def test_other_train_states_are_refused() -> None:
    optimizer = sgd(0.1, momentum=0.9)
    recorded = captured(make_step(TINY, optimizer))
    train_state, _ = recorded(start(TINY, optimizer), batch(0), random.key(1))
    with pytest.raises(ValueError, match=r"other tensors: opt_state\.momentum"):
        recorded(train_state._replace(opt_state={"step": train_state.step}), batch(0), random.key(1))
    with pytest.raises(ValueError, match=r"other tensors: step \(expected \(\), found \(1,\)\)"):
        recorded(train_state._replace(step=train_state.step[None]), batch(0), random.key(1))


def test_a_training_is_the_same() -> None:
    def run(capture: bool) -> Any:
        def train(key: Any) -> Any:
            return [batch(i, 6 if i < 2 else 4) for i in range(3)]

        optimizer = adamw(1e-2)
        return fit(TINY, optimizer, train, [batch(9)], epochs=2, key=random.key(0), average=0.9, capture=capture)

    recorded, plain = run(True), run(False)
    assert equal(recorded.train_state, plain.train_state)
    assert equal(recorded.best, plain.best)
    assert [row[:-1] for row in recorded.history] == [row[:-1] for row in plain.history]
