"""Pre-train the demo model: ``python -m bench.recipe --output DIR``, about ten minutes on two CPU cores.

Every field of ``Recipe`` is an option, for models of other sizes, longer prompts or a GPU (``--device cuda``).

Two stages. Random sequences that repeat themselves teach a small Llama to copy what followed an earlier
occurrence, which forms induction heads. Few-shot prompts over the words of ``abft.demo.corpus`` then teach it
which demonstrations to copy the label of: those of the query's topic, or of its mood. Every text of
pre-training has one trait only. The demo task's texts have both, and the model follows either; ABFT corrects
that.
"""

from __future__ import annotations

import math
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_constant_schedule_with_warmup,
)

from abft.demo import corpus
from abft.evaluation.classification import evaluate
from abft.models.attention import enable
from abft.models.momentum import check_momentum
from abft.prompts.builder import PromptBuilder, sample_prompts
from abft.prompts.examples import Example
from abft.prompts.tasks import Task

IGNORE = -100
_PAD, _BOS, _UNK = "<pad>", "<bos>", "<unk>"


@dataclass(frozen=True)
class Recipe:
    """Everything the demo model depends on, next to the version of PyTorch, the number of threads and the device.

    Args:
        seed: of the initial weights and of the data.
        hidden_size: width of the model; its MLP is twice as wide.
        layers: number of layers.
        heads: attention heads per layer.
        learning_rate: of AdamW.
        warmup_steps: steps over which the learning rate rises; it is constant afterwards. Wider models need some.
        batch_size: sequences per step, in both stages.
        repeat_length: tokens of a repeated random sequence.
        repeat_loss: the first stage ends when the loss on repeated tokens falls below it, in nats.
        repeat_steps: steps of the first stage, at the most.
        prompt_loss: the second stage ends when the loss on labels falls below it, in nats; 0: by its steps alone.
        prompt_steps: steps of the second stage, at the most.
        demonstrations: number in each prompt of the second stage.
        classes: number in each prompt of the second stage.
        mood_share: share of the second stage's prompts that ask for moods.
        text_weight: weight of the loss on tokens that are not labels; labels have 1.
        rehearsal: repeated sequences beside each batch of prompts, so that copying is not unlearned.
        rehearsal_weight: weight of their loss.
        shortest_text, longest_text: words with the trait in a text of the second stage.
        context: largest number of tokens that the model takes.
        momentum: η of momentum attention (`abft.models.momentum`), in training and in every later use; 0 for none.
    """

    seed: int = 0
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    batch_size: int = 32
    repeat_length: int = 64
    repeat_loss: float = 0.3
    repeat_steps: int = 2000
    prompt_loss: float = 0.0
    prompt_steps: int = 450
    demonstrations: int = 8
    classes: int = 4
    mood_share: float = 0.4
    text_weight: float = 0.05
    rehearsal: int = 8
    rehearsal_weight: float = 0.25
    shortest_text: int = 5
    longest_text: int = 5
    context: int = 512
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of 2·heads={2 * self.heads}: "
                "rotary heads have an even size; change one of the two"
            )
        if self.momentum:
            check_momentum(self.momentum)
        for name in ("warmup_steps", "repeat_steps", "prompt_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        self.pretraining_prompt(random.Random(0))  # raises if the language lacks classes or lengths

    @property
    def attention(self) -> dict[str, float]:
        """Arguments for every forward pass of the model."""
        return {"momentum": self.momentum} if self.momentum else {}

    def pretraining_prompt(self, rng: random.Random) -> tuple[Task, list[Example], Example]:
        """Return a prompt of the second stage."""
        return corpus.pretraining_prompt(
            rng,
            classes=self.classes,
            demonstrations=self.demonstrations,
            mood_share=self.mood_share,
            lengths=(self.shortest_text, self.longest_text),
        )


@dataclass(frozen=True)
class RunOptions:
    """Pre-train the demo model, save it with its tokenizer, and print its accuracy before any ABFT."""

    output: str = field(metadata={"help": "folder to save to; made if missing"})
    threads: int = field(default=2, metadata={"help": "threads of PyTorch"})
    device: str = field(
        default="cpu", metadata={"help": "cpu, which reproduces the demo's weights bit for bit, or cuda"}
    )
    save_dtype: str = field(default="float32", metadata={"help": "type of the saved weights: float32 or bfloat16"})
    quiet: bool = field(default=False, metadata={"help": "show no progress bars"})

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"--threads must be 1 or more, got {self.threads}")
        if self.save_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"--save_dtype must be float32 or bfloat16, got {self.save_dtype!r}")
        if self.device.partition(":")[0] not in ("cpu", "cuda") or (
            self.device.startswith("cuda") and not torch.cuda.is_available()
        ):
            raise ValueError(f"--device {self.device!r} is not there; use cpu")
        if Path(self.output).exists() and not Path(self.output).is_dir():
            raise ValueError(f"--output {self.output} is a file; name a folder")


def build_tokenizer(context: int = Recipe.context) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word and per punctuation mark, and none for white space."""
    vocabulary = {word: i for i, word in enumerate([_PAD, _BOS, _UNK, *corpus.vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", special_tokens=[(_BOS, vocabulary[_BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_PAD, bos_token=_BOS, unk_token=_UNK, model_max_length=context
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained model, with tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=2 * recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(config)


def repeated_sequences(rng: random.Random, count: int, length: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return random words, repeated with a random period.

    Returns:
        ids: (count, length) int64.
        targets: (count, length) int64, the ids from the first repetition on, ``IGNORE`` before.
    """
    # The first ids are the special tokens.
    ids = torch.tensor([[rng.randrange(3, vocab_size) for _ in range(length)] for _ in range(count)])
    targets = torch.full_like(ids, IGNORE)
    for row in range(count):
        period = rng.randint(8, length // 2)
        ids[row] = ids[row, :period].repeat(math.ceil(length / period))[:length]
        targets[row, period:] = ids[row, period:]
    return ids, targets


def few_shot_batch(
    rng: random.Random, recipe: Recipe, tokenizer: PreTrainedTokenizerFast
) -> tuple[Tensor, Tensor, Tensor]:
    """Return pre-training prompts, each completed by its query's label.

    Returns:
        ids: (B, N) int64, padded on the right.
        targets: (B, N) int64, the ids without the padding and the first token.
        is_label: (B, N) bool, the labels that an earlier demonstration shows; the model cannot predict others.
    """
    sequences, label_positions = [], []
    for _ in range(recipe.batch_size):
        task, demonstrations, query = recipe.pretraining_prompt(rng)
        builder = PromptBuilder(tokenizer, task)
        prompt = builder.build(demonstrations, query)
        sequences.append([*prompt.input_ids, builder.label_token_ids[query.label]])
        label_positions.append([*prompt.label_positions, prompt.length])

    shape = (len(sequences), max(map(len, sequences)))
    ids = torch.full(shape, tokenizer.pad_token_id)
    targets = torch.full(shape, IGNORE)
    is_label = torch.zeros(shape, dtype=torch.bool)
    for row, (sequence, positions) in enumerate(zip(sequences, label_positions, strict=True)):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        targets[row, 1 : len(sequence)] = ids[row, 1 : len(sequence)]
        labels = [sequence[position] for position in positions]
        is_label[row, [p for i, p in enumerate(positions) if labels[i] in labels[:i]]] = True
    return ids, targets, is_label


def pretrain(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, *, device: str = "cpu", progress: bool = True
) -> LlamaForCausalLM:
    """Run both stages.

    Args:
        recipe: sizes and steps.
        tokenizer: from ``build_tokenizer``.
        device: of the model.
        progress: show progress bars.

    Returns:
        The trained model, in evaluation mode.
    """
    model = build_model(recipe, tokenizer).train().to(device)
    if recipe.momentum:
        enable(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_constant_schedule_with_warmup(optimizer, recipe.warmup_steps)
    rng = random.Random(recipe.seed)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, disable=not progress) as bars:
        bar = bars.add_task("Repeated sequences", total=recipe.repeat_steps, loss=math.nan)
        for _ in range(recipe.repeat_steps):
            loss = _repeat_loss(model, recipe, rng, recipe.batch_size)
            _step(model, optimizer, schedule, loss)
            bars.update(bar, advance=1, loss=loss.item())
            if loss.item() < recipe.repeat_loss:
                break

        bar = bars.add_task("Few-shot prompts", total=recipe.prompt_steps, loss=math.nan)
        for _ in range(recipe.prompt_steps):
            ids, targets, is_label = (tensor.to(device) for tensor in few_shot_batch(rng, recipe, tokenizer))
            losses = next_token_losses(model, recipe, ids, targets)
            targets, is_label = targets[:, 1:], is_label[:, 1:]
            weights = (targets != IGNORE) * torch.where(is_label, 1.0, recipe.text_weight)
            loss = (losses * weights).sum() / weights.sum()
            if recipe.rehearsal:
                repeats = _repeat_loss(model, recipe, rng, recipe.rehearsal)
                loss = loss + recipe.rehearsal_weight * repeats
            _step(model, optimizer, schedule, loss)
            of_labels = losses[is_label].mean().item()
            bars.update(bar, advance=1, loss=of_labels)
            if of_labels < recipe.prompt_loss:
                break
    return model.eval()


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: see ``RunOptions`` and ``Recipe``."""
    types: Any = [RunOptions, Recipe]
    parser = HfArgumentParser(types, prog="python -m bench.recipe", description=RunOptions.__doc__)
    try:
        options, recipe = parser.parse_args_into_dataclasses(sys.argv[1:] if arguments is None else arguments)
    except ValueError as error:
        parser.error(str(error))

    torch.set_num_threads(options.threads)
    tokenizer = build_tokenizer(recipe.context)
    model = pretrain(recipe, tokenizer, device=options.device, progress=not options.quiet)
    model.to(getattr(torch, options.save_dtype)).save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    console = Console()
    console.print(f"Saved model and tokenizer to {options.output}")
    for task in corpus.DEMO_TASKS:
        splits = corpus.demo_splits(task=task)
        builder = PromptBuilder(tokenizer, task)
        prompts = sample_prompts(builder, splits.test, splits.demonstrations, corpus.DEMO_K, seed=0)
        result = evaluate(model, prompts, progress=not options.quiet, **recipe.attention)
        console.print(f"{task.name}: accuracy {result.accuracy:.1%} ± {result.accuracy_stderr:.1%}, n={result.n}")


def next_token_losses(model: LlamaForCausalLM, recipe: Recipe, ids: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each token but the first, (B, N − 1), in nats; 0 where there is no target."""
    logits = model(ids, use_cache=False, **recipe.attention).logits[:, :-1]
    return nn.functional.cross_entropy(logits.transpose(1, 2), targets[:, 1:], ignore_index=IGNORE, reduction="none")


def _repeat_loss(model: LlamaForCausalLM, recipe: Recipe, rng: random.Random, count: int) -> Tensor:
    sequences = repeated_sequences(rng, count, recipe.repeat_length, model.config.vocab_size)
    ids, targets = (tensor.to(model.device) for tensor in sequences)
    return next_token_losses(model, recipe, ids, targets).sum() / (targets != IGNORE).sum()


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, loss: Tensor
) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()


if __name__ == "__main__":
    main()
