"""PostgreSQL: the schema and its migrations, the embedded server, and what the server's errors mean.

Only the modules in here (and the migrations) import asyncpg, SQLAlchemy or Alembic.
"""
