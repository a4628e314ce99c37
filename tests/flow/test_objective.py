"""The layerwise loss: closed forms, and a breakdown that adds up."""

import pytest
import torch

from latteflow.flow.objective import layerwise_flow_loss

SHAPES = [(), (3,), (4, 2, 2)]


def predictions(shape, batch_size=12, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn((2, batch_size, *shape), generator=generator, dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_groups_loss_is_its_mean_squared_error(shape):
    u = torch.zeros(6, *shape)
    groups = torch.tensor([0, 0, 2, 2, 2, 3])
    v = (groups + 1).reshape(-1, *[1] * len(shape)).expand(6, *shape).float()
    loss = layerwise_flow_loss(v, u, groups, 5)
    assert loss.per_group.tolist() == [1, 0, 9, 16, 0]
    assert loss.counts.tolist() == [2, 0, 3, 1, 0]
    assert loss.total.item() == pytest.approx((2 * 1 + 3 * 9 + 1 * 16) / 6)


@pytest.mark.parametrize("shape", SHAPES)
def test_total_is_the_mean_and_the_breakdown_adds_up_to_it(shape):
    v, u = predictions(shape)
    groups = torch.tensor([0, 3, 3, 1, 0, 3, 3, 3, 1, 0, 5, 5])
    loss = layerwise_flow_loss(v, u, groups, 6)
    torch.testing.assert_close(loss.total, (v - u).square().mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close((loss.per_group * loss.counts).sum() / len(v), loss.total, rtol=1e-12, atol=0)


def test_total_is_one_kth_of_the_papers_sum_in_a_balanced_batch():
    v, u = predictions((3,))
    groups = torch.arange(4).repeat(3)
    papers_sum = sum((v - u)[groups == k].square().mean() for k in range(4))
    torch.testing.assert_close(layerwise_flow_loss(v, u, groups, 4).total, papers_sum / 4, rtol=1e-12, atol=0)


def test_gradient_is_the_closed_form_and_the_breakdown_holds_no_graph():
    v, u = predictions((3,))
    v.requires_grad_()
    loss = layerwise_flow_loss(v, u, torch.arange(4).repeat(3), 4)
    loss.total.backward()
    assert v.grad is not None
    torch.testing.assert_close(v.grad, (2 * (v - u) / v.numel()).detach(), rtol=1e-12, atol=0)
    assert not loss.per_group.requires_grad


def test_one_samples_nan_shows_in_its_own_group_only():
    v, u = predictions((3,), batch_size=4)
    v[2] = torch.nan
    loss = layerwise_flow_loss(v, u, torch.tensor([0, 1, 2, 3]), 5)
    assert loss.per_group.isnan().tolist() == [False, False, True, False, False]
    assert loss.total.isnan()


def test_half_precision_is_averaged_in_float32():
    v = torch.full((2, 1000), 1.0, dtype=torch.bfloat16)
    v[0, 0] = 1.25
    loss = layerwise_flow_loss(v, torch.zeros_like(v), torch.tensor([0, 1]), 2)
    assert loss.total.dtype == torch.float32
    assert loss.per_group.tolist() == pytest.approx([1 + (1.25**2 - 1) / 1000, 1], rel=1e-6)


@pytest.mark.parametrize(
    ("v_shape", "u_shape", "groups_shape"), [((4, 3), (4, 1), (4,)), ((4, 3), (4, 3), (1,)), ((0, 3), (0, 3), (0,))]
)
def test_shapes_that_would_broadcast_are_refused(v_shape, u_shape, groups_shape):
    with pytest.raises(ValueError, match="must"):
        layerwise_flow_loss(torch.zeros(v_shape), torch.zeros(u_shape), torch.zeros(groups_shape, dtype=torch.int64), 4)


@pytest.mark.parametrize("group", [-1, 4])
def test_groups_that_do_not_exist_are_refused(group):
    with pytest.raises(IndexError):
        layerwise_flow_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, group]), 4)
