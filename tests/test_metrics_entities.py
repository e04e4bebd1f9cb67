"""Scores of whole entities, against counting by hand and a second implementation."""

import random

import pytest

from limbeck.metrics import entities, entity_scores

TAGS = ["O", "B-A", "I-A", "B-B", "I-B"]


def naive(tags):
    """Every span that begins where an entity begins and ends where it is not continued."""

    def begins(i):
        kind = tags[i][2:]
        before = tags[i - 1][2:] if i and tags[i - 1] != "O" else None
        return tags[i].startswith("B") or (tags[i].startswith("I") and before != kind)

    found = set()
    for start in range(len(tags)):
        if tags[start] == "O" or not begins(start):
            continue
        end = start + 1
        while end < len(tags) and tags[end] == f"I-{tags[start][2:]}":
            end += 1
        found.add((tags[start][2:], start, end))
    return found


def test_entities_are_those_of_a_second_way_to_find_them():
    generator = random.Random(0)
    for _ in range(300):
        tags = generator.choices(TAGS, k=generator.randint(0, 8))
        assert entities(tags) == naive(tags)


@pytest.mark.parametrize(
    ("predicted", "labels", "scores"),
    [
        ([["B-A", "I-A"]], [["B-A", "I-A"]], (1, 1, 1)),
        ([["B-A", "O"]], [["B-A", "I-A"]], (0, 0, 0)),
        ([["O", "O"]], [["O", "O"]], (0, 0, 0)),
        ([["B-A", "B-B"], ["O"]], [["B-A", "O"], ["B-A"]], (0.5, 0.5, 0.5)),
        ([["B-A", "B-B", "B-A"]], [["B-A", "O", "O"]], (1 / 3, 1, 0.5)),
    ],
)
def test_scores_by_hand(predicted, labels, scores):
    assert tuple(entity_scores(predicted, labels).values()) == pytest.approx(scores)
