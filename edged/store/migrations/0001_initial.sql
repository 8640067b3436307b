-- knowledge.db: documents, their chunks, vectors and keyword entries. They change together, in one transaction.

CREATE TABLE collections (
    id   INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE
) STRICT;

CREATE TABLE documents (
    collection_id INTEGER NOT NULL REFERENCES collections (id) ON DELETE CASCADE,
    id            TEXT NOT NULL,
    title         TEXT NOT NULL,
    format        TEXT NOT NULL,
    sha256        TEXT NOT NULL,    -- of title, format and text: what decides whether it must be read again
    text          TEXT NOT NULL,
    bytes         INTEGER NOT NULL, -- of the text in UTF-8
    embedder      TEXT NOT NULL,
    added_at      REAL NOT NULL,    -- Unix time, seconds
    PRIMARY KEY (collection_id, id)
) STRICT;

CREATE TABLE chunks (
    id            INTEGER PRIMARY KEY AUTOINCREMENT, -- never given twice: citations and indexes outlive a chunk
    collection_id INTEGER NOT NULL,
    document_id   TEXT NOT NULL,
    ordinal       INTEGER NOT NULL,
    headings      TEXT NOT NULL,    -- JSON array, the outermost first
    sentences     BLOB NOT NULL,    -- msgpack: [[text, start, end], ...], offsets in characters of the document
    UNIQUE (collection_id, document_id, ordinal),
    FOREIGN KEY (collection_id, document_id) REFERENCES documents (collection_id, id) ON DELETE CASCADE
) STRICT;

CREATE TABLE vectors (
    chunk_id         INTEGER PRIMARY KEY REFERENCES chunks (id) ON DELETE CASCADE,
    embedder         TEXT NOT NULL,
    dimensions       INTEGER NOT NULL,
    vector           BLOB NOT NULL, -- float32, little-endian
    sentence_vectors BLOB NOT NULL  -- float16, little-endian, one row of `dimensions` per sentence
) STRICT;

-- Its text is prepared by edged.store.keywords.index_text; the rowid is the chunk's id.
CREATE VIRTUAL TABLE chunks_fts USING fts5 (
    headings, -- title and headings
    text,
    tokenize = 'porter unicode61 remove_diacritics 2'
);

-- Foreign keys do not reach virtual tables.
CREATE TRIGGER chunks_fts_delete AFTER DELETE ON chunks BEGIN
    DELETE FROM chunks_fts WHERE rowid = old.id;
END;
