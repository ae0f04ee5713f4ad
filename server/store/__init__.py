"""What must survive: the data directory and the database in it."""
