-- Vectors of a candidate embedder while it re-embeds what is stored; the switch moves them to vectors in one transaction.
CREATE TABLE staged_vectors (
    chunk_id         INTEGER PRIMARY KEY REFERENCES chunks (id) ON DELETE CASCADE,
    embedder         TEXT NOT NULL,
    dimensions       INTEGER NOT NULL,
    vector           BLOB NOT NULL,
    sentence_vectors BLOB NOT NULL
) STRICT;

CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;
