-- An event is open while it has no outcome; the transaction that sets the outcome stores the answer and, where
-- somebody waits for it on a topic, the outgoing message.
CREATE TABLE events (
    seq         INTEGER PRIMARY KEY AUTOINCREMENT,
    id          TEXT NOT NULL UNIQUE,
    source      TEXT NOT NULL,
    topic       TEXT NOT NULL,
    delivery    TEXT,              -- names one transmission, so that its redelivery is recognised
    payload     BLOB NOT NULL,
    reply_topic TEXT NOT NULL,
    correlation BLOB,
    received_at REAL NOT NULL,     -- Unix time, seconds, as all times here
    urgent_at   REAL NOT NULL,     -- the smallest goes first
    answer_by   REAL,
    expires_at  REAL,
    outcome     TEXT,
    closed_at   REAL
) STRICT;

CREATE INDEX events_open ON events (urgent_at, seq) WHERE outcome IS NULL;
CREATE INDEX events_closed ON events (closed_at) WHERE outcome IS NOT NULL;
CREATE INDEX events_delivery ON events (delivery) WHERE delivery IS NOT NULL;

CREATE TABLE answers (
    id         TEXT PRIMARY KEY,
    event_id   TEXT NOT NULL UNIQUE REFERENCES events (id) ON DELETE CASCADE,
    body       BLOB NOT NULL,
    created_at REAL NOT NULL
) STRICT;

CREATE TABLE outbox (
    seq         INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id    TEXT NOT NULL REFERENCES events (id) ON DELETE CASCADE,
    topic       TEXT NOT NULL,
    correlation BLOB,
    body        BLOB NOT NULL,
    created_at  REAL NOT NULL
) STRICT;

CREATE INDEX outbox_event ON outbox (event_id);

CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;
