"""From a journal into PostgreSQL: records become transactions, and every record meets its fate exactly once."""
