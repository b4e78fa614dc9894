"""Loading and splitting of examples."""

import datasets
import pytest

from abft.prompts.examples import Example, load_examples, split_examples

WORDS = ("negative", "neutral", "positive")


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_jsonl_words_and_indices(tmp_path):
    path = write(
        tmp_path,
        "a.jsonl",
        '{"text": "good", "label": "positive"}\n\n{"text": "bad", "label": 0}\n{"text": "so", "label": "1"}',
    )
    examples, labels = load_examples(path, WORDS)
    assert examples == [Example("good", 2), Example("bad", 0), Example("so", 1)]
    assert labels == WORDS


def test_csv_with_named_columns_quotes_and_byte_order_mark(tmp_path):
    path = write(tmp_path, "a.CSV", '\ufeffreview,stars\n"good, very\nmuch",positive\nbad,negative\n')
    examples, labels = load_examples(str(path), text_column="review", label_column="stars")
    assert labels == ("negative", "positive")
    assert examples == [Example("good, very\nmuch", 1), Example("bad", 0)]


@pytest.mark.parametrize("order", ["b c a", "a b c"])
def test_inferred_labels_do_not_depend_on_row_order(tmp_path, order):
    lines = [f'{{"text": "t", "label": "{word}"}}' for word in order.split()]
    assert load_examples(write(tmp_path, "a.jsonl", "\n".join(lines)))[1] == ("a", "b", "c")


def test_label_words_that_are_digits_win_over_indices(tmp_path):
    path = write(tmp_path, "a.csv", "text,label\nx,1\ny,2\n")
    assert [e.label for e in load_examples(path, ("1", "2"))[0]] == [0, 1]


def dataset(names, label_values):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"text": ["t"] * len(label_values), "label": label_values}, features=features)


def test_class_label_names_are_the_labels():
    examples, labels = load_examples(dataset(["no", "yes"], [1, 0]))
    assert labels == ("no", "yes")
    assert [e.label for e in examples] == [1, 0]


def test_class_label_in_another_order_than_the_task():
    examples, _ = load_examples(dataset(["positive", "neutral", "negative"], [0, 1, 2]), WORDS)
    assert [e.label for e in examples] == [2, 1, 0]


def test_class_label_with_other_names_is_taken_by_index():
    names = ["World", "Sports", "Business", "Sci/Tech"]
    examples, _ = load_examples(dataset(names, [3, 1]), ("world", "sports", "business", "science"))
    assert [e.label for e in examples] == [3, 1]


def test_dataset_without_class_label():
    source = datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["yes", "no"]})
    assert load_examples(source) == ([Example("a", 1), Example("b", 0)], ("no", "yes"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "a", "label": 0}\n{"text": "b"}',
            r"line 2: no value for 'label', only for 'text'",
        ),
        ("a.jsonl", '{"text": "a", "label": 0}\n{bad', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "a", "label": 0}\n{"text": "\xff", "label": 0}', r"line 2: not UTF-8"),
        ("a.jsonl", "[1]", r"line 1: \[1\] is not a JSON object"),
        ("a.jsonl", '{"text": " ", "label": 0}', r"line 1: 'text' is ' '; give a non-empty text"),
        ("a.jsonl", '{"text": 3, "label": 0}', r"line 1: 'text' is 3"),
        ("a.jsonl", '{"text": "a", "label": "nice"}', r"line 1: unknown label 'nice'; .*'negative'.* 0 to 2"),
        ("a.jsonl", '{"text": "a", "label": 3}', r"unknown label 3"),
        ("a.jsonl", '{"text": "a", "label": -1}', r"unknown label -1"),
        ("a.jsonl", '{"text": "a", "label": true}', r"label True is neither"),
        ("a.jsonl", '{"text": "a", "label": 1.0}', r"label 1.0 is neither"),
        ("a.jsonl", "\n", r"a\.jsonl: no examples"),
        ("a.csv", "text,label\n", r"a\.csv: no examples"),
        (
            "a.csv",
            "text,stars\na,0\n",
            r"line 2: no value for 'label', only for 'text', 'stars'; name the columns",
        ),
        ("a.csv", "text,label\na\n", r"line 2: no value for 'label'"),
        ("a.csv", "text,label\na,0\nb, c,0\n", r"line 3: more fields than"),
        ("a.csv", 'text,label\n"a"b,0\n', r"line \d: not CSV"),
        ("a.csv", b"text,label\na\xff,0\n", r"not UTF-8"),
        ("a.tsv", "text\tlabel\n", r"unknown extension '\.tsv'; supply \.jsonl, \.ndjson or \.csv"),
    ],
)
def test_bad_files_name_line_value_and_remedy(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        load_examples(write(tmp_path, name, content), WORDS)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.csv"):
        load_examples(tmp_path / "none.csv")


@pytest.mark.parametrize("label", ["0", 0])
def test_indices_without_words_are_refused(label):
    with pytest.raises(ValueError, match=r"row 0: label .* is a class index.*pass labels"):
        load_examples(datasets.Dataset.from_dict({"text": ["a"], "label": [label]}))


def test_dataset_errors_name_the_row():
    with pytest.raises(ValueError, match="row 1: no value for 'text'"):
        load_examples(datasets.Dataset.from_dict({"text": ["a", None], "label": ["x", "y"]}))


@pytest.mark.parametrize("source", [3, datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})})])
def test_sources_of_the_wrong_type(source):
    with pytest.raises(TypeError, match="one split"):
        load_examples(source)


def test_labels_must_not_be_one_string(tmp_path):
    with pytest.raises(TypeError, match="sequence of words"):
        load_examples(tmp_path / "a.csv", "positive")


def test_split_is_disjoint_exhaustive_and_seeded():
    examples = [Example(str(i), 0) for i in range(20)]
    splits = split_examples(examples, {"train": 8, "test": 12}, seed=1)
    assert [len(splits[name]) for name in ("train", "test")] == [8, 12]
    assert {e.text for split in splits.values() for e in split} == {e.text for e in examples}
    assert splits == split_examples(examples, {"train": 8, "test": 12}, seed=1)
    assert splits != split_examples(examples, {"train": 8, "test": 12}, seed=2)


def test_split_draws_are_those_of_every_python_version():
    assert split_examples(range(10), {"a": 3, "b": 2}, seed=0) == {"a": [6, 9, 0], "b": [2, 4]}


@pytest.mark.parametrize("sizes", [{"a": 3, "b": 3}, {"a": 6}, {"a": -1}])
def test_impossible_splits(sizes):
    with pytest.raises(ValueError, match="split"):
        split_examples(range(5), sizes, seed=0)
