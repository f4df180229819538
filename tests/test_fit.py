"""models.fit_schedule: candidates of equal cost, distances of the evolved model, a margin for the default."""

import pytest
import torch
from conftest import images, small_vit

from measure.costs import count_gmacs
from models import fit, fit_schedule, hub, vit

NAMES = ['vit_tiny_patch16_224', 'vit_small_patch14_reg4_dinov2', 'eva02_tiny_patch14_224']


@pytest.mark.parametrize('name', NAMES)
def test_candidates_cost_the_fraction_that_is_asked_for(name):
    model = small_vit(name, num_classes=0)
    x = images(model, 1)
    dense = count_gmacs(model, [x])
    found = fit.candidates(vit.evolve(model), 25, 0.7)
    assert len(found) > 3 and found[0][0] == (1, 3)
    for stages, ratios in found:
        vit.evolve(model, ratios, stages)
        assert count_gmacs(model, [x]) / dense == pytest.approx(0.7, abs=0.045)  # one of 25 patches is 0.04


@pytest.mark.parametrize('ratios', [(0.7, 0.3), (0.5, 0.5), (0.3, 0.7), (1.0, 0.4), (0.7, 1.0)])
@pytest.mark.parametrize('size', [224, 480])  # the larger one is clustered in chunks
@torch.no_grad()
def test_counted_macs_are_those_of_the_model(ratios, size):
    model = small_vit(img_size=size, num_classes=0)
    vit.evolve(model, ratios, (1, 3))
    counted = count_gmacs(model, [images(model, 1)]) * 1e9
    assert fit.count_macs(model, (size // 16) ** 2, (1, 3), ratios) == pytest.approx(counted, rel=1e-5)


def test_the_first_candidate_is_the_default():
    model = vit.evolve(small_vit(depth=12, img_size=224))
    fraction = fit.count_macs(model, 196, (4, 8), (0.7, 0.3)) / fit.count_macs(model, 196, (), ())
    stages, ratios = fit.candidates(model, 196, fraction)[0]
    assert stages == (4, 8) and ratios == pytest.approx((0.7, 0.3), abs=0.006)


@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_distances_are_those_of_the_evolved_model(name):
    model = vit.evolve(small_vit(name))
    x = images(model)
    schedules = [
        ((1, 3), (0.7, 0.3)),
        ((2,), (0.5,)),
        ((2, 3), (1.0, 0.4)),
        ((1, 3), (0.4, 0.4)),
        ((1, 2, 3), (0.7, 0.3, 0.5)),
    ]
    found = fit.distances(model, x, schedules)
    model.evolving = False
    dense = model.forward_features(x)
    for (stages, ratios), row in zip(schedules, found, strict=True):
        expected = fit.distance(model, dense, vit.evolve(model, ratios, stages).forward_features(x))
        assert expected.min() > 1e-5
        torch.testing.assert_close(row, expected)


@pytest.mark.parametrize(('gain', 'other'), [(0.5, True), (0.05, False), (-0.5, False)])
def test_the_default_wins_unless_another_schedule_is_significantly_closer(monkeypatch, tmp_path, gain, other):
    noise = torch.randn(32, generator=torch.Generator().manual_seed(0))

    def distances(model, x, schedules):
        rows = torch.full((len(schedules), len(x)), 2.0)
        rows[0] = 1.0
        rows[2] = 1 - gain + 0.3 * noise
        return rows

    monkeypatch.setattr(fit, 'distances', distances)
    model = small_vit().train()
    candidates = fit.candidates(vit.evolve(small_vit()), 25, 0.7)
    assert fit_schedule(model, torch.zeros(32, 3, 80, 80), 0.7, batch_size=32) is model and model.training
    assert (model.first_blocks, model.keep_ratio) == candidates[2 if other else 0]
    hub.save(model, tmp_path)
    assert hub.load(f'local-dir:{tmp_path}').schedule() == model.schedule()


@pytest.mark.parametrize('fraction', [0.01, 1.5])
def test_a_fraction_that_no_schedule_has_is_refused(fraction):
    model = small_vit()
    before = type(model)
    with pytest.raises(ValueError, match=f'fraction: .*found {fraction}'):
        fit_schedule(model, torch.zeros(2, 3, 80, 80), fraction)
    assert type(model) is before
    with pytest.raises(ValueError, match='images: expected several'):
        fit_schedule(small_vit(), torch.zeros(1, 3, 80, 80))
