"""The coupon survey as a table of the contract: nothing from the future, nothing from others, nothing unknown."""

import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import calling_ai.world
from calling_ai.core.contract import FEATURE_NAMES, feature_table
from calling_ai.core.errors import InputError, NotFoundError
from calling_ai.world.coupons import MAPPING, PRIOR, coupons, made_up_survey

SURVEY = made_up_survey(12, seed=3)


def written(survey: pd.DataFrame, folder: Path, name: str = "survey.csv.gz") -> Path:
    """Write a survey and return its path."""
    survey.to_csv(folder / name, index=False)
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for surveys."""
    return tmp_path_factory.mktemp("surveys")


def test_the_module_and_its_function_have_one_name(folder: Path) -> None:
    from calling_ai.world import coupons as door

    path = written(SURVEY, folder)
    assert isinstance(door, types.ModuleType) and door is calling_ai.world.coupons
    pd.testing.assert_frame_equal(door(path), coupons(path))  # type: ignore[operator]
    pd.testing.assert_frame_equal(calling_ai.world.coupons(path, history=False), coupons(path, history=False))  # type: ignore[operator]
    with pytest.raises(AttributeError, match="has no attribute 'vouchers'"):
        _ = calling_ai.world.vouchers  # type: ignore[attr-defined]


def test_it_passes_the_contract_and_can_be_learned_from(folder: Path) -> None:
    from calling_ai.operate.candidates import labelled_rows

    frame = coupons(written(SURVEY, folder))
    table = feature_table(frame)
    assert len(table) == len(SURVEY) == 240
    given_features = {name for name in FEATURE_NAMES if name not in table.missing_by_feature}
    assert given_features >= {name for name in MAPPING if name.startswith(("context_", "timing_", "spot_"))}
    rows = labelled_rows(frame, "outcome")
    assert_array_equal(rows.target, SURVEY["Y"].to_numpy(float))
    assert frame.groupby("user_id")["decided_at"].apply(lambda times: times.is_monotonic_increasing).all()
    assert (frame["received_at"] > frame["decided_at"]).all()
    assert coupons(written(SURVEY, folder), history=False)[list(FEATURE_NAMES[39:])].isna().all(axis=None)


@settings(max_examples=12)
@given(row=st.integers(0, 239))
def test_an_answer_changes_only_what_comes_after_it_for_the_same_person(row: int, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    place = tmp_path_factory.getbasetemp()
    changed = SURVEY.assign(Y=np.where(np.arange(240) == row, 1 - SURVEY["Y"], SURVEY["Y"]))
    before, after = (
        feature_table(coupons(written(survey, place, name))).values
        for survey, name in ((SURVEY, "before.csv"), (changed, "after.csv"))
    )
    different = ~np.isclose(before, after, equal_nan=True).all(axis=1)
    later = (SURVEY["respondent"] == SURVEY["respondent"][row]).to_numpy() & (np.arange(240) > row)
    assert not different[~later].any()
    assert different[later].all()


def test_history_against_a_loop(folder: Path) -> None:
    frame = coupons(written(SURVEY, folder))
    for row in range(0, 240, 7):
        earlier = [i for i in range(row) if SURVEY["respondent"][i] == SURVEY["respondent"][row]]
        found = frame.iloc[row]
        assert found["history_interaction_count"] == len(earlier) / 100
        if not earlier:
            assert np.isnan(found["history_past_positive_rate"])
            continue
        overall = (sum(SURVEY["Y"][i] for i in earlier) + 2 * PRIOR) / (len(earlier) + 2)
        alike = [SURVEY["Y"][i] for i in earlier if SURVEY["coupon"][i] == SURVEY["coupon"][row]]
        valid = [SURVEY["Y"][i] for i in earlier if SURVEY["expiration"][i] == SURVEY["expiration"][row]]
        assert_allclose(found["history_past_positive_rate"], overall)
        assert_allclose(found["history_average_engagement"], (sum(alike) + overall) / (len(alike) + 1))
        assert_allclose(found["history_past_negative_rate"], 1 - (sum(valid) + 2 * overall) / (len(valid) + 2))


def test_rows_of_another_part_do_not_matter(folder: Path) -> None:
    """The same people alone give the same rows, so that a hidden part is mapped as the known one was."""
    whole = coupons(written(SURVEY, folder))
    some = SURVEY[SURVEY["respondent"] % 3 == 0]
    alone = coupons(written(some, folder, "some.csv"))
    names = list(FEATURE_NAMES)
    assert_array_equal(alone[names].to_numpy(), whole.loc[some.index, names].to_numpy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coupon": "Cinema"}, "kinds of coupon are Bar"),
        ({"age": "42"}, "'42' is not an answer"),
        ({"CoffeeHouse": "always"}, "row 0, column CoffeeHouse"),
    ],
)
def test_unknown_answers_are_named(change: dict[str, str], message: str, folder: Path) -> None:
    with pytest.raises(InputError, match=message):
        coupons(written(SURVEY.assign(**change), folder, "bad.csv"))


def test_other_files_are_refused(folder: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no such file"):
        coupons(folder / "nowhere.csv")
    with pytest.raises(InputError, match="it is not the coupon survey"):
        coupons(written(pd.DataFrame({"a": [1]}), folder, "other.csv"))


@pytest.mark.slow
def test_real_people_are_foreseen(shared: Path, tmp_path: Path) -> None:
    """A quarter of the people held out, through the same functions and the same file format as in production."""
    from calling_ai.models.evaluation import auc, log_loss
    from calling_ai.operate.candidates import fit, labelled_rows, predict

    frame = coupons(shared / "data" / "in_vehicle_coupons.csv.gz")
    assert len(frame) == 10_076 and frame["user_id"].nunique() == 454
    people = pd.unique(frame["user_id"])
    held = frame["user_id"].isin(np.random.default_rng(5).permutation(people)[:114]).to_numpy()
    candidate = fit(labelled_rows(frame[~held], "outcome"), "outcome", tmp_path, replicates=20)
    known = feature_table(frame[held]).values
    unseen = known.copy()
    unseen[:, 39:] = np.nan
    positive = (frame.loc[held, "outcome_score"] >= 0.7).to_numpy(float)
    with_history, without = (predict(candidate.file, "outcome", features) for features in (known, unseen))
    # The bars are 0.81 and 0.75 over many people; a quarter of them differs by about 0.015 either way.
    assert auc(with_history, positive) > 0.79 and auc(without, positive) > 0.73
    assert log_loss(without, positive) < 0.61
    called = with_history > 0.7
    assert called.mean() > 0.3 and positive[called].mean() > 0.77
