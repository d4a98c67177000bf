"""The decision log: decisions, outcomes, exposures, and what is kept of people who asked to be forgotten."""

import sqlalchemy as sa
from alembic import op

from calling_ai.store.revisions.tools import identifier, make_table, protect, release, remove_table, text, time

revision, down_revision = "0002", "0001"
branch_labels = depends_on = None

FEATURES = """
    user_exploration_eagerness user_community_orientation user_location_adventurousness
    user_authenticity_preference user_trust_network_reliance user_temporal_flexibility user_energy_preference
    user_novelty_seeking user_value_orientation user_crowd_tolerance user_social_preference user_overall_energy
    spot_exploration_eagerness spot_community_orientation spot_location_adventurousness
    spot_authenticity_preference spot_trust_network_reliance spot_temporal_flexibility spot_energy_preference
    spot_novelty_seeking spot_value_orientation spot_crowd_tolerance spot_social_preference spot_overall_energy
    context_location_proximity context_journey_alignment context_user_receptivity
    context_opportunity_availability context_network_effects context_community_patterns context_social_context
    context_weather_context context_event_context context_accessibility_context timing_optimal_time_of_day
    timing_optimal_day_of_week timing_user_patterns timing_opportunity_timing timing_seasonal_timing
    history_past_positive_rate history_past_negative_rate history_average_engagement history_interaction_count
    history_time_since_last_positive history_activity_level assessment_developmental assessment_educational
    assessment_social assessment_cultural assessment_risk trend_emerging trend_community trend_cultural
    trend_life_pattern
"""
TERMS = """
    vibe_compatibility connection fulfilment positive_influence trajectory life_betterment context_factor timing_factor
    formula_score
"""
TABLES = ("decisions", "outcomes", "exposures", "forgotten", "forgotten_decisions", "erasing", "facts")

CURRENT = """
CREATE VIEW current_outcomes AS
SELECT id, decision_id, outcome_type, outcome_score, action, happened_at, received_at, corrects
FROM (
    SELECT message.*, row_number() OVER (PARTITION BY decision_id ORDER BY happened_at DESC, id DESC) AS place
    FROM outcomes AS message
    WHERE NOT EXISTS (
        SELECT 1 FROM outcomes AS correction
        WHERE correction.corrects = message.id AND correction.decision_id = message.decision_id
    )
) AS ranked
WHERE place = 1
"""


def numbers(names: str, nullable: bool = True) -> list[sa.Column]:
    """Return columns of numbers."""
    return [sa.Column(name, sa.Double(), nullable=nullable) for name in names.split()]


def texts(names: str, nullable: bool = True) -> list[sa.Column]:
    """Return columns of texts."""
    return [sa.Column(name, text(), nullable=nullable) for name in names.split()]


def flag(name: str) -> sa.Column:
    """Return a column that is true or false."""
    return sa.Column(name, sa.Boolean(), nullable=False)


def upgrade() -> None:
    """Create the tables, or give those that were set aside their names back."""
    if make_table(
        "decisions",
        sa.Column("id", identifier(), nullable=False),
        sa.Column("decided_at", time(), nullable=False),
        sa.Column("recorded_at", time(), nullable=False),
        *texts("user_key opportunity_id", nullable=False),
        flag("refused"),
        *numbers(FEATURES),
        *numbers(TERMS, nullable=False),
        *numbers("network_score outcome_probability"),
        *texts("confidence"),
        *numbers("hybrid_score boosted_score weight calling_score", nullable=False),
        flag("called"),
        *numbers("propensity", nullable=False),
        flag("explored"),
        *numbers("gate threshold exploration", nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        *texts("policy_version calling_score_version outcome_version release_version experiment arm stage"),
        *texts("path", nullable=False),
        *texts("reason"),
        *numbers("latency_us"),
        sa.PrimaryKeyConstraint("id", name="pk_decisions"),
    ):
        op.create_index("ix_decisions_decided_at", "decisions", ["decided_at"])
        op.create_index("ix_decisions_user_key", "decisions", ["user_key", "decided_at"])
    if make_table(
        "outcomes",
        *texts("id", nullable=False),
        sa.Column("decision_id", identifier(), nullable=False),
        *texts("outcome_type", nullable=False),
        *numbers("outcome_score", nullable=False),
        *texts("action"),
        sa.Column("happened_at", time(), nullable=False),
        sa.Column("received_at", time(), nullable=False),
        *texts("corrects"),
        sa.PrimaryKeyConstraint("id", name="pk_outcomes"),
        sa.CheckConstraint("outcome_type IN ('positive', 'neutral', 'negative')", name="ck_outcomes_outcome_type"),
        sa.CheckConstraint("outcome_score BETWEEN 0 AND 1", name="ck_outcomes_outcome_score"),
    ):
        op.create_index("ix_outcomes_decision_id", "outcomes", ["decision_id"])
        some = sa.text("corrects IS NOT NULL")
        op.create_index("ix_outcomes_corrects", "outcomes", ["corrects"], sqlite_where=some, postgresql_where=some)
    if make_table(
        "exposures",
        *texts("experiment stage user_key arm", nullable=False),
        sa.Column("exposed_at", time(), nullable=False),
        sa.Column("decision_id", identifier()),
        *numbers("share"),
        sa.PrimaryKeyConstraint("experiment", "stage", "user_key", name="pk_exposures"),
    ):
        op.create_index("ix_exposures_user_key", "exposures", ["user_key"])
    make_table(
        "forgotten",
        *texts("user_key", nullable=False),
        sa.Column("forgotten_at", time(), nullable=False),
        sa.PrimaryKeyConstraint("user_key", name="pk_forgotten"),
    )
    make_table(
        "forgotten_decisions",
        sa.Column("decision_id", identifier(), nullable=False),
        sa.PrimaryKeyConstraint("decision_id", name="pk_forgotten_decisions"),
    )
    make_table("erasing", *texts("user_key", nullable=False), sa.PrimaryKeyConstraint("user_key", name="pk_erasing"))
    make_table("facts", *texts("name value", nullable=False), sa.PrimaryKeyConstraint("name", name="pk_facts"))
    op.execute(CURRENT)
    erased = "EXISTS (SELECT 1 FROM erasing WHERE erasing.user_key = OLD.user_key)"
    protect("decisions", unless=erased)
    protect("exposures", unless=erased)
    gone = "EXISTS (SELECT 1 FROM forgotten_decisions WHERE forgotten_decisions.decision_id = OLD.decision_id)"
    protect("outcomes", unless=gone)
    protect("forgotten")
    protect("forgotten_decisions")


def downgrade() -> None:
    """Remove the tables; those with rows are set aside."""
    op.execute("DROP VIEW current_outcomes")
    for table in TABLES:
        release(table)
    for table in TABLES:
        remove_table(table)
