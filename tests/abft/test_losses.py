"""Eq. 1, its filter and Eq. 3, against numbers worked out by hand."""

import json
import math

import pytest
import torch

from abft.losses import (
    HeadCountController,
    MassAwardController,
    abft_loss,
    induction_heads,
    induction_threshold,
    share_loss,
)

# Two layers, two prompts, two heads; (correct, wrong) mass of each. Prompt 0 has 2 correct demonstrations of 4
# and 55 tokens: T = 4 / (4 + ln 55) = 0.49954. Prompt 1 has none of 4, and 20 tokens: T = 0.57178.
MASSES = torch.tensor(
    [
        [[[0.30, 0.25], [0.10, 0.20]], [[0.00, 0.57], [0.00, 0.58]]],
        [[[0.45, 0.05], [0.05, 0.40]], [[0.00, 0.90], [0.00, 0.10]]],
    ],
    dtype=torch.float64,
)
CORRECT = torch.tensor([2, 0])
SHOTS = torch.tensor([4, 4])
LENGTHS = torch.tensor([55, 20])
SELECTED = torch.tensor([[[True, False], [False, True]], [[True, False], [True, False]]])


def loss_of(masses=MASSES, **options):
    return abft_loss(masses, CORRECT, SHOTS, LENGTHS, **options)


def test_threshold_is_k_over_k_plus_log_of_length():
    threshold = induction_threshold(torch.tensor([4, 4, 1, 0]), torch.tensor([55, 20, 1, 9]))
    torch.testing.assert_close(threshold, torch.tensor([0.499542, 0.571777, 1.0, 0.0]), atol=1e-6, rtol=0)


def test_filter_selects_by_the_prompts_own_threshold():
    assert torch.equal(induction_heads(MASSES, SHOTS, LENGTHS), SELECTED)


def test_filter_is_strict():
    threshold = float(induction_threshold(torch.tensor([4]), torch.tensor([55])))
    masses = torch.tensor([0.0, threshold, math.nextafter(threshold, 1.0)], dtype=torch.float64)
    masses = torch.stack([masses, torch.zeros(3)], dim=-1)[None, None]
    heads = induction_heads(masses, torch.tensor([4]), torch.tensor([55]))
    assert heads.tolist() == [[[False, False, True]]]


def test_loss_is_equation_1():
    result = loss_of(wrong_penalty=0.5, correct_award=1.0)
    # Prompt 0: (0.5·0.25 + 2 − 0.30) + (0.5·0.05 + 2 − 0.45) = 1.825 + 1.575. Prompt 1: 0.5·0.58 + 0.5·0.90.
    torch.testing.assert_close(result.per_prompt, torch.tensor([3.4, 0.74], dtype=torch.float64))
    assert result.loss.item() == pytest.approx(2.07)
    assert torch.equal(result.selected, SELECTED)
    assert result.head_counts.tolist() == [2, 2]
    assert result.mass_correct.item() == pytest.approx((0.30 + 0.45) / 4)
    assert result.mass_wrong.item() == pytest.approx((0.25 + 0.05 + 0.58 + 0.90) / 4)


def test_terms_are_weighted_by_a_and_b():
    only_wrong = loss_of(wrong_penalty=2.0, correct_award=0.0).per_prompt
    torch.testing.assert_close(only_wrong, torch.tensor([0.6, 2.96], dtype=torch.float64))
    only_correct = loss_of(wrong_penalty=0.0, correct_award=3.0).per_prompt
    torch.testing.assert_close(only_correct, torch.tensor([3 * 3.25, 0.0], dtype=torch.float64))


def test_without_the_filter_every_head_counts():
    result = loss_of(head_filter=False)
    # Prompt 0 adds (0.1 + 2 − 0.10) + (0.2 + 2 − 0.05) = 4.15, prompt 1 adds 0.5·(0.57 + 0.10).
    torch.testing.assert_close(result.per_prompt, torch.tensor([7.55, 1.075], dtype=torch.float64))
    assert result.selected.all()


def test_per_head_mean_divides_by_the_prompts_heads():
    torch.testing.assert_close(loss_of(per_head_mean=True).per_prompt, torch.tensor([1.7, 0.37], dtype=torch.float64))
    torch.testing.assert_close(
        loss_of(per_head_mean=True, head_filter=False).per_prompt,
        torch.tensor([7.55 / 4, 1.075 / 4], dtype=torch.float64),
    )


def test_no_head_gives_zero_loss_and_a_graph():
    masses = torch.full((2, 2, 2, 2), 0.1, requires_grad=True)
    for mean in (False, True):
        result = loss_of(masses, per_head_mean=mean)
        assert result.loss.item() == 0
        assert result.mass_correct.isnan()
        assert result.mass_wrong.isnan()
        result.loss.backward()
    assert torch.equal(masses.grad, torch.zeros_like(masses))


def test_gradient_is_a_and_minus_b_on_induction_heads_alone():
    masses = MASSES.clone().requires_grad_()
    loss_of(masses, wrong_penalty=0.7, correct_award=1.3).loss.backward()
    expected = torch.tensor([-1.3, 0.7], dtype=torch.float64) * SELECTED[..., None] / 2  # mean over two prompts
    torch.testing.assert_close(masses.grad, expected, atol=0, rtol=1e-7)


def test_filter_carries_no_gradient():
    masses = MASSES.clone().requires_grad_()
    assert not induction_heads(masses, SHOTS, LENGTHS).requires_grad
    result = loss_of(masses, wrong_penalty=0.0, correct_award=0.0)
    result.loss.backward()
    assert torch.equal(masses.grad, torch.zeros_like(masses))
    assert not result.mass_correct.requires_grad
    assert result.per_prompt.requires_grad


def test_sequence_of_layers_equals_one_tensor():
    rows = [layer[:, :, None] for layer in MASSES]  # (B, H, 1, 2), as models give them
    for masses in (rows, list(MASSES), tuple(rows)):
        torch.testing.assert_close(loss_of(masses).per_prompt, loss_of().per_prompt, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("masses", "match"),
    [
        (MASSES[..., :1], r"masses must have shape \(layers, batch=2, heads, 2\), got \(2, 2, 2, 1\)"),
        (MASSES[:, :1], "batch=2"),
        (MASSES[0], "batch=2"),
        ([layer[:, :, None].expand(-1, -1, 2, -1) for layer in MASSES], "one row per prompt, got 2 rows"),
    ],
)
def test_wrong_shapes_raise(masses, match):
    with pytest.raises(ValueError, match=match):
        loss_of(masses)


@pytest.mark.parametrize("options", [{"wrong_penalty": -0.1}, {"correct_award": -1.0}])
def test_negative_weights_raise(options):
    with pytest.raises(ValueError, match="must not be negative"):
        loss_of(**options)


COUNTS = [10.0, 12.0, 9.0, 9.5, 4.0]


def test_pid_by_hand():
    controller = HeadCountController(0.5)
    # t = 3: 0.5 + 0.03·(9 − 12) + 0.005·(9 − 10) + 0.005·(9 − 2·12 + 10) = 0.5 − 0.09 − 0.005 − 0.025 = 0.38
    # t = 4: 0.38 + 0.03·0.5 + 0.005·(−0.5) + 0.005·(9.5 − 18 + 12) = 0.38 + 0.015 − 0.0025 + 0.0175 = 0.41
    # t = 5: 0.41 + 0.03·(−5.5) + 0.005·(−6) + 0.005·(4 − 19 + 9) = 0.41 − 0.165 − 0.03 − 0.03 = 0.185
    assert [controller.update(n) for n in COUNTS] == pytest.approx([0.5, 0.5, 0.38, 0.41, 0.185])
    assert controller.weight == pytest.approx(0.185)
    assert controller.head_counts == COUNTS


def test_pid_takes_its_factors():
    controller = HeadCountController(1.0, "PID", 0.1, 0.01, 0.001)
    assert [controller.update(n) for n in COUNTS[:3]] == pytest.approx([1.0, 1.0, 1 - 0.3 - 0.01 - 0.005])


def test_penalty_has_a_floor_at_zero_and_leaves_it():
    controller = HeadCountController(0.1)
    # 0.1 − 0.12 < 0 is lifted to 0; then 0 + 0.03·6 + 0.005·5 + 0.005·(15 − 18 + 12) = 0.25.
    assert [controller.update(n) for n in (10.0, 12.0, 9.0, 15.0)] == pytest.approx([0.1, 0.1, 0.0, 0.25])


def test_proportional_term_alone_with_its_own_factor():
    controller = HeadCountController(0.5, "P", proportional=0.02, integral=9.0, derivative=9.0)
    assert [controller.update(n) for n in COUNTS] == pytest.approx([0.5, 0.5, 0.44, 0.45, 0.34])


def test_no_adaption_keeps_the_penalty_and_the_history():
    controller = HeadCountController(0.5, "none")
    assert [controller.update(n) for n in COUNTS] == [0.5] * 5
    assert controller.head_counts == COUNTS


@pytest.mark.parametrize(
    ("counts", "collapsed"),
    [
        ([], False),
        ([10.0], False),
        ([10.0, 1.1], False),
        ([10.0, 1.0], True),
        ([10.0, 0.0, 5.0], False),
        ([0.0], True),
        ([0.0, 3.0], False),
    ],
)
def test_collapse(counts, collapsed):
    assert HeadCountController(head_counts=counts).collapsed is collapsed


def test_state_continues_the_sequence():
    whole, first, second = HeadCountController(0.5), HeadCountController(0.5), HeadCountController(9.0)
    expected = [whole.update(n) for n in COUNTS]
    got = [first.update(n) for n in COUNTS[:3]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    got += [second.update(n) for n in COUNTS[3:]]
    assert got == expected
    assert second.state_dict() == whole.state_dict()
    saved = first.state_dict()
    first.update(1.0)
    assert saved["head_counts"] == COUNTS[:3]


def test_controller_errors():
    with pytest.raises(ValueError, match="adaption must be 'PID', 'P' or 'none', got 'PI'"):
        HeadCountController(adaption="PI")
    with pytest.raises(ValueError, match="A must not be negative, got -1"):
        HeadCountController(-1.0)


# --- the share ------------------------------------------------------------------------------------------------


def share_of(masses=MASSES, **options):
    return share_loss(masses, CORRECT, SHOTS, LENGTHS, **options)


def test_share_is_the_logarithm_over_both_masses():
    result = share_of()
    # Prompt 0: heads 0.30 of 0.55 and 0.45 of 0.50. Prompt 1 has no correct demonstration: nothing to move to.
    want = -math.log(0.30 / 0.55) - math.log(0.45 / 0.50)
    torch.testing.assert_close(result.per_prompt, torch.tensor([want, 0.0], dtype=torch.float64))
    assert torch.equal(result.selected, SELECTED)
    assert result.head_counts.tolist() == [2, 2]


def _masses_of(scores):
    """Masses on keys 0, 1 (correct) and 2, 3 (wrong) of a row of six keys, of one layer, prompt and head."""
    probabilities = scores.softmax(-1)
    return torch.stack([probabilities[:2].sum(), probabilities[2:4].sum()])[None, None, None]


ONE_PROMPT = (torch.tensor([2]), torch.tensor([4]), torch.tensor([6]))


def test_share_does_not_fall_by_looking_away():
    """Its gradient with respect to the scores is P_j/S − P_j/m⁺, sums to 0 over labels, and is 0 elsewhere."""
    scores = torch.tensor([1.0, -0.5, 2.0, 0.3, 1.5, -1.0], dtype=torch.float64, requires_grad=True)
    share_loss(_masses_of(scores), *ONE_PROMPT, head_filter=False).loss.backward()
    probabilities = scores.detach().softmax(-1)
    total, correct = probabilities[:4].sum(), probabilities[:2].sum()
    want = probabilities / total - torch.where(torch.arange(6) < 2, probabilities / correct, 0.0)
    want[4:] = 0
    torch.testing.assert_close(scores.grad, want)
    assert scores.grad.sum().abs() < 1e-12

    paper = scores.detach().requires_grad_()
    abft_loss(_masses_of(paper), *ONE_PROMPT, head_filter=False, wrong_penalty=3.0).loss.backward()
    assert (paper.grad[4:] < 0).all()  # a step raises the scores of other keys: it looks away


@pytest.mark.parametrize("award", [0.0, 0.25, 1.0])
def test_award_pulls_labels_up(award):
    """−log(m⁺/S) − κ·log S: the gradient gains κ·(P_j − P_j/S) on labels and κ·P_j elsewhere; κ = 1 is −log m⁺."""
    scores = torch.tensor([1.0, -0.5, 2.0, 0.3, 1.5, -1.0], dtype=torch.float64, requires_grad=True)
    masses = _masses_of(scores)
    loss = share_loss(masses, *ONE_PROMPT, head_filter=False, mass_award=award).loss
    correct, wrong = masses.detach().flatten().tolist()
    assert loss.item() == pytest.approx(-math.log(correct / (correct + wrong)) - award * math.log(correct + wrong))
    loss.backward()
    labels, probabilities = torch.arange(6) < 4, scores.detach().softmax(-1)
    share = probabilities * (labels / (correct + wrong) - (torch.arange(6) < 2) / correct)
    pull = probabilities * (1 - labels / (correct + wrong))
    torch.testing.assert_close(scores.grad, share + award * pull)


def test_award_leaves_prompts_without_a_correct_demonstration():
    assert share_of(mass_award=0.5).per_prompt[1] == 0


LARGEST = math.log(0.9) - 0.5 * math.log(torch.finfo(torch.float32).tiny)


@pytest.mark.parametrize(
    ("masses", "want"), [((0.0, 0.9), LARGEST), ((1e-30, 0.9), LARGEST), ((0.9, 0.0), 0.0), ((0.0, 0.0), 0.0)]
)
def test_share_of_vanishing_masses_is_finite(masses, want):
    given = torch.tensor(masses)[None, None, None].requires_grad_()
    loss = share_loss(given, *ONE_PROMPT, head_filter=False).loss
    loss.backward()
    assert loss.item() == pytest.approx(want, abs=1e-3)
    assert given.grad.isfinite().all()


def test_floor_holds_heads_above_the_threshold():
    """T = 0.49954 for prompt 0. Of its heads outside of the filter only S = 0.45 is above T/2; 0.30 too."""
    masses = MASSES.clone().requires_grad_()
    floored = share_of(masses, mass_floor=2.0)
    threshold = float(induction_threshold(SHOTS, LENGTHS)[0])
    missing = 2.0 * ((threshold - 0.30) + (threshold - 0.45))
    assert (floored.per_prompt - share_of().per_prompt)[0].item() == pytest.approx(missing, abs=1e-6)
    floored.loss.backward()
    assert masses.grad[0, 0, 1].tolist() == [-1.0, -1.0]  # λ over two prompts
    assert masses.grad[1, 1, 1].tolist() == [0.0, 0.0]  # S = 0.1 is below T/2


def test_share_of_rows_equals_that_of_prompts():
    rows = [count[:, None] for count in (CORRECT, SHOTS, LENGTHS)]
    by_row = share_loss(MASSES[:, :, :, None], *rows, row_weights=torch.ones(2, 1), mass_floor=0.5)
    torch.testing.assert_close(by_row.per_prompt, share_of(mass_floor=0.5).per_prompt)


def test_unmatched_prompts_are_weighted():
    whole, left_out, half = (loss_of(unmatched_weight=weight).per_prompt for weight in (1.0, 0.0, 0.5))
    assert left_out.tolist() == [whole[0], 0.0]
    torch.testing.assert_close(half[1], whole[1] / 2)


@pytest.mark.parametrize(("loss", "option"), [(share_loss, "mass_floor"), (abft_loss, "unmatched_weight")])
def test_negative_weights_are_refused(loss, option):
    with pytest.raises(ValueError, match=f"{option}.*-1"):
        loss(MASSES, CORRECT, SHOTS, LENGTHS, **{option: -1.0})


@pytest.mark.parametrize("award", [-0.1, 1.5])
def test_award_out_of_range(award):
    with pytest.raises(ValueError, match=f"mass_award must lie from 0 to 1, got {award}"):
        share_of(mass_award=award)


def test_award_is_steered_by_hand():
    """κ rises as heads vanish, falls as they multiply, and stays within 0 … 1."""
    controller = MassAwardController(0.1)
    # t = 3: 0.1 − 0.03·(6 − 8) − 0.005·(6 − 10) − 0.005·(6 − 16 + 10) = 0.1 + 0.06 + 0.02 = 0.18
    # t = 4: 0.18 − 0.03·14 − 0.005·10 − … < 0
    assert [controller.update(n) for n in (10.0, 8.0, 6.0, 20.0)] == pytest.approx([0.1, 0.1, 0.18, 0.0])
    assert controller.update(-100.0) == 1.0
    assert [MassAwardController(0.4, "none").update(n) for n in (10.0, 8.0, 6.0)] == [0.4] * 3
    with pytest.raises(ValueError, match=r"mass_award must lie from 0 to 1, got 1\.5"):
        MassAwardController(1.5)


def test_relative_counts_make_the_gains_independent_of_the_model():
    small, large = (HeadCountController(0.5, relative=True) for _ in range(2))
    for count in (4.0, 5.0, 3.0, 6.0):
        small.update(count)
        large.update(25 * count)
    assert small.weight == pytest.approx(large.weight)
    assert small.weight != 0.5
    absolute = HeadCountController(0.5)
    for count in (1.0, 1.25, 0.75, 1.5):
        absolute.update(count)
    assert small.weight == pytest.approx(absolute.weight)
