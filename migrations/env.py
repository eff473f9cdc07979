"""What Alembic runs around the migrations: in the connection, and the transaction, that `ingestd.store.migrate` opened.

There is no alembic.ini and no other way in: `ingestd db …` is the command.
"""

from __future__ import annotations

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    version_table=context.config.attributes["version_table"],
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
