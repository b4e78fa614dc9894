"""The distance that training moved the weights, and models between others."""

import pytest
import torch
from tiny_models import tiny

from abft.analysis.weight_change import moved, trained_difference, weight_shift
from abft.models.attention import enable
from abft.models.projections import find_head, find_qk, train_parameters, untie_head
from abft.models.weights import save_trained


def changed(kind, folder, head, **options):
    """Save a base, and a model with 0.5 added to W_Q, W_K and, if asked for, the head; return the base."""
    base, model = tiny(kind, **options), tiny(kind, **options)
    base.save_pretrained(folder / "base")
    base.config.name_or_path = str(folder / "base")
    trained = train_parameters(model, "qk_head" if head else "qk")
    with torch.no_grad():
        for item in trained:
            item.view(model.get_parameter(item.name)).add_(0.5)
    save_trained(model, trained, folder / "trained")
    return enable(base)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_shift_of_query_and_key_apart(kind, tmp_path):
    base = changed(kind, tmp_path, head=True, tie_word_embeddings=True)
    shift = weight_shift(base, trained_difference(base, tmp_path / "trained"))
    entries = {"llama": (32 * 32, 16 * 32), "gpt2": (32 * 32, 32 * 32)}[kind]
    for part, count in zip("qk", entries, strict=True):
        torch.testing.assert_close(shift[part], torch.full((2,), 0.5 * count**0.5))
    first = [item.view(base.get_parameter(item.name)).norm() for item in find_qk(base)][: 2 if kind == "llama" else 1]
    want = 0.5 * sum(entries) ** 0.5 / torch.stack(first).norm()
    torch.testing.assert_close(shift["relative"][0], want.detach())


@pytest.mark.parametrize("head", [False, True])
def test_the_head_is_a_part_of_what_moved_if_it_was_trained(head, tmp_path):
    base = changed("llama", tmp_path, head=head, tie_word_embeddings=True)
    difference = trained_difference(base, tmp_path / "trained")
    assert ("lm_head.weight" in difference) == head
    assert len(difference) == 4 + head


def test_models_between_others_move_the_head_and_leave_the_embeddings(tmp_path):
    """One of two differences holds the head; the base's is tied at first."""
    base = changed("llama", tmp_path, head=True, tie_word_embeddings=True)
    with_head = trained_difference(base, tmp_path / "trained")
    without = {name: tensor for name, tensor in with_head.items() if not name.startswith("lm_head")}
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with moved(base, (with_head, without), (0.5, 2.0)):
        now = base.state_dict()
        for name, tensor in before.items():
            factor = 0.0 if name not in with_head else 0.5 if name.startswith("lm_head") else 2.5
            torch.testing.assert_close(now[name], tensor + 0.5 * factor, msg=name)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_a_head_is_untied_once():
    model = tiny("llama", tie_word_embeddings=True)
    untie_head(model)
    weight = model.get_output_embeddings().weight
    untie_head(model)
    assert model.get_output_embeddings().weight is weight
    assert [item.name for item in find_head(model)] == ["lm_head.weight"]
