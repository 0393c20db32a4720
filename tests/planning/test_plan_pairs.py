"""Choosing resolution pairs, and the time of those that are not compiled."""

import pytest

from configs import stage1_proxy, stage2_vitb, stage3_vitb
from eupe_jax.planning import pairs
from eupe_jax.training.model_flops import step_flops

STAGE3 = stage3_vitb.get_config()


def labels(found):
    return [pairs.label(pair) for pair in found]


def test_few_pairs_are_all_compiled_of_many_the_corners():
    assert labels(pairs.choose(stage2_vitb.get_config())) == ["256:256"]
    assert labels(pairs.choose(STAGE3)) == ["256:256", "512:512", "256:512"]
    assert len(pairs.choose(STAGE3, ["all"])) == 9


def test_pairs_are_chosen_by_their_sides():
    assert labels(pairs.choose(STAGE3, ["384:256", "512:384"])) == ["384:256", "512:384"]
    (only,) = pairs.choose(stage1_proxy.get_config(), ["256:448"])
    assert only.student == 256 and dict(only.teachers)["dinov3"] == 256


def test_a_pair_is_chosen_by_the_name_that_reports_give_it():
    (only,) = pairs.every_pair(stage1_proxy.get_config())
    assert pairs.label(only) == "256:256+448"
    assert pairs.choose(stage1_proxy.get_config(), ["256:256+448", "256:448"]) == [only]


def test_corners_of_teachers_with_different_pyramids_and_of_one_student_size():
    config = stage3_vitb.get_config().copy_and_resolve_references()
    with config.unlocked():
        config.teachers.other = config.teachers.proxy.copy_and_resolve_references()
        config.teachers.other.resolutions = (224, 448)
    assert labels(pairs.choose(config)) == ["256:224+256", "512:448+512", "256:448+512"]
    with config.unlocked():
        config.student_resolutions = (256,)
    assert labels(pairs.choose(config)) == ["256:224+256", "256:448+512"]
    assert labels(pairs.choose(config, ["256:224+384"])) == ["256:224+384"]


@pytest.mark.parametrize("text", ["256", "256:257", "a:b", "512x512"])
def test_a_pair_that_does_not_exist_is_refused(text):
    with pytest.raises(ValueError, match=f"--pairs={text}: this config has the pairs 256:256, 256:384"):
        pairs.choose(STAGE3, [text])


def test_times_of_the_other_pairs_lie_on_the_plane_through_the_compiled_ones():
    work = {pair: step_flops(STAGE3, pair) for pair in pairs.every_pair(STAGE3)}

    def truth(pair):
        return 0.02 + 0.5e-13 * sum(work[pair].teachers.values()) + 3e-13 * work[pair].trained

    found = pairs.fit_seconds({pair: truth(pair) for pair in pairs.choose(STAGE3)}, work)
    assert len(found) == 9
    for pair, seconds in found.items():
        assert seconds == pytest.approx(truth(pair), rel=1e-9)


def test_of_one_compiled_pair_the_others_take_its_rate():
    work = {pair: step_flops(STAGE3, pair) for pair in pairs.every_pair(STAGE3)}
    (known,) = pairs.choose(STAGE3, ["384:384"])
    found = pairs.fit_seconds({known: 2.0}, work)
    assert found[known] == 2.0
    for pair, seconds in found.items():
        assert seconds == pytest.approx(2.0 * work[pair].per_image / work[known].per_image)


def test_no_part_of_a_step_takes_less_than_no_time():
    """Times that would need a negative rate are spread by work instead."""
    work = {pair: step_flops(STAGE3, pair) for pair in pairs.every_pair(STAGE3)}
    small, large, mixed = pairs.choose(STAGE3)
    found = pairs.fit_seconds({small: 1.0, large: 1.1, mixed: 2.0}, work)
    assert all(seconds > 0 for seconds in found.values())
