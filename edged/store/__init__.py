"""The SQLite files, and the in-memory indexes derived from them."""
