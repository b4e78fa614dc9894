"""Attend to the evidence: attention targets teach a small model to retrieve from contexts longer than it knows.

    python docs/examples/long_context_retrieval.py --output retrieval.json

A document lists records, a key and a value each, in any order and with words of no meaning between them; then comes one
of the keys, and its value is to follow. Documents are made up of the vocabulary of the model that `abft demo` uses, a
Llama of 4 layers that can copy. First all of its weights learn the task on short documents. In documents four times as
long it then finds the value less often: attention spreads over the other records. Two ways to put that right train W_Q
and W_K alone, on the same long documents and for as many steps: attention targets, by which the last row attends to the
value's position in the document and to nothing else; and end to end, by the cross-entropy of the value. Targets are
told more than the answer: where it stands. Some five minutes for three seeds.
"""

import argparse
import copy
import random
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.trainer_callback import PrinterCallback

import abft
from abft.demo.run import MODEL
from abft.evaluation.retrieval import TargetEvaluation
from abft.files import save_figure, write_json
from abft.plots import BLUE, GREY, ORANGE
from abft.provenance import versions

BOS = 1
STYLES = {"vanilla": (GREY, "s--"), "E2E": (ORANGE, "^-."), "targets": (BLUE, "o-")}


class Language:
    """Documents in words of a model: a third of them are keys, a third values, a third have no meaning."""

    def __init__(self, vocab_size: int) -> None:
        third = (vocab_size - 3) // 3  # after the special tokens
        self.keys, self.values, self.fillers = (range(3 + i * third, 3 + (i + 1) * third) for i in range(3))

    def document(self, rng: random.Random, records: int) -> tuple[list[int], dict[int, int]]:
        """Token ids, and for each key the position of its value."""
        ids, place = [BOS], {}
        for key in rng.sample(self.keys, records):
            ids += rng.choices(self.fillers, k=rng.randrange(3))
            place[key] = len(ids) + 1
            ids += [key, rng.choice(self.values)]
        return ids, place

    def targets(self, seed: int, count: int, records: int) -> list[abft.AttentionTarget]:
        """Documents with one question each: the evidence is the value's position, all other tokens are negative."""
        rng = random.Random(seed)
        made = []
        for _ in range(count):
            ids, place = self.document(rng, records)
            key, evidence = rng.choice(list(place.items()))
            made.append(abft.AttentionTarget([*ids, key], [len(ids)], [evidence], label_id=ids[evidence]))
        return made


def pretrain(model: PreTrainedModel, language: Language, seed: int, steps: int, records: int) -> None:
    """Teaches all weights to answer: 32 documents of 2 to `records` records a step, 8 questions each."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for _ in range(steps):
        sequences, starts = [], []
        for _ in range(32):
            ids, place = language.document(rng, rng.randint(2, records))
            starts.append(len(ids))
            for key in rng.choices(list(place), k=8):
                ids += [key, ids[place[key]]]
            sequences.append(torch.tensor(ids))
        batch = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        labels = torch.full_like(batch, -100)
        for row, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
            labels[row, start + 1 : len(sequence) : 2] = sequence[start + 1 :: 2]  # the answers
        optimizer.zero_grad()
        model(batch, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def fine_tune(
    model: PreTrainedModel, targets: list[abft.AttentionTarget], method: str, rate: float, seed: int
) -> PreTrainedModel:
    """A copy of the model whose W_Q and W_K were trained in two epochs."""
    with tempfile.TemporaryDirectory() as folder:
        config = abft.ABFTConfig(
            output_dir=folder,
            method=method,
            learning_rate=rate,
            per_device_train_batch_size=32,
            seed=seed,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = abft.ABFTTrainer(copy.deepcopy(model), config, targets)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.model


def run_seed(seed: int, options: argparse.Namespace, lengths: list[int]) -> dict[str, dict[int, TargetEvaluation]]:
    """Method → records → what it retrieves from held-out documents."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    language = Language(model.config.vocab_size)
    pretrain(model, language, seed, options.pretraining_steps, options.records)
    abft.enable(model)
    # Apart from each other and from those of pre-training.
    training = language.targets(1000 + seed, options.targets, 4 * options.records)
    tests = {records: language.targets(2000 + seed, options.tests, records) for records in lengths}
    results = {}
    for name, method, rate in (
        ("vanilla", None, 0.0),
        ("E2E", "e2e_qk", options.e2e_learning_rate),
        ("targets", "abft", options.learning_rate),
    ):
        tuned = model if method is None else fine_tune(model, training, method, rate, seed)
        results[name] = {records: abft.evaluate(tuned, test, progress=False) for records, test in tests.items()}
        shown = (
            f"{records} records {result.accuracy:.1%} (mass on the evidence {result.positive_mass.max():.2f})"
            for records, result in results[name].items()
        )
        print(f"seed {seed}, {name:>7}: {', '.join(shown)}", flush=True)
    return results


def figure(runs: list[dict[str, dict[int, TargetEvaluation]]], records: int) -> Figure:
    """Accuracy, and the best head's mass on the evidence, by the number of records; dots are seeds."""
    drawn = Figure(figsize=(8, 3.2), layout="constrained")
    panels = (
        ("retrieved, %", lambda result: 100 * result.accuracy),
        ("best head's mass on the evidence", lambda result: result.positive_mass.max().item()),
    )
    for axes, (label, value) in zip(drawn.subplots(1, 2), panels, strict=True):
        for name, (color, style) in STYLES.items():
            lengths = list(runs[0][name])
            values = torch.tensor([[value(run[name][length]) for length in lengths] for run in runs])
            axes.plot(lengths, values.mean(0), style, color=color, label=name)
            for row in values:
                axes.plot(lengths, row, ".", color=color, alpha=0.5, markersize=4)
        axes.axvline(records, color=GREY, linewidth=0.8, linestyle=":")
        axes.axvline(4 * records, color=GREY, linewidth=0.8, linestyle=":")
        axes.set(xlabel="records in the document", ylabel=label, ylim=(0, None), xticks=lengths)
        axes.legend(frameon=False, loc="lower left")
    drawn.suptitle(f"pre-trained on up to {records} records, fine-tuned on {4 * records} (dotted)", fontsize=9)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON of the results; a PNG goes beside it")
    parser.add_argument("--figure", type=Path, help="where the PNG goes instead")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--records", type=int, default=16, help="most in a document of pre-training; then 4 times it")
    parser.add_argument("--pretraining_steps", type=int, default=100)
    parser.add_argument("--targets", type=int, default=512, help="long documents to train on")
    parser.add_argument("--tests", type=int, default=256, help="held-out documents of each length")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="of attention targets")
    parser.add_argument("--e2e_learning_rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if not 2 <= options.records <= 20:
        parser.error(f"--records must be 2 to 20, of which 6 times fit into the model's context, got {options.records}")

    torch.set_num_threads(options.threads)
    started = time.monotonic()
    lengths = [factor * options.records for factor in (1, 2, 4, 6)]
    runs = [run_seed(seed, options, lengths) for seed in options.seeds]
    means = {
        name: {length: sum(run[name][length].accuracy or 0.0 for run in runs) / len(runs) for length in lengths}
        for name in STYLES
    }
    picture = options.figure or options.output.with_suffix(".png")
    save_figure(figure(runs, options.records), picture)
    write_json(
        options.output,
        {
            "command": ["python", *sys.argv],
            "options": {
                name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()
            },
            "versions": versions(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - started, 1),
            "accuracy_mean": means,
            "seeds": {
                seed: {name: {n: result.to_dict() for n, result in of_name.items()} for name, of_name in run.items()}
                for seed, run in zip(options.seeds, runs, strict=True)
            },
        },
    )
    long = 4 * options.records
    print(f"{long} records, mean over seeds: " + ", ".join(f"{name} {of[long]:.1%}" for name, of in means.items()))
    print(f"wrote {options.output} and {picture}")


if __name__ == "__main__":
    main()
