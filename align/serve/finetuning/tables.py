"""Tables of the fine-tuning API."""

MIGRATIONS = (
    """
    CREATE TABLE files (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        owner INTEGER NOT NULL REFERENCES tokens (id),
        filename TEXT NOT NULL,
        purpose TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        created_at INTEGER NOT NULL,
        expires_at INTEGER
    );
    CREATE TABLE uploads (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        owner INTEGER NOT NULL REFERENCES tokens (id),
        filename TEXT NOT NULL,
        purpose TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        created_at INTEGER NOT NULL,
        status TEXT NOT NULL DEFAULT 'pending',
        file TEXT
    );
    CREATE TABLE parts (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        upload TEXT NOT NULL REFERENCES uploads (id),
        bytes INTEGER NOT NULL,
        created_at INTEGER NOT NULL
    );
    CREATE TABLE jobs (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        owner INTEGER NOT NULL REFERENCES tokens (id),
        created_at INTEGER NOT NULL,
        finished_at INTEGER,
        status TEXT NOT NULL,
        model TEXT NOT NULL,
        request TEXT NOT NULL,
        seed INTEGER NOT NULL,
        error TEXT,
        fine_tuned_model TEXT UNIQUE,
        trained_tokens INTEGER,
        result_file TEXT,
        deleted INTEGER NOT NULL DEFAULT 0,
        device TEXT,
        pid INTEGER,
        started TEXT,
        attempts INTEGER NOT NULL DEFAULT 0
    );
    CREATE INDEX jobs_by_status ON jobs (status);
    CREATE TABLE events (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        job TEXT NOT NULL REFERENCES jobs (id),
        created_at INTEGER NOT NULL,
        level TEXT NOT NULL,
        message TEXT NOT NULL,
        type TEXT NOT NULL,
        data TEXT,
        step INTEGER,
        UNIQUE (job, step)
    );
    CREATE TABLE checkpoints (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        job TEXT NOT NULL REFERENCES jobs (id),
        name TEXT NOT NULL UNIQUE,
        step INTEGER NOT NULL,
        metrics TEXT NOT NULL,
        created_at INTEGER NOT NULL
    );
    CREATE TABLE permissions (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        checkpoint TEXT NOT NULL REFERENCES checkpoints (name),
        project TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        UNIQUE (checkpoint, project)
    );
    CREATE TABLE attempts (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        owner INTEGER NOT NULL REFERENCES tokens (id),
        route TEXT NOT NULL,
        fingerprint TEXT NOT NULL,
        retry INTEGER NOT NULL,
        key TEXT,
        answer TEXT,
        replaced INTEGER NOT NULL DEFAULT 0,
        created_at REAL NOT NULL
    );
    CREATE TABLE webhooks (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        owner INTEGER NOT NULL REFERENCES tokens (id),
        url TEXT NOT NULL,
        secret TEXT NOT NULL,
        events TEXT NOT NULL,
        created_at INTEGER NOT NULL
    );
    CREATE TABLE deliveries (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        webhook TEXT NOT NULL REFERENCES webhooks (id),
        event TEXT NOT NULL,
        body TEXT NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 0,
        done INTEGER NOT NULL DEFAULT 0,
        next_at REAL NOT NULL
    );
    CREATE INDEX attempts_by_request ON attempts (owner, route, fingerprint);
    CREATE INDEX attempts_by_key ON attempts (owner, key);
    """,
    """
    ALTER TABLE jobs ADD COLUMN asked INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE jobs ADD COLUMN unchecked INTEGER NOT NULL DEFAULT 0;
    """,
    """
    ALTER TABLE uploads ADD COLUMN expires_s INTEGER;
    """,
)
"""Each area has its own list; see ``Store.migrate``."""
RECIPE_JOB = "recipe"
"""Method of a job that runs a recipe which exists, such as one on labels."""
