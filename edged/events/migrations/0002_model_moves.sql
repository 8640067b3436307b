-- Which models serve, and how they came to: written by edged.serving.moves.

CREATE TABLE model_rollouts (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    role       TEXT NOT NULL,    -- chat or embed
    model      TEXT NOT NULL,    -- the candidate's name in the catalogue
    options    TEXT NOT NULL,    -- JSON
    started_at REAL NOT NULL,    -- Unix time, seconds
    ended_at   REAL,
    outcome    TEXT,             -- NULL while it goes on
    reason     TEXT NOT NULL DEFAULT '',
    evidence   TEXT NOT NULL DEFAULT '{}'  -- JSON: what was compared
) STRICT;

CREATE TABLE model_moves (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    rollout_id INTEGER REFERENCES model_rollouts (id) ON DELETE SET NULL, -- NULL: made at a start of the daemon
    role       TEXT NOT NULL,
    model      TEXT NOT NULL,    -- identity
    old        TEXT,
    new        TEXT NOT NULL,
    reason     TEXT NOT NULL,
    moved_at   REAL NOT NULL
) STRICT;

CREATE INDEX model_moves_model ON model_moves (role, model, seq);

-- What was activated last, and what the configuration named at that time.
CREATE TABLE model_choices (
    role       TEXT PRIMARY KEY,
    model      TEXT NOT NULL,
    configured TEXT NOT NULL,
    previous   TEXT,             -- what rolling back brings again
    chosen_at  REAL NOT NULL
) STRICT, WITHOUT ROWID;
