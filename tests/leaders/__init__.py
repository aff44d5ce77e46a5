"""Several syncd on one PostgreSQL, whose leaders are killed and frozen."""
