"""Losses of the caches of a mixture: their own, and those of presets."""

import pytest

from decant.student_train import LossConfig, Schedule
from decant.student_train.config.mixture import CacheShare, OwnLoss, own_losses
from decant.student_train.config.presets import losses_of


def entry(cache: str, weight: float = 1, prefixes: str | None = None, **own: object) -> CacheShare:
    loss = OwnLoss(**own) if own else None
    return CacheShare(cache=cache, weight=weight, prefixes=prefixes, loss=loss)


def test_what_a_cache_sets_stands_in_for_the_common_loss() -> None:
    """Kind with its own options, options of the common kind, weights; the rest stays."""
    common = LossConfig(kind="akl", ce_weight=0.2, options={"mu": 0.4, "head_rule": "nucleus"})
    found = own_losses(
        common,
        [
            entry("a"),
            entry("b", kind="skew_rkl", options={"lam": 0.3}, kd_weight=0.5),
            entry("c", options={"mu": 0.6}),
            entry("d", kind="akl"),
            entry("e", kind="opd", clip=0.2),
            entry("f", temperature=2.0, tail="renormalize", ce_weight=1.0),
        ],
    )
    assert found[0] == common
    assert (found[1].kind, found[1].options, found[1].kd_weight) == ("skew_rkl", {"lam": 0.3}, 0.5)
    assert found[2].options == {"mu": 0.6, "head_rule": "nucleus"}
    assert found[3].options == {}
    assert found[4].at(0, 1).options == {"clip": 0.2}
    assert (found[5].temperatures, found[5].tail, found[5].ce_weight) == ((2.0,), "renormalize", 1)
    assert all(loss.ce_weight == 0.2 for loss in found[:5])


def test_sides_weigh_the_same_in_whatever_shares_they_are_passed() -> None:
    """Replay of several students' caches beside one of the teacher's: shares times weights."""
    mixture = [
        entry("t", 0.25, "teacher"),
        entry("s1", 0.5, "student"),
        entry("s2", 0.25, "student"),
    ]
    losses = losses_of(LossConfig(preset="js", kd_weight=3.0, ce_weight=0.1), mixture)
    assert [loss.kind for loss in losses] == ["skew_fkl", "skew_rkl", "skew_rkl"]
    assert all(loss.options == {"lam": 0.5} and loss.ce_weight == 0.1 for loss in losses)
    of_teacher = 0.25 * losses[0].kd_weight
    of_student = 0.5 * losses[1].kd_weight + 0.25 * losses[2].kd_weight
    assert (of_teacher, of_student) == (pytest.approx(1.5), pytest.approx(1.5))


def test_a_cache_of_another_purpose_stands_beside_a_preset() -> None:
    """With a kind of its own; it counts for none of the sides."""
    mixture = [
        entry("t", 1, "teacher"),
        entry("s", 1, "student"),
        entry("plain", 2, None, kind="fkl", kd_weight=0.0, ce_weight=1.0),
    ]
    losses = losses_of(LossConfig(preset="tvd"), mixture)
    assert [loss.kind for loss in losses] == ["tvd", "tvd", "fkl"]
    assert [loss.kd_weight for loss in losses] == [1, 1, 0]


def test_the_weight_of_the_contrastive_pair_may_move() -> None:
    """Towards the student's side, as the authors' code does when asked to."""
    options = {"beta": {"values": [1, 1.5], "at": [0, 0.5]}}
    mixture = [entry("t", 1, "teacher"), entry("s", 1, "student")]
    losses = losses_of(LossConfig(preset="contrastive", options=options), mixture)
    ends = [[loss.at(step, 11).kd_weight for loss in losses] for step in (0, 5, 10)]
    assert ends == [[1, 1], [0.5, 1.5], [0.5, 1.5]]
    assert all(isinstance(loss.kd_weight, Schedule) for loss in losses)


TEACHER, STUDENT = entry("t", 1, "teacher"), entry("s", 1, "student")


@pytest.mark.parametrize(
    ("loss", "mixture", "message"),
    [
        ({"preset": "contrastive"}, [TEACHER], "needs caches of .*none has `prefixes: student`"),
        ({"preset": "js"}, [STUDENT], "none has `prefixes: teacher`"),
        ({"preset": "js"}, [], "is of a mixture of caches with teacher prefixes and student"),
        ({"preset": "kl"}, [TEACHER, STUDENT], "s holds student prefixes: leave it out"),
        ({"preset": "tvd"}, [TEACHER, entry("u")], "whose prefixes u holds"),
        ({"preset": "tvd"}, [TEACHER, entry("s", 1, "student", kind="rkl")], "sets kind of s"),
        ({"preset": "js", "options": {"beta": 1}}, [TEACHER, STUDENT], "js has no options"),
        ({"preset": "contrastive", "options": {"mu": 1}}, [TEACHER, STUDENT], "lam and beta"),
        ({"preset": "contrastive", "options": {"beta": 2}}, [TEACHER, STUDENT], "between 0 and 2"),
        (
            {"preset": "contrastive", "options": {"lam": 1.0}},
            [TEACHER, STUDENT],
            "contrastive: skew_fkl: lam",
        ),
        ({}, [TEACHER], "prefixes of t has no effect without loss.preset"),
        ({}, [entry("u", kind="nll")], "mixture: u: loss.kind 'nll' is not one of"),
        ({}, [entry("u", kind="rkl", tail="label")], "mixture: u: tail='label'"),
        ({}, [entry("u", clip=0.1)], "mixture: u: loss.clip is of kind opd"),
        ({}, [entry("u", kind="opd", temperature=2.0)], "mixture: u: opd .* leave it at 1"),
    ],
)
def test_losses_that_do_not_fit_their_mixture_are_refused(
    loss: dict, mixture: list[CacheShare], message: str
) -> None:
    """The message names the cache and the way out."""
    with pytest.raises(ValueError, match=message):
        losses_of(LossConfig(**loss), mixture)


def test_one_place_for_each_number() -> None:
    """A preset beside a kind, a clip in two places, weights in two places, an unknown side."""
    with pytest.raises(ValueError, match=r"sets the kind of each cache, and loss.kind rkl"):
        LossConfig(preset="js", kind="rkl")
    with pytest.raises(ValueError, match="'pinsker' is not one of"):
        LossConfig(preset="pinsker")
    with pytest.raises(ValueError, match=r"loss.clip or loss.options.clip, not both"):
        LossConfig(kind="opd", clip=0.1, options={"clip": 0.1})
    with pytest.raises(ValueError, match=r"a has kd_weight and loss.kd_weight"):
        CacheShare(cache="a", weight=1, kd_weight=1.0, loss=OwnLoss(kd_weight=1.0))
    with pytest.raises(ValueError, match="prefixes of a 'pupil' is not one of"):
        CacheShare(cache="a", weight=1, prefixes="pupil")
