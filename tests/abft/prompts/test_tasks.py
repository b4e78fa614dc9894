"""Tasks and templates."""

import pytest

from abft.prompts.tasks import TASKS, Task, Template, get_task


def test_built_in_tasks_are_staicc_in_its_order():
    assert [task.name for task in TASKS] == [
        "SST2",
        "MR",
        "FP",
        "SST5",
        "TREC",
        "AGNews",
        "SUBJ",
        "TEE",
        "TEH",
        "HS18",
    ]
    assert [task.index for task in TASKS] == list(range(10))
    assert [len(task.labels) for task in TASKS] == [2, 2, 3, 5, 6, 4, 2, 4, 2, 4]


@pytest.mark.parametrize("key", ["TEH", "teh", 8])
def test_get_task_by_name_and_index(key):
    task = get_task(key)
    assert task.labels == ("normal", "hate")
    assert task.template == Template(text_prefix="tweet:", label_prefix="hate speech:")


@pytest.mark.parametrize("key", ["SST3", 10, -1, None])
def test_unknown_task_lists_the_known_ones(key):
    with pytest.raises(ValueError, match=r"unknown task .*0 SST2.*9 HS18"):
        get_task(key)


def test_segments_join_to_the_documented_layout():
    template = Template()
    demonstration = (
        template.text_segment("great movie")
        + template.label_prefix_segment
        + template.label_segment("positive")
        + template.separator
    )
    assert demonstration == "sentence: great movie sentiment: positive\n"
    assert Template(text_prefix="").text_segment("great movie") == "great movie"


@pytest.mark.parametrize("label_prefix", ["", "sentiment: ", " "])
def test_label_prefix_must_leave_the_space_to_the_label(label_prefix):
    with pytest.raises(ValueError, match="label_prefix"):
        Template(label_prefix=label_prefix)


@pytest.mark.parametrize("labels", [(), ("yes",), ("yes", "yes"), ("yes", ""), ("yes", " no")])
def test_bad_labels_are_refused(labels):
    with pytest.raises(ValueError, match="label"):
        Task("mine", labels)
