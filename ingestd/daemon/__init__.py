"""The daemon: what runs from the sources to the database, what it tells others, and how it starts and stops."""
