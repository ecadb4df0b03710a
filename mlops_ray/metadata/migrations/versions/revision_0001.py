"""Runs, their steps, events."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "runs",
        sa.Column("run_id", sa.String, primary_key=True),
        sa.Column("project", sa.String, nullable=False, index=True),
        sa.Column("workflow", sa.String, nullable=False),
        sa.Column("status", sa.String, nullable=False),
        sa.Column("config_digest", sa.String, nullable=False),
        sa.Column("started_at", sa.String, nullable=False),
        sa.Column("ended_at", sa.String),
        sa.Column("owner", sa.String, nullable=False),
        sa.Column("config", sa.Text, nullable=False),
        sa.Column("provenance", sa.Text, nullable=False),
    )
    op.create_table(
        "steps",
        sa.Column("run_id", sa.String, primary_key=True),
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("status", sa.String, nullable=False),
        sa.Column("key", sa.String, index=True),
        sa.Column("output", sa.Text),
        sa.Column("started_at", sa.String),
        sa.Column("ended_at", sa.String),
        sa.Column("rows", sa.Integer),
        sa.Column("message", sa.Text),
        sa.Column("metrics", sa.Text, nullable=False),
        sa.Column("params", sa.Text, nullable=False),
    )
    op.create_table(
        "events",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("at", sa.String, nullable=False),
        sa.Column("project", sa.String, nullable=False, index=True),
        sa.Column("run_id", sa.String, index=True),
        sa.Column("step", sa.String),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("data", sa.Text, nullable=False),
    )
