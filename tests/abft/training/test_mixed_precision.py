"""A 16-bit base with float32 W_Q and W_K: it trains as float32 does, and what is evaluated is what was trained."""

import pytest
import torch
from float32_comparison import check_mixed_precision, compare_with_float32
from safetensors.torch import load_file
from tiny_models import tiny
from trainers import LABEL_LOOKERS, assert_same_trajectory, state_of, trained, trainer_of

import abft
from abft.demo.run import MODEL as DEMO
from abft.evaluation.label_attention import head_statistics
from abft.models.loading import load_base
from abft.models.mixed_precision import float32_masters
from abft.models.projections import find_qk


def dtypes(model):
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("llama", torch.bfloat16), ("llama", torch.float16), ("gpt2", torch.float16), ("gpt_neox", torch.bfloat16),
        ("phi3", torch.bfloat16), ("deepseek_v3", torch.bfloat16),
    ],
)  # fmt: skip
def test_only_what_is_trained_is_in_float32(kind, dtype, toy_prompts, toy_builder, tmp_path):
    model = tiny(kind, **LABEL_LOOKERS).to(dtype)
    before = {name: torch.bfloat16 for name in dtypes(model)}
    own = {item.name for item in find_qk(model)}
    trainer = trained(model, toy_prompts[:32], toy_builder, tmp_path, num_train_epochs=1, head_filter=False)
    assert dtypes(model) == {name: torch.float32 if name in own else before[name] for name in before}
    trainer.save_model(str(tmp_path / "out"))
    saved = load_file(tmp_path / "out" / "qk_weights.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    assert states
    assert {value.dtype for value in states} == {torch.float32}
    rounded = [(tensor == tensor.bfloat16().float()).float().mean().item() for tensor in saved.values()]
    assert max(rounded) < 0.6, "the updates were rounded to 16 bits"


def test_a_float16_base_becomes_a_bfloat16_one_with_a_warning():
    model = tiny("gpt2").half()
    with pytest.warns(UserWarning, match=r"converted to bfloat16.*evaluate what is trained with dtype=bfloat16"):
        float32_masters(model, find_qk(model), "cpu")
    assert set(dtypes(model).values()) == {torch.float32, torch.bfloat16}


def test_a_float32_model_stays_as_it_is(toy_prompts, toy_builder, tmp_path):
    model = tiny("llama")
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    trainer_of(model, toy_prompts, toy_builder, tmp_path)
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert set(dtypes(model).values()) == {torch.float32}


def test_a_half_precision_base_under_lora_trains_float32_adapters(toy_prompts, toy_builder, tmp_path):
    model = tiny("llama", **LABEL_LOOKERS).bfloat16()
    trainer = trained(model, toy_prompts[:32], toy_builder, tmp_path, num_train_epochs=1, lora=True)
    found = dtypes(trainer.model)
    assert {dtype for name, dtype in found.items() if "lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in found.items() if "lora_" not in name} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}), ("llama", {"method": "share"}), ("llama", {"method": "e2e"}),
        ("llama", {"restricted_gradient": True}),
        ("llama", {"packing": False}), ("gpt2", {}), ("gemma2", {}),
    ],
    ids=["full", "share", "e2e", "restricted", "padded", "gpt2", "gemma2"],
)  # fmt: skip
def test_follows_the_trajectory_of_float32(kind, changes, toy_prompts, tmp_path):
    """Losses within 1 % (E2E 5 %), and updates of W_Q and W_K in one direction (cosine over 0.9, E2E 0.7)."""
    model = tiny(kind, **LABEL_LOOKERS).bfloat16()
    of_logits = changes.get("method") == "e2e"
    options = {"num_train_epochs": 1, "head_filter": of_logits, "learning_rate": 1e-3, **changes}
    mixed, exact, cosine = compare_with_float32(model, toy_prompts, tmp_path, **options)
    # E2E goes through the logits of a random model with wide weights, which amplify rounding.
    tolerance, least = (5e-2, 0.7) if of_logits else (1e-2, 0.9)
    assert mixed == pytest.approx(exact, rel=tolerance)
    assert mixed != exact
    assert cosine > least


def test_follows_the_trajectory_of_float32_with_the_demo_model(demo_tokenizer, tmp_path):
    from abft.demo.corpus import DEMO_TASK, demo_splits

    splits = demo_splits(train=64, test=8)
    builder = abft.PromptBuilder(demo_tokenizer, DEMO_TASK)
    prompts = abft.sample_prompts(builder, splits.train, splits.demonstrations, 4, 0)
    check_mixed_precision(DEMO, prompts, tmp_path, rel=3e-2, num_train_epochs=1, learning_rate=5e-4, adaption="none")


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"offload_activations": True},
        {"packing": True, "tokens_per_batch": 100},
    ],
    ids=["checkpointed", "offloaded", "passes"],
)
def test_ways_to_save_memory_change_nothing(changes, toy_prompts, toy_builder, tmp_path):
    plain, other = (
        trained(
            tiny("llama", **LABEL_LOOKERS).bfloat16(), toy_prompts, toy_builder, tmp_path, num_train_epochs=1,
            head_filter=False, **options,
        )
        for options in ({}, changes)
    )  # fmt: skip
    # A pass of other prompts rounds its sums to 16 bits elsewhere.
    assert_same_trajectory(plain, other, 1e-3 if "tokens_per_batch" in changes else 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_evaluation_is_of_what_was_trained(dtype, toy_prompts, toy_builder, tmp_path):
    """Of the masters under autocast while training, and of the saved weights on the 16-bit base afterwards."""
    tiny("llama", **LABEL_LOOKERS).to(dtype).save_pretrained(tmp_path / "base")
    base = load_base(str(tmp_path / "base"), dtype=str(dtype).removeprefix("torch."))
    assert base.dtype == dtype
    trainer = trained(base, toy_prompts[:32], toy_builder, tmp_path / "run", learning_rate=1e-2, head_filter=False)
    trainer.save_model(str(tmp_path / "trained"))
    loaded = abft.from_pretrained(tmp_path / "trained", str(tmp_path / "base"), dtype="bfloat16")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    test = toy_prompts[32:]
    now, later = (abft.evaluate(model, test, progress=False) for model in (trainer.model, loaded))
    assert torch.equal(now.probabilities, later.probabilities)
    assert trainer.evaluate(test)["eval_accuracy"] == now.accuracy
    untrained = abft.evaluate(load_base(str(tmp_path / "base"), dtype="bfloat16"), test, progress=False)
    assert not torch.equal(now.probabilities, untrained.probabilities)
    mine, theirs = (head_statistics(model, test, progress=False) for model in (trainer.model, loaded))
    assert torch.equal(mine.mass_correct, theirs.mass_correct)


def test_resumes_to_the_same_bits(toy_prompts, toy_builder, tmp_path):
    options = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 1, "head_filter": False}
    whole = trained(tiny("llama", **LABEL_LOOKERS).bfloat16(), toy_prompts, toy_builder, tmp_path, **options)
    resumed = trained(
        tiny("llama", **LABEL_LOOKERS).bfloat16(), toy_prompts, toy_builder, tmp_path,
        resume=str(tmp_path / "checkpoint-1"), **options,
    )  # fmt: skip
    assert whole.state.global_step == resumed.state.global_step == 2
    mine = state_of(resumed)
    for name, value in state_of(whole).items():
        assert torch.equal(value, mine[name]), name


def test_a_device_without_bfloat16_is_refused_before_anything_changes(monkeypatch):
    model = tiny("llama").half()
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Old card")
    with pytest.raises(ValueError, match=r"Old card has no bfloat16.*torch\.float16.*dtype=float32"):
        float32_masters(model, find_qk(model), "cuda")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
