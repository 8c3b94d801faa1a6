"""The layers of a stack are torch's own for each head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmfeat.heads.fusions import TOKEN_WIDTH as WIDTH
from mmfeat.heads.fusions import Attention, TokenInput
from mmfeat.heads.layers import BatchNorm, Classifier, LayerNorm, Linear


def parameters_of(module: nn.Module, head: int) -> list[Tensor]:
    return [parameter[head] for parameter in module.parameters()]


def randomised(module: nn.Module) -> nn.Module:
    numbers = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=numbers)
    return module


def numbers_like(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("shape", [(3, 7, 5), (3, 7, 4, 5)])
def test_linear_is_torchs_of_each_head(shape: tuple[int, ...]) -> None:
    layer, x = randomised(Linear(3, 5, 6)), numbers_like(*shape)
    for head in range(3):
        weight, bias = parameters_of(layer, head)
        torch.testing.assert_close(layer(x)[head], nn.functional.linear(x[head], weight.T, bias[0]))


def test_first_weights_are_torchs_and_of_the_heads_own_seed() -> None:
    layer, alone = Linear(3, 400, 300), Linear(1, 400, 300)
    for head in range(3):
        layer.reset(head, torch.Generator().manual_seed(head))
    alone.reset(0, torch.Generator().manual_seed(2))
    torchs = nn.Linear(400, 300)
    for own, single, usual in zip(layer.parameters(), alone.parameters(), torchs.parameters(), strict=True):
        assert torch.equal(own[2], single[0])
        assert float(own.detach().abs().max()) == pytest.approx(float(usual.detach().abs().max()), rel=0.05)
        assert float(own.detach().std()) == pytest.approx(float(usual.detach().std()), rel=0.1)


def test_batch_norm_is_torchs_of_each_head_in_training_and_after() -> None:
    layer = randomised(BatchNorm(3, 5))
    torchs = [nn.BatchNorm1d(5) for _ in range(3)]
    for head, other in enumerate(torchs):
        weight, bias = parameters_of(layer, head)
        other.load_state_dict({**other.state_dict(), "weight": weight[0], "bias": bias[0]})
    for step in range(4):
        x = (numbers_like(4, 3, 8, 5)[step] * 3 + step).requires_grad_()
        out = layer(x)
        gradients = torch.autograd.grad(out.pow(3).mean(), [x, *layer.parameters()])
        for head, other in enumerate(torchs):
            own = x[head].detach().requires_grad_()
            wanted = other(own)
            expected = torch.autograd.grad(wanted.pow(3).mean() / 3, [own, *other.parameters()])
            torch.testing.assert_close(out[head], wanted, rtol=1e-5, atol=1e-5)
            for found, torchs_own in zip(gradients, expected, strict=True):
                torch.testing.assert_close(found[head].view_as(torchs_own), torchs_own, rtol=1e-3, atol=1e-5)
    layer.eval()
    x = numbers_like(3, 6, 5)
    for head, other in enumerate(torchs):
        torch.testing.assert_close(layer(x)[head], other.eval()(x[head]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 7, 5), (3, 7, 4, 5)])
def test_layer_norm_is_torchs_of_each_head(shape: tuple[int, ...]) -> None:
    layer, x = randomised(LayerNorm(3, 5)), numbers_like(*shape)
    for head in range(3):
        torch.testing.assert_close(layer(x)[head], nn.functional.layer_norm(x[head], (5,), *parameters_of(layer, head)))


@pytest.mark.parametrize("normalised", [True, False])
def test_classifier_is_torchs_layers_one_after_the_other(normalised: bool) -> None:
    classifier, x = randomised(Classifier(3, 9, 4, (8, 6), normalised)), numbers_like(3, 5, 9)
    keep = (numbers_like(3, 5, 14) > 0) * 2.0
    found, plain = classifier(x, keep), classifier.eval()(x, None)
    assert not torch.allclose(found, plain)
    classifier.train()
    for head in range(3):
        linears = [nn.Linear(9, 8), nn.Linear(8, 6), nn.Linear(6, 4)]
        for own, other in zip([*classifier.linears, classifier.output], linears, strict=True):
            other.load_state_dict({"weight": own.weight[head].T, "bias": own.bias[head, 0]})
        hidden = x[head]
        for number, (linear, part) in enumerate(zip(linears, keep[head].split((8, 6), 1), strict=False)):
            hidden = linear(hidden)
            if normalised:
                norm = classifier.norms[number]
                hidden = nn.functional.batch_norm(
                    hidden, None, None, norm.weight[head, 0], norm.bias[head, 0], training=True
                )
            hidden = hidden.relu() * part
        torch.testing.assert_close(found[head], linears[-1](hidden), rtol=1e-4, atol=1e-4)


def test_attention_is_torchs_of_each_head_with_one_more_key() -> None:
    """Also for samples without any token, which see only the key for nothing."""
    attention, (queries, keys) = randomised(Attention(2)), numbers_like(2, 2, 4, 5, WIDTH)
    asking, asked = (randomised(TokenInput(2, (WIDTH,))) for _ in range(2))
    with torch.no_grad():
        for parameter in (*attention.parameters(), *asking.parameters(), *asked.parameters()):
            parameter.mul_(0.1)
    present = torch.tensor([5, 3, 1, 0])[:, None] > torch.arange(5)
    mask = torch.tensor([2, 5, 0, 0])[:, None] > torch.arange(5)
    layers, given = attention.layers(asking, asked), [(queries, present.expand(2, -1, -1))]
    found = attention(layers, given, asked, [(keys, mask.expand(2, -1, -1))])
    queries, keys = (module.projections[0](x) for module, x in ((asking, queries), (asked, keys)))
    for head in range(2):
        torchs = nn.MultiheadAttention(WIDTH, 8, batch_first=True)
        weights = [attention.query.weight[head].T, attention.key_value.weight[head].T]
        biases = [attention.query.bias[head, 0], attention.key_value.bias[head, 0]]
        out = {"weight": attention.output.weight[head].T, "bias": attention.output.bias[head, 0]}
        torchs.out_proj.load_state_dict(out)
        torchs.load_state_dict(
            {**torchs.state_dict(), "in_proj_weight": torch.cat(weights), "in_proj_bias": torch.cat(biases)}
        )
        more = torch.cat([attention.nothing[head].expand(4, -1, -1), keys[head]], 1)
        hidden = nn.functional.pad(~mask, (1, 0), value=False)
        seen = torchs(queries[head], more, more, key_padding_mask=hidden, need_weights=False)[0]
        mean = torch.stack([s[p].sum(0) / max(int(p.sum()), 1) for s, p in zip(seen, present, strict=True)])
        expected = nn.functional.layer_norm(mean, (WIDTH,), attention.norm.weight[head], attention.norm.bias[head])
        torch.testing.assert_close(found[head], expected, rtol=1e-4, atol=1e-4)
