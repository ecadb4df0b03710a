"""Calls of mapped steps, attempts and errors; keys, links, leases, firings, requests."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_KEPT = (
    "run_id, name, position, status, key, output, started_at, ended_at, rows, message, metrics, "
    "params"
)


def upgrade() -> None:
    """Change and make the tables."""
    reason = sa.Column("reason", sa.Text, nullable=False, server_default="by hand")
    op.add_column("runs", reason)
    if op.get_context().dialect.name == "postgresql":
        op.alter_column("events", "id", type_=sa.BigInteger)
    _change_steps()
    _make_tables_of_memory()
    _make_tables_of_ownership()


def _change_steps() -> None:
    # SQLite cannot change a primary key, so on both databases the table is made anew.
    op.execute("CREATE TABLE steps_0001 AS SELECT * FROM steps")
    op.drop_table("steps")
    op.create_table(
        "steps",
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
    )
    op.create_index("ix_steps_key", "steps", ["key", "ended_at"])
    op.execute(f"INSERT INTO steps ({_KEPT}) SELECT {_KEPT} FROM steps_0001")
    op.drop_table("steps_0001")


def _make_tables_of_memory() -> None:
    op.create_table(
        "keys",
        sa.Column("key", sa.String, primary_key=True),
        sa.Column("parts", sa.Text, nullable=False),
    )
    op.create_table(
        "links",
        sa.Column("run_id", sa.String, primary_key=True),
        sa.Column("step", sa.String, primary_key=True),
        sa.Column("direction", sa.String, primary_key=True),
        sa.Column("kind", sa.String, primary_key=True),
        sa.Column("name", sa.String, primary_key=True),
    )
    op.create_index("ix_links_kind_name", "links", ["kind", "name"])


def _make_tables_of_ownership() -> None:
    op.create_table(
        "leases",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("owner", sa.String, nullable=False),
        sa.Column("token", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.String, nullable=False),
    )
    op.create_table(
        "firings",
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
    op.create_table(
        "requests",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("at", sa.String, nullable=False, index=True),
        sa.Column("reply", sa.Text, nullable=False),
    )
