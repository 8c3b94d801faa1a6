"""A stacked head is the head trained alone, which is an ordinary torch model with torch's own optimiser."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmfeat.errors import HeadError
from mmfeat.evaluation.decisions import plain_choice
from mmfeat.evaluation.metrics import macro_f1
from mmfeat.heads import training as drawing
from mmfeat.heads.data import HeadData
from mmfeat.heads.fusions import HIDDEN, Concat, LinearFusion
from mmfeat.heads.registry import FUSIONS, NEEDS_TOKENS, HeadSettings, load_fusion
from mmfeat.heads.stack import Member, Trained, _Stack, predict_stack, train_stack
from mmfeat.heads.tokens import CompactTokens
from mmfeat.heads.training import Draws, class_weights, draw_epoch, draw_pieces
from mmfeat.samples.labels import Targets
from tests.heads.toy_features import MULTILABEL, SAMPLES, TARGETS, TEST, TRAIN, VALIDATION, features, with_tokens

STEPS = 4
TOLERANCE = 2e-4  # of weights, which move by 1e-3 a step: sums of float32 come out in another order
KINDS = [*((name, "") for name in FUSIONS if name != NEEDS_TOKENS), (NEEDS_TOKENS, "tokens"), (NEEDS_TOKENS, "pooled")]
EVERYTHING = np.arange(SAMPLES)


@cache
def data(modality: str = "both", attend: str = "", missing: float = 0.2, views: int = 1) -> HeadData:
    seen = HeadData(with_tokens(features(missing, views=views), width=80, missing=0.1), modality, "cpu", attend)
    return seen.compacted(partial(CompactTokens, device="cpu")) if attend == "tokens" else seen


def members() -> list[Member]:
    """Heads that differ in fold, seed and every setting that heads of a stack may differ in."""
    differences: list[dict[str, float | str]] = [
        {"modality_dropout": 0.3, "class_weights": "inverse"},
        {"learning_rate": 3e-3, "weight_decay": 0.2, "class_weights": "none", "epochs": 2},
        {"dropout": 0.1, "label_smoothing": 0.1, "min_delta": 0.5, "patience": 1},
        {"attention_learning_rate": 1e-3, "dropout": 0.0, "focal_gamma": 1.0},
    ]
    made = []
    for number, own in enumerate(differences):
        rows = np.random.default_rng(number).permutation(SAMPLES)
        settings = replace(HeadSettings(batch_size=16, epochs=3), **own)
        held_out = rows[100 : 130 + 5 * number]
        made.append(Member(settings, rows[: 64 - number], held_out, (3, number % 2, number), STEPS))
    return made


def assert_same(first: Trained, second: Trained, kind: tuple[str, str], seen: HeadData) -> None:
    assert first.best_epoch == second.best_epoch
    assert [line["validation_macro_f1"] for line in first.history] == pytest.approx(
        [line["validation_macro_f1"] for line in second.history]
    )
    for name, value in first.tensors.items():
        torch.testing.assert_close(
            value, second.tensors[name], rtol=0, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )
    one, other = (
        predict_stack(load_fusion(kind[0]), 3, seen, [each.tensors], [EVERYTHING])[0] for each in (first, second)
    )
    np.testing.assert_allclose(one, other, rtol=0, atol=10 * TOLERANCE)


@pytest.mark.parametrize(
    ("modality", "products"),
    [("both", "bfloat16"), ("text", "float32"), ("image", "float32")],
)
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_a_stacked_head_is_the_head_trained_alone(kind: tuple[str, str], modality: str, products: str) -> None:
    """With missing vectors, augmented views and heads that leave the stack before the others; in either arithmetic."""
    fusion, seen, heads = load_fusion(kind[0]), data(modality, kind[1]), members()
    together = train_stack(fusion, seen, TARGETS, heads, products=products)
    assert len({len(trained.history) for trained in together}) > 1
    for member, trained in zip(heads, together, strict=True):
        (alone,) = train_stack(fusion, seen, TARGETS, [member], products=products)
        assert_same(alone, trained, kind, seen)


@pytest.mark.parametrize("targets", [TARGETS, MULTILABEL], ids=["one", "several"])
def test_a_linear_head_from_class_names_is_stacked_as_alone(targets: Targets) -> None:
    """Beside heads that start at random; each starts from the statistics of its own training rows."""
    seen = with_tokens(features(0.2), missing=0.1)
    random = np.random.default_rng(3)
    classes = {block.name: random.standard_normal((3, block.width)).astype(np.float32) for block in seen.blocks}
    named = HeadData(replace(seen, classes=classes))
    init = ["zero-shot", "random", "zero-shot", "zero-shot"]
    heads = [replace(each, settings=replace(each.settings, init=i)) for each, i in zip(members(), init, strict=True)]
    for member, trained in zip(heads, train_stack(LinearFusion, named, targets, heads), strict=True):
        (alone,) = train_stack(LinearFusion, named, targets, [member])
        assert_same(alone, trained, ("linear", ""), named)
    first = train_stack(LinearFusion, named, targets, [replace(heads[0], settings=members()[0].settings)])[0]
    assert not torch.allclose(first.tensors["output.weight"], alone.tensors["output.weight"], atol=0.1)


def test_long_epochs_are_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as long for a head alone as in a stack, so that both draw the same; what is drawn is small."""
    monkeypatch.setattr(drawing, "DECISIONS", 3 * 16 * Concat.units)
    own = [Draws(each.entropy, each.train, each.settings, Concat.units) for each in members()[:2]]
    pieces = list(draw_pieces(own, 7, 1, 2, "cpu"))
    assert [piece.keep.shape for piece in pieces] == [(2, steps, 16, Concat.units) for steps in (3, 3, 1)]
    assert sum(len(list(piece.steps())) for piece in pieces) == 7
    for member, trained in zip(members(), train_stack(Concat, data(), TARGETS, members()), strict=True):
        (alone,) = train_stack(Concat, data(), TARGETS, [member])
        assert_same(alone, trained, ("concat", ""), data())


def test_a_gpu_gets_the_draws_of_a_cpu() -> None:
    """Though threads fill the decisions of its heads side by side; `cpu:0` stands for a device that is not the CPU."""
    both = []
    for device in ("cpu", "cpu:0"):
        own = [Draws(each.entropy, each.train, each.settings, Concat.units) for each in members()]
        both.append([draw_epoch(own, STEPS, 1, 2, device) for _ in range(2)])
    for one, other in zip(*both, strict=True):
        for name, value in vars(one).items():
            torch.testing.assert_close(getattr(other, name), value, rtol=0, atol=0)


class Copies(TorchDispatchMode):
    """Notes what is copied to another device; refuses float64 anywhere but on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = ([x for x in tree_leaves(some) if isinstance(x, Tensor)] for some in ((args, kwargs), out))
        assert not any(x.dtype == torch.float64 and x.device.type != "cpu" for x in made), func
        if {x.device for x in given} != {x.device for x in made} and given:
            self.shapes += [x.shape for x in made]
        return out


@pytest.mark.parametrize(("name", "views"), [("concat", 0), *((name, 2) for name in FUSIONS)])
def test_training_stays_on_its_device(name: str, views: int) -> None:
    """On torch's device without values, which like a GPU refuses operations between devices: an epoch copies its draws
    there and nothing else, uses no float64, which Apple's GPUs lack, and reads nothing before its end."""
    attend = "pooled" if name == NEEDS_TOKENS else ""
    seen, plain = (HeadData(features(0.2, views=views), "both", device, attend) for device in ("meta", "cpu"))
    unit = name == "linear"  # statistics need values
    seen._statistics = {(each.train.tobytes(), unit): plain.statistics(each.train, unit) for each in members()}
    stack = _Stack(load_fusion(name), seen, TARGETS, members())
    for running in ([0, 1, 2, 3], [1, 2]):  # only the first head loses modalities
        stack._keep(running)
        with Copies() as copies, pytest.raises(NotImplementedError, match="meta"):
            stack._train()  # its last line asks for the losses
        assert copies.shapes[0] == (len(running), STEPS, 16)
        assert len(copies.shapes) == 2 + (views > 0) + (0 in running)


@pytest.mark.parametrize("kind", [("concat", ""), ("film", ""), (NEEDS_TOKENS, "pooled")], ids="-".join)
def test_a_stack_does_not_depend_on_its_order(kind: tuple[str, str]) -> None:
    fusion, seen, heads = load_fusion(kind[0]), data("both", kind[1], views=0), members()
    forth, back = train_stack(fusion, seen, TARGETS, heads), train_stack(fusion, seen, TARGETS, heads[::-1])
    for first, second in zip(forth, back[::-1], strict=True):
        assert_same(first, second, kind, seen)


def test_heads_of_a_stack_predict_as_each_does_alone() -> None:
    """Each on rows of its own number, also none."""
    heads = [trained.tensors for trained in train_stack(Concat, data(), TARGETS, members()[:3])]
    rows = [TEST, TEST[:7], np.empty(0, np.int64)]
    for head, own, found in zip(heads, rows, predict_stack(Concat, 3, data(), heads, rows), strict=True):
        assert found.shape == (len(own), 3)
        np.testing.assert_allclose(found, predict_stack(Concat, 3, data(), [head], [own])[0].reshape(-1, 3), atol=1e-5)


@pytest.mark.parametrize("multilabel", [False, True])
def test_a_stack_of_folds_smaller_than_a_batch(multilabel: bool) -> None:
    """Folds of 33 and 34 rows are one stack, too."""
    targets = MULTILABEL if multilabel else TARGETS
    small = [Member(HeadSettings(epochs=2), TRAIN[:size], VALIDATION, (1, size), 1) for size in (33, 34)]
    for trained, member in zip(train_stack(Concat, data(), targets, small), small, strict=True):
        assert_same(trained, train_stack(Concat, data(), targets, [member])[0], ("concat", ""), data())


class Plain(nn.Module):
    """The concat head as anyone would write it."""

    def __init__(self, widths: Sequence[int], standard: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.standard = standard
        self.missing = nn.ParameterList(torch.zeros(width) for width in widths)
        self.linears = nn.ModuleList([nn.Linear(sum(widths), HIDDEN[0]), nn.Linear(*HIDDEN)])
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in HIDDEN)
        self.output = nn.Linear(HIDDEN[1], 3)

    def forward(self, vectors: list[Tensor], masks: list[Tensor], keep: Tensor | None = None) -> Tensor:
        parts = []
        for x, mask, (mean, std), missing in zip(vectors, masks, self.standard, self.missing, strict=True):
            normed = nn.functional.layer_norm((x - mean) / std, x.shape[-1:])
            parts.append(torch.where(mask[:, None], normed, missing))
        hidden = torch.cat(parts, 1)
        factors = [1.0, 1.0] if keep is None else keep.split(HIDDEN, 1)
        for linear, norm, factor in zip(self.linears, self.norms, factors, strict=True):
            hidden = norm(linear(hidden)).relu() * factor
        return self.output(hidden)

    def tensors(self) -> dict[str, Tensor]:
        """By the names and in the layout that mmfeat saves."""
        found = {f"inputs.{m}.0.missing": p[None] for m, p in zip(("image", "text"), self.missing, strict=True)}
        for name, module in [(f"linears.{i}", each) for i, each in enumerate(self.linears)] + [("output", self.output)]:
            found |= {f"classifier.{name}.weight": module.weight.T, f"classifier.{name}.bias": module.bias[None]}
        for number, norm in enumerate(self.norms):
            values = {"weight": norm.weight, "bias": norm.bias, "mean": norm.running_mean, "var": norm.running_var}
            found |= {f"classifier.norms.{number}.{name}": value[None] for name, value in values.items()}
        return {name: value.detach().clone() for name, value in found.items()}


def plainly_trained(seen: HeadData, member: Member) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """An ordinary loop with the same draws: torch's layers, loss, optimiser and schedule."""
    settings, sources = member.settings, [seen.sources[name][0] for name in ("image", "text")]
    standard = [source.statistics(member.train) for source in sources]
    model = Plain([source.width for source in sources], standard)
    seed = int(np.random.SeedSequence(member.entropy).generate_state(1, np.uint64)[0] >> 1)
    start = Concat(1, seen.shape, 3)
    start.reset_head(0, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, linear in zip(("linears.0", "linears.1", "output"), [*model.linears, model.output], strict=True):
            linear.weight.copy_(start.get_parameter(f"classifier.{name}.weight")[0].T)
            linear.bias.copy_(start.get_parameter(f"classifier.{name}.bias")[0, 0])
    optimiser = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    by_loss = settings.monitor == "loss"
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, "min" if by_loss else "max", 0.5, patience=1)
    weights = torch.tensor(class_weights(TARGETS.take(member.train), settings.class_weights)).float()
    labels, draws = torch.from_numpy(TARGETS.numbers), Draws(member.entropy, member.train, settings, sum(HIDDEN))

    def inputs(rows: np.ndarray, views: np.ndarray, dropped: np.ndarray) -> tuple[list[Tensor], list[Tensor]]:
        vectors, masks = [], []
        for number, source in enumerate(sources):
            shown = [
                v if len(source.blocks) > 1 and source.blocks[v].mask[r] else 0
                for r, v in zip(rows, views, strict=True)
            ]
            vectors.append(np.stack([source.blocks[v].vectors[r] for r, v in zip(rows, shown, strict=True)]))
            masks.append(source.blocks[0].mask[rows] & (dropped != number))
        return [torch.from_numpy(x) for x in vectors], [torch.from_numpy(x) for x in masks]

    history, best, best_epoch, best_score = [], {}, -1, 0.0
    for epoch in range(settings.epochs):
        model.train()
        order = draws.order(member.steps)
        keep = draws.keep(order.shape) / (1 - settings.dropout)
        views, dropped = draws.views(order.shape, seen.views), draws.dropped(order.shape, 2)
        for rows, kept, shown, lost in zip(order, keep, views, dropped, strict=True):
            logits = model(*inputs(rows, shown, lost), torch.from_numpy(kept).float())
            loss = nn.functional.cross_entropy(logits, labels[rows], weights, label_smoothing=settings.label_smoothing)
            optimiser.zero_grad()
            loss.backward()
            for linear in model.linears:  # zero but for rounding, which AdamW would blow up to whole steps
                linear.bias.grad.zero_()
            optimiser.step()
        model.eval()
        rows, nothing = member.validation, np.full(len(member.validation), -1)
        with torch.no_grad():
            each = [model(*inputs(rows, np.full(len(rows), view), nothing)) for view in range(seen.views + 1)]
        logits = torch.stack(each).mean(0)
        nats = float(nn.functional.cross_entropy(logits, labels[rows], weights))
        score = float(macro_f1(TARGETS.matrix[rows], plain_choice(logits.numpy(), False)))
        scale = optimiser.param_groups[0]["lr"] / settings.learning_rate
        history.append({"validation_loss": nats, "validation_macro_f1": score, "scale": scale})
        watched = -nats if by_loss else score
        schedule.step(nats if by_loss else score)
        if best_epoch < 0 or watched > best_score + settings.min_delta:
            best, best_epoch, best_score = model.tensors(), epoch, watched
        if epoch - best_epoch >= settings.patience:
            break
    return best, history


@pytest.mark.parametrize(("monitor", "epochs"), [("macro-f1", 12), ("loss", 20)])
def test_a_plain_loop_gives_the_same_head(monitor: str, epochs: int) -> None:
    """With missing vectors, views, lost modalities, smoothing, weights, a plateau and early stopping."""
    settings = HeadSettings(
        batch_size=16,
        epochs=epochs,
        patience=3,
        monitor=monitor,
        learning_rate=3e-3,
        modality_dropout=0.3,
        label_smoothing=0.1,
        class_weights="inverse",
    )
    member = Member(settings, TRAIN[:96], VALIDATION, (5, 0, 0), 6)
    seen = data(views=2)
    tensors, history = plainly_trained(seen, member)
    (trained,) = train_stack(Concat, seen, TARGETS, [member])
    assert min(line["scale"] for line in history) < 1
    assert len(history) < settings.epochs
    for name in ("validation_loss", "validation_macro_f1", "scale"):
        assert [line[name] for line in trained.history] == pytest.approx([line[name] for line in history], rel=1e-3)
    for name, value in tensors.items():
        torch.testing.assert_close(
            trained.tensors[name], value, rtol=0, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_products_in_half_precision_hardly_change_a_head() -> None:
    """The first loss differs by rounding alone; parameters stay float32, and so do predictions."""
    head, losses = replace(members()[0], settings=replace(members()[0].settings, epochs=1)), []
    for products in ("float32", "bfloat16"):
        (trained,) = train_stack(Concat, data(), TARGETS, [head], products=products)
        assert {value.dtype for value in trained.tensors.values()} == {torch.float32}
        losses.append((trained.history[0]["loss"], trained.history[0]["validation_loss"]))
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    linear = Concat(1, data().shape, 3).classifier.output
    linear.rounded, x = True, torch.randn(1, 5, HIDDEN[1])
    plain = torch.baddbmm(linear.bias, x, linear.weight)
    assert torch.equal(linear.eval()(x), plain)
    with torch.inference_mode():  # by oneDNN
        torch.testing.assert_close(linear(x), plain, rtol=0, atol=1e-6)


def test_replay_trains_for_its_epochs_at_its_rates() -> None:
    scales = (1.0, 0.7, 0.7, 0.2)
    member = Member(HeadSettings(batch_size=16, patience=1), TRAIN, np.empty(0, np.int64), (1,), 3, scales)
    (trained,) = train_stack(Concat, data(), TARGETS, [member])
    assert [line["scale"] for line in trained.history] == list(scales)
    assert trained.best_epoch == 3
    held_out = replace(member, validation=VALIDATION, replay=None, settings=replace(member.settings, epochs=1))
    (once,) = train_stack(Concat, data(), TARGETS, [held_out])
    assert trained.history[0]["loss"] == pytest.approx(once.history[0]["loss"])


@pytest.mark.parametrize("monitor", ["loss", "macro-f1"])
def test_early_stopping_keeps_the_best_epoch(monitor: str) -> None:
    settings = HeadSettings(epochs=40, batch_size=16, learning_rate=3e-3, monitor=monitor)
    (trained,) = train_stack(Concat, data(), TARGETS, [Member(settings, TRAIN, VALIDATION, (1,), 12)])
    assert trained.best_epoch + settings.patience == len(trained.history) - 1 < 39
    found = [-line["validation_loss"] if monitor == "loss" else line["validation_macro_f1"] for line in trained.history]
    assert found[trained.best_epoch] >= max(found) - settings.min_delta
    (logits,) = predict_stack(Concat, 3, data(), [trained.tensors], [VALIDATION])
    kept = float(macro_f1(TARGETS.matrix[VALIDATION], plain_choice(logits, False)))
    assert kept == pytest.approx(trained.history[trained.best_epoch]["validation_macro_f1"])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("rate", "steps", "epochs"), [(1e4, 12, 12), (1e38, 12, 12), (1e38, 1, 1)])
@pytest.mark.parametrize("monitor", ["loss", "macro-f1"])
def test_a_head_that_diverges_says_so_in_a_line(rate: float, steps: int, epochs: int, monitor: str) -> None:
    """Also where only the last step of the last epoch made it diverge."""
    settings = HeadSettings(learning_rate=rate, batch_size=16, epochs=epochs, monitor=monitor)
    with pytest.raises(HeadError, match=r"diverged; lower --learning-rate \(now 1(0000|e\+38)\)") as caught:
        train_stack(Concat, data(), TARGETS, [Member(settings, TRAIN, VALIDATION, (1,), steps)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_a_seed_fixes_everything_and_touches_nothing_else(kind: tuple[str, str]) -> None:
    member = replace(members()[0], settings=replace(members()[0].settings, epochs=1))

    def trained(entropy: tuple[int, ...], outside: int) -> Tensor:
        torch.manual_seed(outside)
        np.random.seed(outside)
        random.seed(outside)
        states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        (head,) = train_stack(load_fusion(kind[0]), data("both", kind[1]), TARGETS, [replace(member, entropy=entropy)])
        after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        assert torch.equal(states[0], after[0])
        assert states[1:] == after[1:]
        return torch.cat([value.flatten() for value in head.tensors.values()])

    first = trained((1, 2, 3), 5)
    assert torch.equal(first, trained((1, 2, 3), 99))
    assert not torch.equal(first, trained((1, 2, 4), 5))


def test_an_epoch_shows_all_rows_equally_often_in_full_batches() -> None:
    draws = Draws((1,), TRAIN, HeadSettings(batch_size=16, dropout=0.25), 100)
    epochs = [draw_epoch([draws], 12, 2, 2, "cpu") for _ in range(15)]
    assert all(epoch.rows.shape == (1, 12, 16) and epoch.dropped is None for epoch in epochs)
    seen = torch.cat([epoch.rows.flatten() for epoch in epochs]).bincount(minlength=SAMPLES)
    assert (seen[TRAIN] == 16).all()  # 15 epochs of 192 are 16 times 180
    assert seen.sum() == 16 * len(TRAIN)
    assert torch.cat([epoch.keep.flatten() for epoch in epochs]).float().mean() == pytest.approx(0.75, abs=0.005)
