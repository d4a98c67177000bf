"""The log of decisions: idempotent, in order, whole or not at all, on both databases."""

from calling_ai.store.decisions import DecisionLog, Written, example_decisions, example_outcomes


def test_there_and_back(log: DecisionLog) -> None:
    frame = example_decisions(200)
    outcomes = example_outcomes(frame)
    assert log.record_frame(frame) == Written(200, 200, 0)
    assert log.record_frame(frame) == Written(200, 0, 200)
    assert log.record_outcomes(outcomes).written == len(outcomes)
    assert log.record_outcomes(outcomes).repeated == len(outcomes)
    back = log.decisions()
    for name in back.columns.intersection(frame.columns):
        assert back[name].tolist() == frame[name].tolist() or (back[name].isna() == frame[name].isna()).all(), name
