"""The report: every figure with its conditions, with guidance and without, and the floor of the reference."""

from __future__ import annotations

import pytest
from fidelity_toys import PlainNetwork, ToyNetwork, pictures

from latteflow.data.shards import write_json, write_shard
from latteflow.errors import UserError
from latteflow.evaluate.fidelity_report import fidelity_report, figures_of, floor_of
from latteflow.evaluate.measured import measure, measured_file
from latteflow.evaluate.samples import Samples
from latteflow.evaluate.scores import inception_score, precision_and_recall

MADE_WITH = {
    "model": "toy",
    "dtype": "bfloat16",
    "steps": 40,
    "scheduler": "Euler",
    "seed": 3,
    "device": "cpu",
    "weights": "w",
}


def written(folder, some, guidance_scale, **changes):
    """A set as ``draw_samples`` leaves it, of given pictures."""
    folder.mkdir()
    about = {"made_with": {**MADE_WITH, "guidance_scale": float(guidance_scale), **changes}}
    for number, part in enumerate(some.split(50)):
        write_shard(folder / f"samples-{number:05d}.safetensors", {"pictures": part}, about)
    write_json(folder / "samples.json", {"number": len(some), "shard_size": 50})
    return folder


@pytest.fixture
def sets(tmp_path):
    dull = pictures(120, 2, brightness=0.5)
    return [written(tmp_path / "guided", pictures(120, 1), 4), written(tmp_path / "plain", dull, 1)]


@pytest.fixture
def reference():
    return measure(ToyNetwork(), [pictures(200)], "real pictures")


def test_every_figure_stands_with_its_conditions(sets, reference):
    report = fidelity_report(ToyNetwork(), reference, sets)
    assert list(report) == ["guidance 4", "guidance 1", "halves of the reference"]
    names = ["FD-Toy", "sFD-Toy", "IS-Toy", "precision-Toy", "recall-Toy"]
    for scale in (4, 1):
        figures = report[f"guidance {scale}"]
        assert list(figures) == names
        for figure in figures.values():
            assert isinstance(figure["value"], float)
            conditions = {
                "network": "Toy, 8 pixels",
                "reference": "real pictures",
                "reference_samples": 200,
                "samples": 120,
                "size": (8, 8),
                "model": "toy",
                "dtype": "bfloat16",
                "guidance_scale": float(scale),
                "steps": 40,
                "scheduler": "Euler",
                "seed": 3,
                "device": "cpu",
            }
            assert conditions.items() <= figure.items()
    assert list(report["halves of the reference"]) == ["FD-Toy", "sFD-Toy"]


def test_figures_are_those_of_the_sets(sets, reference):
    network = ToyNetwork()
    report = fidelity_report(network, reference, sets)
    for folder, name in zip(sets, ("guidance 4", "guidance 1"), strict=True):
        drawn = measure(network, Samples(folder).chunks(), "drawn")
        found = {key.removesuffix("-Toy"): figure["value"] for key, figure in report[name].items()}
        precision, recall = precision_and_recall(reference.features, drawn.features)
        assert found == {
            "FD": pytest.approx(drawn.pooled.frechet_distance(reference.pooled)),
            "sFD": pytest.approx(drawn.spatial.frechet_distance(reference.spatial)),
            "IS": inception_score(drawn.probabilities, 10)[0],
            "precision": precision,
            "recall": recall,
        }
    assert report["guidance 4"]["FD-Toy"]["value"] < report["guidance 1"]["FD-Toy"]["value"]
    assert report["guidance 4"]["IS-Toy"]["splits"] == 10


def test_the_floor_is_the_halves_of_the_reference(sets, reference):
    floor = floor_of(ToyNetwork(), reference)
    for name, halves in zip(("FD-Toy", "sFD-Toy"), reference.halves, strict=True):
        one, other = (half.fitted() for half in halves)
        assert floor[name]["value"] == pytest.approx(one.frechet_distance(other))
        assert floor[name]["samples"] == [one.number, other.number]
    report = fidelity_report(ToyNetwork(), reference, sets)
    assert report["halves of the reference"] == floor
    assert 0 < floor["FD-Toy"]["value"] < report["guidance 1"]["FD-Toy"]["value"]


def test_fewer_splits_are_taken_than_would_be_too_small(reference):
    drawn = measure(ToyNetwork(), [pictures(14)], "few", keep=True)
    drawn = drawn.__class__(**{**drawn.__dict__, "spatial": None})
    assert figures_of(ToyNetwork(), drawn, reference, {})["IS-Toy"]["splits"] == 4


def test_a_network_without_spatial_features_and_classes_gives_the_rest(sets):
    reference = measure(PlainNetwork(), [pictures(200)], "real pictures")
    report = fidelity_report(PlainNetwork(), reference, sets)
    assert list(report["guidance 4"]) == ["FID", "precision", "recall"]
    assert list(report["halves of the reference"]) == ["FID"]


def test_what_statistics_alone_cannot_give_is_said_and_no_number(sets, reference, tmp_path):
    reference.save(tmp_path / "real.npz")
    known = measured_file(tmp_path / "real.npz", ToyNetwork())
    report = fidelity_report(ToyNetwork(), known, sets)
    figures = report["guidance 4"]
    assert figures["FD-Toy"]["value"] is not None
    assert figures["sFD-Toy"]["value"] is not None
    for figure in (figures["precision-Toy"], figures["recall-Toy"], *report["halves of the reference"].values()):
        assert figure["value"] is None
        assert "statistics alone" in figure["why"]
    plain = known.__class__(**{**known.__dict__, "spatial": None})
    assert "no spatial features" in fidelity_report(ToyNetwork(), plain, sets)["guidance 4"]["sFD-Toy"]["why"]


def test_halves_that_are_too_small_are_said():
    few = measure(PlainNetwork(), [pictures(11)], "few")
    assert floor_of(PlainNetwork(), few)["FID"]["value"] is None
    assert "too few for a covariance of 6 features" in floor_of(PlainNetwork(), few)["FID"]["why"]


@pytest.mark.parametrize("scales", [(4,), (1,), (4, 2), (1, 1)])
def test_with_guidance_and_without(tmp_path, reference, scales):
    sets = [written(tmp_path / str(i), pictures(60, i), scale) for i, scale in enumerate(scales)]
    with pytest.raises(UserError, match="with guidance and without"):
        fidelity_report(ToyNetwork(), reference, sets)


def test_several_scales_are_reported_each(tmp_path, reference):
    sets = [written(tmp_path / str(scale), pictures(60, 1), scale) for scale in (1, 2.5, 4)]
    assert list(fidelity_report(ToyNetwork(), reference, sets))[:3] == ["guidance 1", "guidance 2.5", "guidance 4"]
    again = written(tmp_path / "again", pictures(60, 2), 4)
    with pytest.raises(UserError, match="two sets have the same guidance_scale"):
        fidelity_report(ToyNetwork(), reference, [*sets, again])


@pytest.mark.parametrize(
    ("number", "changes", "what"), [(60, {"weights": "v"}, "weights"), (60, {"steps": 9}, "steps"), (59, {}, "number")]
)
def test_sets_that_differ_in_more_than_guidance_are_refused(tmp_path, reference, number, changes, what):
    one = written(tmp_path / "one", pictures(60), 1)
    other = written(tmp_path / "other", pictures(number), 4, **changes)
    with pytest.raises(UserError, match=f"differs from .*one in {what}: compare sets that are alike"):
        fidelity_report(ToyNetwork(), reference, [one, other])


def test_a_reference_of_another_resolution_or_network_is_refused(sets, tmp_path):
    larger = measure(ToyNetwork(), [pictures(60, size=(16, 16))], "larger")
    with pytest.raises(UserError, match="drawn pictures are 8x8, and larger holds 16x16"):
        fidelity_report(ToyNetwork(), larger, sets)
    other = measure(PlainNetwork(), [pictures(60)], "other")
    with pytest.raises(UserError, match="other was measured with Plain, 8 pixels, and this is Toy"):
        fidelity_report(ToyNetwork(), other, sets)
    unsaid = larger.__class__(**{**larger.__dict__, "network": None, "size": None})
    narrow = unsaid.pooled.__class__(unsaid.pooled.mean[:5], unsaid.pooled.covariance[:5, :5], 60)
    with pytest.raises(UserError, match="statistics of 5 features, and this network has 6"):
        fidelity_report(ToyNetwork(), unsaid.__class__(**{**unsaid.__dict__, "pooled": narrow}), sets)


def test_sets_too_small_for_a_covariance_are_refused(tmp_path, reference):
    sets = [written(tmp_path / str(scale), pictures(6, scale), scale) for scale in (1, 4)]
    with pytest.raises(UserError, match="needs more pictures than that: got 6"):
        fidelity_report(ToyNetwork(), reference, sets)


def test_features_have_to_be_kept(reference):
    drawn = measure(ToyNetwork(), [pictures(60)], "drawn", keep=False)
    with pytest.raises(UserError, match="keep=True"):
        figures_of(ToyNetwork(), drawn, reference, {})
