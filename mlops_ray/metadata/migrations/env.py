"""Where alembic starts: runs the migrations in the transaction that it is given."""

from alembic import context

from mlops_ray.metadata.schema import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
context.run_migrations()
