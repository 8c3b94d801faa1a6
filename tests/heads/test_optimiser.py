"""AdamW, the schedule and early stopping of a stack are torch's own for each head."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmfeat.heads.registry import HeadSettings
from mmfeat.heads.training import StackedAdamW, Stopper


@pytest.mark.parametrize("way", ["_fused", "_together"])
def test_the_optimiser_is_torchs_for_each_head(way: str) -> None:
    """Own learning rates and weight decays, two rates a head, a schedule, and heads that leave halfway."""
    random_numbers = torch.Generator().manual_seed(0)
    shapes, decay = [(4, 5, 3), (4, 1, 3)], [0.0, 0.05, 0.5, 0.1]
    rates = [[1e-2, 3e-3, 1e-3, 0.1], [1e-3, 3e-3, 1e-4, 1e-2]]
    parameters = [torch.randn(shape, generator=random_numbers).requires_grad_() for shape in shapes]
    separate = [[p[head].detach().clone().requires_grad_() for p in parameters] for head in range(4)]
    torchs = [
        torch.optim.AdamW(
            [{"params": [p], "lr": r[head]} for p, r in zip(own, rates, strict=True)], weight_decay=decay[head]
        )
        for head, own in enumerate(separate)
    ]
    stacked = StackedAdamW(parameters, list(torch.tensor(rates).double()), torch.tensor(decay).double())
    running = [0, 1, 2, 3]
    for number in range(8):
        if number == 4:
            stay = torch.tensor([3, 1])
            running = stay.tolist()
            parameters = [p.detach()[stay].requires_grad_() for p in parameters]
            stacked.keep(stay, parameters)
        scale = 0.5 ** (number // 3)
        gradients = [torch.randn(p.shape, generator=random_numbers) for p in parameters]
        stacked.steps += 1
        getattr(stacked, way)(gradients, torch.full((len(running),), scale, dtype=torch.float64))
        for place, head in enumerate(running):
            for own, gradient, group, rate in zip(
                separate[head], gradients, torchs[head].param_groups, rates, strict=True
            ):
                own.grad, group["lr"] = gradient[place].clone(), rate[head] * scale
            torchs[head].step()
    for place, head in enumerate(running):
        for together, own in zip(parameters, separate[head], strict=True):
            torch.testing.assert_close(together[place], own, rtol=1e-6, atol=1e-7)


def test_heads_that_are_alike_take_a_step_together() -> None:
    """One call for all of them gives what a call each gives."""
    gradients = [torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(number)) for number in range(4)]
    found = []
    for scales in ([1.0, 1.0, 1.0], [1.0, 1.0, 0.5]):
        parameter = torch.ones(3, 4, 5)
        optimiser = StackedAdamW([parameter], [torch.full((3,), 0.1).double()], torch.full((3,), 0.2).double())
        for gradient in gradients:
            optimiser.step([gradient], torch.tensor(scales).double())
        found.append(parameter)
    assert torch.equal(found[0][:2], found[1][:2])
    assert not torch.equal(found[0][2], found[1][2])


def scores(seed: int) -> np.ndarray:
    """Zeros, ties and falls; in every second one also rises too small to count."""
    numbers = np.random.default_rng(seed)
    steps = np.maximum(numbers.integers(-2, 9, 40), 0) / 8
    return np.maximum.accumulate(steps) + numbers.integers(0, 9, 40) / 2e5 if seed % 2 else steps


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("seed", range(8))
def test_the_schedule_is_torchs_reduce_on_plateau(seed: int, sign: int) -> None:
    """Of a score that should rise, or of a loss that should fall."""
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    mode = "max" if sign > 0 else "min"
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, mode, 0.5, patience=1, eps=0.0)
    stopper = Stopper(HeadSettings(epochs=100, patience=100))
    for epoch, score in enumerate(scores(seed) if sign > 0 else 3 - scores(seed)):
        schedule.step(score)
        stopper.update(epoch, sign * score)
        assert stopper.scale == optimiser.param_groups[0]["lr"]


def test_a_head_stops_after_epochs_without_a_better_score() -> None:
    """Better means by more than min_delta, and than the best, not than the last."""
    line = [0.0, 0.3, 0.35, 0.5, 0.55, 0.59, 0.2, 0.9]
    stopper = Stopper(HeadSettings(epochs=100, patience=3, min_delta=0.1))
    better = []
    for epoch, score in enumerate(line):
        better.append(stopper.update(epoch, score))
        if stopper.done:
            break
    assert better == [True, True, False, True, False, False, False]
    assert stopper.best_epoch == 3
    short = Stopper(HeadSettings(epochs=2))
    assert [(short.update(epoch, 0.1 * epoch), short.done) for epoch in range(2)] == [(True, False), (True, True)]
