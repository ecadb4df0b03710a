"""The ledger's tables. Instants are ISO 8601 text in UTC to the microsecond, which sorts as text.

A change here needs a new revision below ``migrations/versions``, and ``REVISION`` names the newest.
"""

from __future__ import annotations

import sqlalchemy as sa

REVISION = "0002"
"""The revision that these tables are."""

METADATA = sa.MetaData()

RUNS = sa.Table(
    "runs",
    METADATA,
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
    sa.Column("reason", sa.Text, nullable=False, server_default="by hand"),
)

STEPS = sa.Table(
    "steps",
    METADATA,
    sa.Column("run_id", sa.String, primary_key=True),
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("item", sa.Integer, primary_key=True, autoincrement=False, server_default="-1"),
    sa.Column("position", sa.Integer, nullable=False, server_default="0"),
    sa.Column("status", sa.String, nullable=False),
    sa.Column("key", sa.String),
    sa.Column("output", sa.Text),
    sa.Column("started_at", sa.String),
    sa.Column("ended_at", sa.String),
    sa.Column("attempt", sa.Integer, nullable=False, server_default="0"),
    sa.Column("rows", sa.BigInteger),
    sa.Column("message", sa.Text),
    sa.Column("error", sa.Text),
    sa.Column("node", sa.String),
    sa.Column("metrics", sa.Text, nullable=False, server_default="{}"),
    sa.Column("params", sa.Text, nullable=False, server_default="{}"),
    sa.Index("ix_steps_key", "key", "ended_at"),
)

EVENTS = sa.Table(
    "events",
    METADATA,
    sa.Column(
        "id",
        sa.BigInteger().with_variant(sa.Integer, "sqlite"),
        primary_key=True,
        autoincrement=True,
    ),
    sa.Column("at", sa.String, nullable=False),
    sa.Column("project", sa.String, nullable=False, index=True),
    sa.Column("run_id", sa.String, index=True),
    sa.Column("step", sa.String),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("data", sa.Text, nullable=False),
)

KEYS = sa.Table(
    "keys",
    METADATA,
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("parts", sa.Text, nullable=False),
)

LINKS = sa.Table(
    "links",
    METADATA,
    sa.Column("run_id", sa.String, primary_key=True),
    sa.Column("step", sa.String, primary_key=True),
    sa.Column("direction", sa.String, primary_key=True),
    sa.Column("kind", sa.String, primary_key=True),
    sa.Column("name", sa.String, primary_key=True),
    sa.Index("ix_links_kind_name", "kind", "name"),
)

LEASES = sa.Table(
    "leases",
    METADATA,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("owner", sa.String, nullable=False),
    sa.Column("token", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.String, nullable=False),
)

FIRINGS = sa.Table(
    "firings",
    METADATA,
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("project", sa.String, nullable=False, index=True),
    sa.Column("trigger", sa.String, nullable=False),
    sa.Column("at", sa.String, nullable=False),
    sa.Column("status", sa.String, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False, server_default="0"),
    sa.Column("job", sa.String),
    sa.Column("reason", sa.Text, nullable=False, server_default=sa.text("''")),
    sa.Column("data", sa.Text, nullable=False, server_default="{}"),
)

REQUESTS = sa.Table(
    "requests",
    METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("at", sa.String, nullable=False, index=True),
    sa.Column("reply", sa.Text, nullable=False),
)
