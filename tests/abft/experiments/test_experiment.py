"""Experiments on the demo model: what is run, what is skipped, and what is refused before anything is run."""

import json
import shutil
from dataclasses import fields, replace

import pytest
import torch
from huggingface_hub import ModelCard

import abft
from abft.demo.run import MODEL
from abft.experiments.comparison import compare_runs
from abft.experiments.experiment import Experiment, ExperimentOptions
from abft.experiments.methods import GROUPS, METHODS, rates_of, resolve_methods
from abft.experiments.report import write_report
from abft.experiments.results import Results
from abft.experiments.runs import RunKey, read_run
from abft.models.loading import load_base, load_tokenizer
from abft.models.projections import find_qk
from abft.models.weights import from_pretrained
from abft.training.options import TrainingOptions
from abft.training.trainer import ABFTTrainer


def test_runs_and_their_results(experiment_folder):
    results = Results(experiment_folder)
    assert len(results.runs) == 2 + 2 * 2 * 2
    run = read_run(experiment_folder / "runs" / "abft-topics-n32-seed1")
    assert run.key == RunKey("abft", "topics", 32, 1)
    assert run.training["steps"] == len(run.training["history"]) == 1
    assert run.training["peak_memory_bytes"] > 2**20
    assert not run.training["resumed"]
    assert set(run.tests["topics"]) == {
        "Normal",
        "TempSensitivity",
        "DemoSensitivity",
        "GLER",
        "Bias",
        "Unseen",
        "ZeroShot",
        "heads",
        "unseen_heads",
    }
    assert run.training["checkpoint_seconds"] > 0
    sizes = [
        read_run(experiment_folder / "runs" / f"{method}-topics-n32-seed0").training["trained_parameters"]
        for method in ("abft", "e2e")
    ]
    base = load_base(str(MODEL))
    head = base.get_output_embeddings().weight
    assert sizes[0] == sum(base.get_parameter(item.name).numel() for item in find_qk(base))
    assert sizes[1] - sizes[0] == head.numel()
    assert set(run.tests["moods"]) == {"Normal", "heads"}
    assert {"versions", "date", "command", "processor", "commit"} <= set(run.provenance)
    vanilla = read_run(experiment_folder / "runs" / "vanilla-moods")
    assert vanilla.training is None
    assert "Calibration" in vanilla.tests["moods"]
    assert not list(experiment_folder.rglob("checkpoint-*"))


def test_seeds_draw_other_prompts(experiment_folder):
    losses = [
        read_run(experiment_folder / "runs" / f"abft-topics-n32-seed{seed}").training["history"][0]["loss"]
        for seed in (0, 1)
    ]
    assert losses[0] != losses[1]


def test_saved_weights_give_the_results_again(experiment_folder, experiment_options):
    folder = experiment_folder / "runs" / "e2e-topics-n32-seed0"
    experiment = Experiment(experiment_options)
    model = abft.from_pretrained(folder / "weights", str(MODEL), dtype=torch.float32)
    again = experiment.suites["topics"].run(model, ["Normal"], progress=False)["Normal"]
    assert again["predictions"] == read_run(folder).tests["topics"]["Normal"]["predictions"]


def test_model_card(experiment_folder):
    folder = experiment_folder / "runs" / "abft-moods-n32-seed0"
    card = ModelCard.load(folder / "weights" / "README.md")
    accuracy = read_run(folder).tests["moods"]["Normal"]["accuracy"]
    assert card.data.base_model == "demo"
    values = {result.dataset_name: result.metric_value for result in card.data.eval_results}
    assert values["moods"] == round(accuracy, 4)
    assert f"| moods | {100 * accuracy:.1f} % |" in card.text
    assert "W_Q and W_K of `demo`" in card.text
    end_to_end = ModelCard.load(experiment_folder / "runs" / "e2e-moods-n32-seed0" / "weights" / "README.md")
    assert "W_Q and W_K, and the LM head of `demo`" in end_to_end.text


def test_what_is_done_is_not_done_again(experiment_folder, experiment_options, monkeypatch):
    files = {path: path.stat().st_mtime_ns for path in experiment_folder.rglob("*.json") if path.name == "run.json"}
    monkeypatch.setattr(ABFTTrainer, "train", lambda *_, **__: pytest.fail("trained again"))
    runs = Experiment(experiment_options).run()
    assert len(runs) == 10
    assert files == {path: path.stat().st_mtime_ns for path in files}


def test_another_test_is_added_without_training(experiment_folder, experiment_options, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(experiment_folder, copy)
    path = copy / "runs" / "abft-topics-n32-seed0" / "run.json"
    content = json.loads(path.read_text())
    kept = content["tests"]["topics"].pop("Unseen")
    path.write_text(json.dumps(content))
    monkeypatch.setattr(ABFTTrainer, "train", lambda *_, **__: pytest.fail("trained again"))
    Experiment(replace(experiment_options, output_dir=str(copy))).run()
    assert json.loads(path.read_text())["tests"]["topics"]["Unseen"] == kept


def test_more_of_the_same_experiment(experiment_options, tmp_path):
    """Another method and task in the same folder join what is there."""
    options = replace(
        experiment_options,
        output_dir=str(tmp_path),
        tasks=["topics"],
        methods=["vanilla"],
        tests=["Normal"],
    )
    Experiment(options).run()
    Experiment(replace(options, tasks=["moods"], methods=["vanilla", "calibration"])).run()
    results = Results(tmp_path)
    assert results.tasks == ["topics", "moods"]
    assert results.content["methods"] == ["vanilla", "calibration"]
    assert [run.key.folder for run in results.runs] == ["vanilla-topics", "vanilla-moods"]
    assert set(results.content["labels"]) == {"topics", "moods"}


def test_interrupted_training_goes_on(experiment_options, tmp_path, monkeypatch):
    options = replace(
        experiment_options,
        output_dir=str(tmp_path / "run"),
        tasks=["topics"],
        methods=["abft"],
        tests=["Normal"],
        seeds=[0],
        num_train_epochs=3,
        generalization=False,
    )
    whole = Experiment(options).run()[0]
    interrupted = replace(options, output_dir=str(tmp_path / "interrupted"))
    original = ABFTTrainer.training_step
    steps = []

    def interrupt(self, *arguments, **keywords):
        steps.append(self.state.global_step)
        if len(steps) == 4:  # within the second of three optimizer steps of two passes
            raise KeyboardInterrupt
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(ABFTTrainer, "training_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Experiment(interrupted).run()
    assert steps[-1] == 1
    run = Experiment(interrupted).run()[0]
    assert run.training["resumed"]
    assert len(steps) == 4 + 4
    assert run.tests["topics"]["Normal"]["predictions"] == whole.tests["topics"]["Normal"]["predictions"]
    losses = [[entry["loss"] for entry in r.training["history"]] for r in (whole, run)]
    assert losses[0] == losses[1]


def test_results_without_weights(experiment_options, tmp_path):
    options = replace(
        experiment_options,
        output_dir=str(tmp_path),
        tasks=["topics"],
        methods=["abft"],
        tests=["Normal"],
        seeds=[0],
        keep_weights=False,
        generalization=False,
        num_prompts=[8],
        pseudo_batch_size=8,
        batch_size=8,
    )
    Experiment(options).run()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["experiment.json", "run.json"]
    with pytest.raises(ValueError, match="keeps no weights to test anew"):
        Experiment(replace(options, tests=["Normal", "Unseen"])).run()


def test_trained_but_not_tested(experiment_options, tmp_path):
    options = replace(
        experiment_options,
        output_dir=str(tmp_path),
        train_tasks=["moods"],
        methods=["vanilla", "abft"],
        seeds=[0],
        tests=["Normal"],
        test_trained=False,
        num_prompts=[8],
        pseudo_batch_size=8,
        batch_size=8,
    )
    runs = Experiment(options).run()
    assert [run.key.folder for run in runs] == ["vanilla-topics", "vanilla-moods", "abft-moods-n8-seed0"]
    assert runs[-1].training["steps"] == 1
    assert not runs[-1].tests
    assert (tmp_path / "runs" / "abft-moods-n8-seed0" / "weights" / "abft_config.json").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["topic"]}, "the demo has no task 'topic'; it has topics"),
        ({"tasks": ["SST9"], "data": "staicc"}, "unknown task 'SST9'"),
        ({"data": "nowhere"}, "neither staicc, nor demo, nor a folder"),
        ({"methods": ["abtf"]}, "unknown method 'abtf'"),
        ({"methods": []}, "no methods"),
        ({"tests": ["Nomal"]}, "unknown test 'Nomal'"),
        ({"k": 2000}, "k=2000 is beyond the pools of task topics"),
        ({"k": -1}, "k=-1"),
        ({"num_prompts": [2000]}, "num_prompts=2000, but task topics has 1024"),
        ({"num_prompts": [0]}, "num_prompts must be"),
        ({"seeds": [1, 1]}, "seeds must be"),
        ({"limit": 0}, "limit must be 1 or more"),
        ({"load_in_4bit": True}, "with --lora True"),
        ({"dtype": "float8"}, "dtype must be one of"),
        ({"staicc_compat": True}, "give --tests Normal"),
        ({"staicc_compat": True, "tests": ["Normal"]}, "leave out the method calibration"),
        ({"tests": ["Calibration"]}, "unknown test 'Calibration'"),
        ({"batch_size": 5}, "pseudo_batch_size=32 is no multiple"),
        ({"wrong_penalty": -1.0}, "wrong_penalty must not be negative"),
        ({"train_tasks": ["weather"]}, "train_tasks names 'weather'"),
        ({"limit": 7}, "was made with limit=6, now it is 7"),
        ({"model": str(MODEL)}, "was made with model='demo'"),
        ({"k": 100}, "tokens exceeds max_length=512"),
    ],
)
def test_bad_input_is_refused_before_work(experiment_folder, experiment_options, monkeypatch, changes, message):
    before = sorted(experiment_folder.rglob("*"))
    for name in ("load_base", "fit", "write_json"):
        monkeypatch.setattr(f"abft.experiments.experiment.{name}", lambda *_, **__: pytest.fail("worked"))
    with pytest.raises(ValueError, match=message):
        Experiment(replace(experiment_options, **changes))
    assert sorted(experiment_folder.rglob("*")) == before


def test_a_folder_from_before_an_option(experiment_folder, experiment_options, tmp_path):
    """Runs that were stored before an option existed were made with its default: they resume with that alone."""
    copy = tmp_path / "copy"
    shutil.copytree(experiment_folder, copy)
    for path in copy.rglob("run.json"):
        content = json.loads(path.read_text())
        content["settings"].pop("head_filter", None)  # of training
        path.write_text(json.dumps(content))
    options = replace(experiment_options, output_dir=str(copy))
    assert len(Experiment(options).run()) == 10
    with pytest.raises(ValueError, match="was made with head_filter=True, now it is False"):
        Experiment(replace(options, head_filter=False))


def test_runs_of_an_earlier_protocol_are_refused(experiment_folder, experiment_options, tmp_path):
    """Their methods and prompts meant something else."""
    copy = tmp_path / "copy"
    shutil.copytree(experiment_folder, copy)
    path = copy / "runs" / "abft-moods-n32-seed1" / "run.json"
    content = json.loads(path.read_text())
    del content["settings"]["protocol"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="was made with protocol=1, now it is 2; choose another --output_dir"):
        Experiment(replace(experiment_options, output_dir=str(copy)))
    with pytest.raises(ValueError, match="the runs have different prompts: protocol is 2 and None"):
        compare_runs(copy / "runs" / "vanilla-moods", path.parent)


def test_training_options_are_declared_once(experiment_options, tmp_path):
    """`abft train` and `abft experiment` take the same training options, and an experiment hands them on."""
    options = {option.name: option for option in fields(TrainingOptions)}
    for command in (abft.ABFTConfig, ExperimentOptions):
        own = {option.name: option for option in fields(command)}
        for name, option in options.items():
            assert own[name].default == option.default, name
            assert own[name].metadata == option.metadata, name
    changed: dict = {
        name: not option.default if isinstance(option.default, bool) else 7
        for name, option in options.items()
        if name not in ("adaption", "pseudo_batch_size", "restricted_gradient")
    }
    changed |= {"adaption": "P", "pseudo_batch_size": 48, "mass_award": 0.7}
    experiment = Experiment(replace(experiment_options, output_dir=str(tmp_path), methods=["abft", "share"], **changed))
    for method, others in (("abft", {"mass_award", "mass_floor"}), ("share", {"wrong_penalty", "correct_award"})):
        config = experiment._config(METHODS[method], tmp_path, seed=3)
        mine = changed.keys() - set(METHODS[method].objective.ignores)
        assert {name: getattr(config, name) for name in mine} == {name: changed[name] for name in mine}
        assert others <= changed.keys() - mine
    with pytest.warns(UserWarning, match=r"mass_award, mass_floor without effect: none of abft heeds it"):
        Experiment(replace(experiment_options, output_dir=str(tmp_path), methods=["abft"], **changed))
    # The size and the layout of a pass change no result.
    assert options.keys() - experiment.settings.keys() == {"packing", "tokens_per_batch", "gradient_checkpointing"}


def test_rates_of_single_methods(one_task_options, tmp_path):
    """They reach the training and the run's settings; a run at another rate is refused."""
    options = replace(
        one_task_options, output_dir=str(tmp_path), methods=["vanilla", "abft", "e2e"], limit=2, learning_rate=1e-3,
        learning_rates=["e2e=2e-4"],
    )  # fmt: skip
    runs = {run.key.method: run for run in Experiment(options).run()}
    rates = {name: run.settings["learning_rate"] for name, run in runs.items() if run.training}
    assert rates == {"abft": 1e-3, "e2e": 2e-4}
    logged = {name: runs[name].training["history"][0]["learning_rate"] for name in ("abft", "e2e")}
    assert logged == {"abft": 1e-3, "e2e": 2e-4}
    write_report([tmp_path], tmp_path / "report.html")
    assert "learning rates 0.001 (ABFT), 0.0002 (E2E)" in (tmp_path / "report.md").read_text()
    assert len(Experiment(options).run()) == 3
    with pytest.raises(ValueError, match=r"was made with learning_rate=0\.0002, now it is 0\.001"):
        Experiment(replace(options, learning_rates=[]))


def test_the_untrained_model_serves_any_training(one_task_options, tmp_path):
    options = replace(one_task_options, output_dir=str(tmp_path), methods=["vanilla"], limit=2)
    Experiment(options).run()
    changed = replace(options, learning_rate=1e-3, pseudo_batch_size=32, adaption="none", mass_award=0.5)
    assert len(Experiment(changed).run()) == 1
    with pytest.raises(ValueError, match="was made with k=4, now it is 3"):
        Experiment(replace(changed, k=3))


def test_options_that_a_method_ignores_change_no_run_of_it(one_task_options, tmp_path):
    options = replace(one_task_options, output_dir=str(tmp_path), methods=["share"], limit=2)
    Experiment(options).run()
    both = replace(options, wrong_penalty=0.2, methods=["share", "abft"], grid=["wrong_penalty=0,0.25"])
    experiment = Experiment(both)
    assert experiment.points == {"share": [""], "abft": ["", "wrong_penalty=0.0", "wrong_penalty=0.25"]}
    assert experiment._stored(experiment.keys[-1]) is not None
    with pytest.warns(UserWarning, match="wrong_penalty without effect: none of share heeds it"):
        Experiment(replace(both, methods=["share"]))
    with pytest.raises(ValueError, match=r"was made with mass_award=0\.1, now it is 0\.5"):
        Experiment(replace(both, mass_award=0.5))


@pytest.mark.parametrize("text", ["e2e", "e2e=fast", "vanilla=1e-3", "abtf=1e-3", "e2e=0", "e2e=-1", "e2e=nan"])
def test_bad_rates(text):
    with pytest.raises(ValueError, match=f"learning_rates .*got {text!r}"):
        rates_of([text])


def test_several_processes_are_refused(experiment_options, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="runs in one process, here are 2"):
        Experiment(replace(experiment_options, output_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_folder_that_cannot_be_written(experiment_options, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to .*choose another folder"):
        Experiment(replace(experiment_options, output_dir=str(tmp_path / "file" / "run")))


def test_folder_of_another_version(experiment_folder, experiment_options, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(experiment_folder, copy)
    path = copy / "runs" / "vanilla-topics" / "run.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "format_version": 0}))
    with pytest.raises(ValueError, match="format version 0, this release reads 1"):
        Experiment(replace(experiment_options, output_dir=str(copy)))
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        Experiment(replace(experiment_options, output_dir=str(copy)))


def test_file_with_code_in_it(experiment_options, tmp_path, monkeypatch):
    (tmp_path / "cached_dataset").mkdir()
    (tmp_path / "cached_dataset" / "sst2.dataset").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    monkeypatch.setattr("abft.evaluation.staicc._package_file", lambda name: tmp_path / name)
    with pytest.raises(ValueError, match=r"os\.system, and data files hold plain data only"):
        Experiment(replace(experiment_options, data="staicc", tasks=["SST2"], output_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_methods():
    assert [method.name for method in resolve_methods(["e2e", "paper"])] == list(GROUPS["paper"])
    assert all(set(method.options or {}) <= set(abft.ABFTConfig.__dataclass_fields__) for method in METHODS.values())
    ablations = [METHODS[name].options for name in GROUPS["ablation"] if name not in ("vanilla", "abft")]
    assert [options.pop("adaption") for options in map(dict, ablations)] == ["none"] * 4  # the paper's Table 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_is_tested_as_it_was_trained(dtype, tmp_path, monkeypatch):
    """The tests after training, of float32 W_Q and W_K under autocast, equal those of the weights loaded anew."""
    for module in ("models.loading", "experiments.experiment"):
        monkeypatch.setattr(f"abft.{module}.computes_bfloat16", lambda: True)
    load_base(str(MODEL)).to(dtype).save_pretrained(tmp_path / "model")
    load_tokenizer(str(MODEL)).save_pretrained(tmp_path / "model")
    options = ExperimentOptions(
        model=str(tmp_path / "model"), data="demo", tasks=["topics"], methods=["abft"], k=4, num_prompts=[32], limit=4,
        learning_rate=5e-4, num_train_epochs=1, output_dir=str(tmp_path / "out"), quiet=True,
        gradient_checkpointing=True, tokens_per_batch="300",
    )  # fmt: skip
    experiment = Experiment(options)
    (run,) = experiment.run()
    weights = tmp_path / "out" / "runs" / run.key.folder / "weights"
    loaded = from_pretrained(weights, experiment.model, **experiment.loading())
    assert loaded.dtype == torch.bfloat16
    again = experiment.suites["topics"].run(loaded, ["Normal"], batch_size=32, progress=False)
    assert again["Normal"] == run.tests["topics"]["Normal"]
