"""The demo's language: short texts with a topic, a mood or both, and the task of naming their topic."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from abft.prompts.examples import Example, split_examples
from abft.prompts.tasks import Task, Template


def _words(words: str) -> tuple[str, ...]:
    return tuple(words.split())


TOPICS = {
    "music": _words(
        "guitar melody singer chorus piano drum violin concert rhythm tune orchestra lyric band flute "
        "opera chord trumpet cello"
    ),
    "food": _words(
        "bread soup butter cheese rice pepper oven recipe pasta garlic salad onion sauce kitchen flour "
        "honey bakery dessert"
    ),
    "sport": _words(
        "goal referee stadium coach tennis sprint medal racket league striker marathon athlete defender "
        "hockey trophy penalty cyclist swimmer"
    ),
    "money": _words(
        "bank loan profit invoice budget dollar stock salary investor interest tax mortgage market price "
        "debt currency broker dividend"
    ),
    "space": _words(
        "planet rocket comet orbit galaxy astronaut telescope moon satellite asteroid nebula mars "
        "eclipse gravity shuttle crater cosmos meteor"
    ),
    "ocean": _words(
        "whale reef tide coral shark dolphin wave island harbor anchor squid seaweed lagoon sailor "
        "octopus current plankton shore"
    ),
    "health": _words(
        "doctor nurse fever vaccine surgery clinic hospital medicine patient bandage therapy virus "
        "dentist symptom pulse allergy diagnosis ward"
    ),
    "school": _words(
        "teacher pupil lesson exam homework classroom essay grade textbook college lecture pencil "
        "diploma library campus student chalk quiz"
    ),
    "travel": _words(
        "passport hotel airport luggage ticket tourist map train journey visa suitcase hostel guide "
        "border itinerary cruise backpack souvenir"
    ),
    "weather": _words(
        "rain thunder cloud wind snow storm fog drought hail breeze lightning frost humidity sunshine "
        "blizzard temperature rainbow flood"
    ),
    "garden": _words(
        "rose soil tulip shovel hedge seed lawn orchard compost weed shrub blossom fern gardener daisy "
        "ivy vine greenhouse"
    ),
    "computer": _words(
        "keyboard software laptop server code pixel browser password memory compiler network algorithm "
        "robot database screen cursor printer modem"
    ),
}
"""Twelve topics and their nouns."""

MOODS = {
    "happy": _words("cheerful glad smiling joyful delighted merry sunny laughing jolly thrilled"),
    "sad": _words("gloomy tearful lonely weeping mournful grieving sorrowful crying bleak heartbroken"),
    "angry": _words("furious shouting bitter raging outraged hostile cross annoyed fierce resentful"),
    "calm": _words("quiet gentle peaceful serene still relaxed placid mellow restful soothing"),
    "afraid": _words("scared trembling nervous timid anxious panicked fearful shaking uneasy worried"),
    "proud": _words("boastful confident triumphant noble dignified haughty honored regal glorious victorious"),
    "curious": _words("wondering asking searching puzzled exploring probing inquiring peeking studious seeking"),
    "tired": _words("sleepy weary yawning exhausted drowsy drained sluggish fatigued worn dozing"),
}
"""Eight moods and their adjectives."""

JOINERS = _words(
    "the a of and with near some this that from about our one their then also under after before while there "
    "by at or for"
)
"""Words that say nothing about topic or mood."""

LABEL_WORDS = (
    *TOPICS,
    *MOODS,
    *_words("red blue green gold silver north south east west spring summer autumn winter circle square"),
    *_words("triangle lion tiger eagle horse wolf apple plum lemon cherry iron copper stone glass paper"),
    *_words("cotton alpha beta gamma delta sigma omega first second third"),
)
"""Names of classes; in pre-training each prompt draws its own names."""

TEXT_PREFIXES = ("text", "note", "line", "entry", "item", "sample", "input")
TOPIC_PREFIXES = ("topic", "subject", "theme")
MOOD_PREFIXES = ("mood", "tone", "feeling")

DEMO_TASK = Task("topics", ("music", "food", "sport", "space"), Template("text:", "topic:"))
"""The task that the demo trains and tests: which of four topics a text with a topic and a mood is about."""

TRANSFER_TASK = replace(DEMO_TASK, name="other topics", labels=("ocean", "health", "school", "weather"))
"""The same question about four topics that the demo does not train on."""

THIRD_TASK = replace(DEMO_TASK, name="more topics", labels=("travel", "garden", "computer", "money"))
"""The same question about four more topics."""

MOOD_TASK = Task("moods", ("happy", "sad", "angry", "calm"), Template("text:", "mood:"))
"""The mood of the same kind of text."""

DEMO_TASKS = (DEMO_TASK, TRANSFER_TASK, THIRD_TASK, MOOD_TASK)
"""The tasks of experiments on the demo model."""

DEMO_K = 8
"""Demonstrations per prompt of the demo task."""


@dataclass(frozen=True)
class DemoSplits:
    """Examples of a demo task; no text occurs twice, within a split or across.

    Args:
        train: queries of training prompts.
        demonstrations: the pool that every prompt draws its demonstrations from.
        test: the queries of test prompts.
    """

    train: list[Example]
    demonstrations: list[Example]
    test: list[Example]


def vocabulary() -> list[str]:
    """Return every word of the language once, in a fixed order, the colon included."""
    words = [":", *TEXT_PREFIXES, *TOPIC_PREFIXES, *MOOD_PREFIXES, *JOINERS, *LABEL_WORDS]
    for nouns_or_adjectives in (*TOPICS.values(), *MOODS.values()):
        words += nouns_or_adjectives
    return list(dict.fromkeys(words))


def plain_text(rng: random.Random, words: Sequence[str], length: int = 5) -> str:
    """Return a text with one trait: `length` words of a topic or a mood, one of them after a joiner."""
    chosen = rng.sample(words, length)
    chosen.insert(rng.randint(1, length - 1), rng.choice(JOINERS))
    return " ".join(chosen)


def mixed_text(rng: random.Random, topic: str, mood: str) -> str:
    """Return a text with a topic and a mood, six words long: "merry violin glad drum jolly flute"."""
    nouns, adjectives = rng.sample(TOPICS[topic], 3), rng.sample(MOODS[mood], 3)
    return " ".join(f"{adjective} {noun}" for adjective, noun in zip(adjectives, nouns, strict=True))


def pretraining_prompt(
    rng: random.Random, *, classes: int, demonstrations: int, mood_share: float, lengths: tuple[int, int] = (5, 5)
) -> tuple[Task, list[Example], Example]:
    """Draw a classification task, its demonstrations and a query, for pre-training.

    The classes are topics or moods; every text has the trait that is asked for and no other. Names of classes
    and prefixes are drawn anew, so that a class can only be told from the demonstrations.

    Args:
        rng: source of every draw.
        classes: number of classes.
        demonstrations: number of demonstrations.
        mood_share: probability that moods are asked for.
        lengths: least and most words of a text with the trait.

    Raises:
        ValueError: more classes than there are moods, a share outside 0 to 1, or lengths outside 2 to 10.
    """
    if not 2 <= classes <= len(MOODS):
        raise ValueError(f"classes must be 2 to {len(MOODS)}, the number of moods, got {classes}")
    if not 0 <= mood_share <= 1:
        raise ValueError(f"mood_share must be 0 to 1, got {mood_share}")
    least, most = lengths
    if not 2 <= least <= most <= 10:
        raise ValueError(f"lengths must rise within 2 to 10, the words of a mood, got {lengths}")
    asks_mood = rng.random() < mood_share
    traits, prefixes = (MOODS, MOOD_PREFIXES) if asks_mood else (TOPICS, TOPIC_PREFIXES)
    chosen = rng.sample(sorted(traits), classes)
    template = Template(f"{rng.choice(TEXT_PREFIXES)}:", f"{rng.choice(prefixes)}:")
    task = Task("pretraining", tuple(rng.sample(LABEL_WORDS, classes)), template)

    def example() -> Example:
        label = rng.randrange(classes)
        length = least if least == most else rng.randint(least, most)
        return Example(plain_text(rng, traits[chosen[label]], length), label)

    return task, [example() for _ in range(demonstrations)], example()


def demo_splits(
    seed: int = 0,
    *,
    task: Task = DEMO_TASK,
    train: int = 512,
    demonstrations: int = 2048,
    test: int = 1024,
) -> DemoSplits:
    """Draw disjoint examples of a demo task: texts with a topic and a mood, one of which is the class.

    Args:
        seed: of all draws.
        task: its labels are names of topics, or of moods.
        train: number of training queries.
        demonstrations: size of the demonstration pool.
        test: number of test queries.

    Raises:
        ValueError: a label of the task that is no topic (no mood, where others are), or a negative size.
    """
    traits, what = (MOODS, "moods") if set(task.labels) & set(MOODS) else (TOPICS, "topics")
    unknown = [label for label in task.labels if label not in traits]
    if unknown:
        raise ValueError(f"labels {unknown} are no {what}; choose among {', '.join(traits)}")
    sizes = {"train": train, "demonstrations": demonstrations, "test": test}
    stream = _distinct_examples(random.Random(seed), task)
    examples = [next(stream) for _ in range(sum(sizes.values()))]
    return DemoSplits(**split_examples(examples, sizes, seed))


def _distinct_examples(rng: random.Random, task: Task) -> Iterator[Example]:
    asks_mood = task.labels[0] in MOODS
    others = sorted(TOPICS if asks_mood else MOODS)
    seen = set()
    while True:
        label = rng.randrange(len(task.labels))
        traits = (task.labels[label], rng.choice(others))
        text = mixed_text(rng, *(reversed(traits) if asks_mood else traits))
        if text not in seen:
            seen.add(text)
            yield Example(text, label)
