import pytest
import torch

from paperworks.papers.autoencoders.toy_superposition import superposition as toy


def random_weight(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_model_is_the_papers_formula_instance_by_instance():
    model = toy.ToyModel(3, 5, 2)
    with torch.no_grad():
        model.bias.normal_()
    x = torch.rand(3, 7, 5)
    for instance in range(3):
        weight, bias = model.weight[instance], model.bias[instance]
        expected = torch.relu(torch.einsum("hi,hj,bj->bi", weight, weight, x[instance]) + bias)
        # float32 sums of ten products in another order
        torch.testing.assert_close(model(x)[instance], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("place", ["output", "hidden", "none"])
def test_the_relu_stands_where_it_is_asked_for(place):
    torch.manual_seed(0)
    model = toy.ToyModel(1, 5, 2, place)
    x = torch.rand(1, 64, 5)
    hidden = x @ model.weight.mT
    output = (hidden.relu() if place == "hidden" else hidden) @ model.weight
    torch.testing.assert_close(model(x), output.relu() if place == "output" else output)


def test_weights_are_tied_and_every_instance_learns_alone():
    model = toy.ToyModel(2, 5, 2)
    assert [name for name, _ in model.named_parameters()] == ["weight", "bias"]
    x = torch.rand(2, 16, 5)
    toy.weighted_error(model(x), x, torch.ones(5))[0].backward()
    assert model.weight.grad[0].abs().sum() > 0
    assert model.weight.grad[1].abs().sum() == 0


def test_the_loss_is_a_mean_over_the_batch_of_a_weighted_sum_over_features():
    output, target = torch.zeros(1, 2, 3), torch.tensor([[[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]]])
    # (1 + 4 * 0.5 + 9 * 0.25 + 0.25) / 2
    assert toy.weighted_error(output, target, torch.tensor([1.0, 0.5, 0.25])).item() == pytest.approx(2.75)


def test_features_are_active_as_often_as_asked_and_then_uniform():
    density = torch.tensor([1.0, 0.3, 0.05])
    x = toy.sparse_features(100_000, density, 4, torch.Generator().manual_seed(0))
    active = x > 0
    # 400,000 draws each: five standard errors of a share are below 0.004, of the mean of 20,000 uniforms 0.0102
    torch.testing.assert_close(active.float().mean(dim=(1, 2)), density, atol=0.004, rtol=0)
    for instance in range(3):
        values = x[instance][active[instance]]
        assert abs(values.mean().item() - 0.5) < 0.0102
        assert abs(values.var().item() - 1 / 12) < 0.004
        assert values.max() < 1.0


@pytest.mark.parametrize("pairing", ["correlated", "anticorrelated"])
def test_pairs_are_active_together_or_one_at_a_time(pairing):
    x = toy.paired_features(20_000, torch.tensor([0.2]), 6, pairing, torch.Generator().manual_seed(0))
    active = (x > 0).view(1, 20_000, 3, 2).sum(dim=-1)
    assert set(active.unique().tolist()) == {0, 2 if pairing == "correlated" else 1}
    # 60,000 pairs: five standard errors of a share of 0.2
    assert abs((active > 0).float().mean().item() - 0.2) < 0.0082


@pytest.mark.parametrize(("corners", "share"), [(2, 1 / 2), (3, 2 / 3), (4, 1 / 2), (5, 2 / 5)])
def test_dimensionality_of_regular_polygons_is_the_papers(corners, share):
    shares = toy.dimensionality(toy.regular_polygon(corners))
    assert (shares - share).abs().max() < 1e-12  # float64


def test_dimensionality_of_a_tetrahedron_is_three_quarters_and_of_a_square_antiprism_three_eighths():
    tetrahedron = torch.tensor([[1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]], dtype=torch.float64)
    assert (toy.dimensionality(tetrahedron) - 3 / 4).abs().max() < 1e-12
    ring, lifted = toy.regular_polygon(8)[:, ::2], toy.regular_polygon(8)[:, 1::2]
    # The height at which the eight points fill the three dimensions evenly: sum z^2 = a third of the total.
    height = 0.5**0.5
    antiprism = torch.cat(
        [torch.cat([ring, lifted], dim=1), torch.tensor([[height] * 4 + [-height] * 4], dtype=torch.float64)]
    )
    assert (toy.dimensionality(antiprism) - 3 / 8).abs().max() < 1e-12


def test_superposition_and_dimensionality_follow_their_definitions():
    weight = random_weight(3, 6)
    for i in range(6):
        unit = weight[:, i] / weight[:, i].norm()
        squares = [(unit @ weight[:, j]).item() ** 2 for j in range(6)]
        assert toy.superposition(weight)[i].item() == pytest.approx(sum(squares) - squares[i], rel=1e-12)
        assert toy.dimensionality(weight)[i].item() == pytest.approx(squares[i] / sum(squares), rel=1e-12)


def test_dimensionality_survives_rotation_and_never_sums_to_more_than_the_dimensions():
    weight = random_weight(50, 3, 7)
    rotation = torch.linalg.qr(random_weight(50, 3, 3)).Q
    shares = toy.dimensionality(weight)
    assert (toy.dimensionality(rotation @ weight) - shares).abs().max() < 1e-12
    assert shares.sum(dim=-1).max() <= 3 + 1e-12


def test_a_feature_that_is_not_represented_has_no_share_and_no_superposition():
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert toy.dimensionality(weight).tolist() == [1.0, 0.0]
    assert toy.superposition(weight).tolist() == [0.0, 0.0]
    assert toy.feature_norms(weight).tolist() == [1.0, 0.0]


def test_dimensions_per_feature_is_one_for_dedicated_dimensions():
    assert toy.dimensions_per_feature(torch.eye(4)).item() == 1.0
    assert toy.dimensions_per_feature(toy.regular_polygon(5)).item() == pytest.approx(2 / 5)


def test_linear_optimum_is_the_catalogued_number():
    assert toy.linear_optimum(0.9 ** torch.arange(5), 2) == pytest.approx((0.81 + 0.729 + 0.6561) / 12, rel=1e-6)
    assert toy.linear_optimum(torch.tensor([0.1, 1.0]), 1) == pytest.approx(0.1 / 12, rel=1e-6)  # order does not matter


def test_angles_between_neighbours_go_once_around():
    angles = toy.neighbour_angles(toy.regular_polygon(5)[:, [3, 0, 4, 1, 2]])
    assert (angles - 72).abs().max() < 1e-10
    assert toy.neighbour_angles(random_weight(2, 7)).sum().item() == pytest.approx(360)


def test_the_absolute_value_can_be_written_down_with_two_units_a_feature():
    model = toy.AbsoluteValueModel(1, 3, 6)
    with torch.no_grad():
        model.read.copy_(torch.cat([torch.eye(3), -torch.eye(3)]))
        model.write.copy_(torch.cat([torch.eye(3), torch.eye(3)], dim=1))
    x = torch.randn(1, 20, 3)
    assert torch.equal(model(x), x.abs())


def test_bad_input_is_refused_with_what_would_be_right():
    with pytest.raises(ValueError, match="unknown place of the ReLU 'outptu'; did you mean 'output'"):
        toy.ToyModel(1, 5, 2, "outptu")
    with pytest.raises(ValueError, match="must be positive"):
        toy.ToyModel(1, 5, 0)
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        toy.sparse_features(4, torch.tensor([0.0]), 5)
    with pytest.raises(ValueError, match="must be even, not 5"):
        toy.paired_features(4, torch.tensor([0.1]), 5, "correlated")
    with pytest.raises(ValueError, match=r"shape \(2, features\)"):
        toy.neighbour_angles(torch.zeros(3, 5))
