"""What a search may try: reading it, and refusing it before anything is trained."""

import pytest

from limbeck.recipe import Recipe
from limbeck.search import Space, default_space
from limbeck.search.distributions import Distribution
from limbeck.search.records import PEERS, weakness
from limbeck.search.space import depths, with_values


def recipe(**changes):
    made = Recipe.parse({"task": "glue/rte", "teacher": "bert", "student": "layers:1,3,5", **changes})
    return made.resolved(regression=False)


@pytest.mark.parametrize(
    ("text", "ends", "count"),
    [
        ("uniform(0, 1)", (0.0, 1.0), None),
        ("loguniform(1e-5, 5e-4)", (1e-5, 5e-4), None),
        (" int( 2, 6 ) ", (2, 6), 5),
        ("logint(8, 64)", (8, 64), 57),
        ("choice([1, 3, 5], [2, 5], [4])", ([1, 3, 5], [2, 5], [4]), 3),
        ("choice(mse, cosine)", ("mse", "cosine"), 2),
        ("choice(true, null, 1e-3)", (True, None, 1e-3), 3),
        ("uniform(0.5, 0.5)", (0.5,), 1),
    ],
)
def test_distributions_are_read(text, ends, count):
    found = Distribution.parse(text)
    assert found.ends == ends
    assert found.count == count
    assert Distribution.parse(str(found)) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("loguniform 1 20", "is no distribution"),
        (3, "is no distribution"),
        ("normal(0, 1)", "unknown distribution 'normal'"),
        ("uniform(2, 1)", r"begins at 2 above its end 1; write uniform\(1, 2\)"),
        ("uniform(1)", "needs two numbers"),
        ("uniform(1, 2, 3)", "needs two numbers"),
        ("uniform(0, .inf)", "needs two numbers"),
        ("int(a, 2)", "needs two numbers"),
        ("int(1.5, 2)", "is of whole numbers"),
        ("loguniform(0, 1)", "logarithmic, and 0 is not above 0"),
        ("choice()", "nothing to choose from"),
        ("choice([1], [2], [1])", r"names \[1\] twice"),
        ("choice([1, 2)", "cannot be read"),
    ],
)
def test_distributions_that_are_none(text, said):
    with pytest.raises(ValueError, match=said):
        Distribution.parse(text)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({}, "the search space is empty"),
        ({"training": {}}, "the search space is empty"),
        ({"training.epoch": "int(2, 6)"}, r"no 'training.epoch'; did you mean 'training.epochs'"),
        ({"terms.kd.temprature": "uniform(1, 2)"}, "did you mean 'terms.kd.temperature'"),
        ({"terms.kdd.weight": "uniform(1, 2)"}, "did you mean 'terms.kd.weight'"),
        ({"training.learning_rate": "uniform(-1, 1)"}, "refuses training.learning_rate=-1.0"),
        ({"training.optimizer": "choice(adamw, lion)"}, 'refuses training.optimizer="lion"'),
        ({"student.layers": "choice([1], x)"}, 'refuses student.layers="x"'),
        ({"student.model": "choice(some/model)"}, "either layers"),
        ({"terms.kd": "choice(1)", "terms.kd.weight": "uniform(0, 1)"}, "terms.kd.weight is a part of terms.kd"),
        ({"training.epochs": "int(1, 2)", "training.steps": "int(1, 2)"}, "counts for nothing beside"),
        ({"task.holdout": "uniform(0.1, 0.2)"}, "task.holdout is not for a search: it says which data"),
        ({"teacher.training.epochs": "int(1, 2)"}, "one teacher, which is fine-tuned once"),
        ({"cache.dtype": "choice(fp16)"}, "share what the teacher said"),
        ({"training.seed": "int(0, 9)"}, "the best seed is luck"),
        ({"training.time_limit": "int(1, 9)"}, "--time-limit"),
        ({"terms.kd.temperature": "loguniform(1"}, "quotation marks"),
    ],
)
def test_spaces_that_are_refused(written, said):
    with pytest.raises(ValueError, match=said):
        Space.parse(written).check(recipe())


def test_a_few_logits_are_kept_at_fixed_temperatures():
    space = Space.parse({"terms.kd.temperature": "uniform(1, 4)"})
    space.check(recipe())
    with pytest.raises(ValueError, match=r"cache.logits=topk keeps a few logits at fixed ones"):
        space.check(recipe(cache={"logits": "topk"}))


def test_epochs_count_for_nothing_beside_steps_of_the_recipe():
    with pytest.raises(ValueError, match=r"beside training\.steps"):
        Space.parse({"training.epochs": "int(1, 2)"}).check(recipe(training={"steps": 5}))


def test_a_path_that_is_dotted_and_nested_is_refused():
    with pytest.raises(ValueError, match=r"names training\.epochs twice, dotted and nested"):
        Space.parse({"training.epochs": "int(1, 2)", "training": {"epochs": "int(3, 4)"}})


def test_dotted_and_nested_paths_are_the_same():
    nested = {"terms": {"kd": {"temperature": "uniform(1, 2)", "weight": "uniform(0, 1)"}}}
    dotted = {"terms.kd.temperature": "uniform(1, 2)", "terms.kd.weight": "uniform(0, 1)"}
    assert Space.parse(nested) == Space.parse(dotted)


def test_a_recipe_does_not_see_the_part_search():
    plain = {"task": "glue/rte", "teacher": "bert", "student": "layers:1"}
    searched = {**plain, "search": {"training.epochs": "int(1, 2)"}}
    assert Recipe.parse(searched) == Recipe.parse(plain)
    assert Recipe.parse(searched, ["search.training.steps=int(1, 2)"]) == Recipe.parse(plain)


def test_values_are_set_where_they_stand_or_may_stand():
    changed = with_values(
        recipe(),
        {
            "student.layers": [0, 5],
            "student.shrink.share": 0.5,
            "terms.kd.temperature": 7.5,
            "training.optimizer_options.eps": 1e-7,
        },
    )
    assert changed.student.layers == (0, 5)
    assert changed.student.shrink.share == 0.5
    assert changed.terms["kd"].model_extra["temperature"] == 7.5
    assert changed.training.optimizer_options == {"eps": 1e-7}
    assert with_values(recipe(), {}) == recipe()


def test_the_default_space_lies_around_the_recipe():
    own = recipe(training={"learning_rate": 1e-4, "epochs": 4})
    space = default_space(own, layers=6)
    space.check(own)
    assert set(space.distributions) == {
        *("student.layers", "training.learning_rate", "training.epochs", "terms.kd.temperature"),
        *("terms.labels.weight", "terms.hidden.weight"),
    }
    assert space.own_values(own)["student.layers"] == [1, 3, 5]
    assert default_space(recipe(training={"steps": 7}), 0).written()["training.steps"] == "logint(3, 14)"


def test_the_recipes_own_values_come_first_only_if_they_are_in_the_space():
    inside = Space.parse({"training.epochs": "int(2, 6)", "terms.kd.temperature": "uniform(1, 4)"})
    outside = Space.parse({"training.epochs": "int(4, 6)"})
    assert inside.own_values(recipe()) == {"training.epochs": 3.0, "terms.kd.temperature": 2.0}
    assert outside.own_values(recipe()) is None
    of_the_loss = recipe(terms={"kd": {"loss": "forward_kl"}})
    assert inside.own_values(of_the_loss) == {"training.epochs": 3.0, "terms.kd.temperature": 1.0}


@pytest.mark.parametrize("layers", range(1, 25))
def test_depths_are_spaced_and_end_with_the_last_layer(layers):
    for taken in depths(layers, [0]):
        assert taken == sorted(set(taken))
        assert taken == [0] or taken[-1] == layers - 1
        gaps = [b - a for a, b in zip([-1, *taken], taken, strict=False)]
        assert taken == [0] or max(gaps) - min(gaps) <= 1


def test_architectures_are_all_combinations_of_a_few_choices():
    space = Space.parse(
        {
            "student.layers": "choice([1], [2])",
            "student.shrink.share": "choice(0.5, 0.25)",
            "training.epochs": "int(1, 9)",
        }
    )
    assert len(space.architectures()) == 4
    assert Space.parse({"student.shrink.share": "uniform(0.2, 0.5)"}).architectures() == []


def naive(share, score, cost, peers, higher):
    """The rule once more, by counting: given up if the median of those that cost no more is better."""
    scores = []
    for own, history in peers:
        before = [s for at, s in history if at <= share + 0.01]
        if own <= cost and before:
            scores.append(before[-1])
    if len(scores) < PEERS:
        return False
    ordered, half = sorted(scores), len(scores) // 2
    median = ordered[half] if len(scores) % 2 else (ordered[half - 1] + ordered[half]) / 2
    return score < median if higher else score > median


@pytest.mark.parametrize("seed", range(40))
def test_weak_trials_are_those_of_the_rule(seed):
    import random

    draw = random.Random(seed)
    peers = []
    for _ in range(draw.randint(0, 9)):
        shares = sorted(draw.choices([0.2, 0.4, 0.6, 0.8, 1.0], k=draw.randint(0, 4)))
        peers.append((draw.randint(1, 3), [(share, draw.randint(0, 9) / 10) for share in shares]))
    for higher in (True, False):
        case = (draw.choice([0.2, 0.4, 0.6]), draw.randint(0, 9) / 10, draw.randint(1, 3), peers, higher)
        assert bool(weakness(*case)) == naive(*case)


def test_a_cheap_student_is_not_given_up_for_dear_ones():
    dear = [(9.0, [(0.2, 0.9)])] * 10
    assert not weakness(0.2, 0.1, 1.0, dear, True)
    assert weakness(0.2, 0.1, 9.0, dear, True)


def test_the_recipe_itself_lies_in_its_default_space():
    """Whatever it says: else it would not be among the candidates."""
    terms = {"kd": {"loss": "forward_kl", "temperature": 20.0}, "cold": {"loss": "forward_kl", "temperature": 0.5}}
    own = recipe(terms=terms)
    space = default_space(own, layers=6)
    assert space.own_values(own)["terms.kd.temperature"] == 20.0
    assert space.own_values(own)["terms.cold.temperature"] == 0.5
