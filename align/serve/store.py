"""The server's database: one SQLite file, whose transactions survive a kill."""

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from align.core.errors import ArtifactError

DATABASE = "serve.sqlite"
BUSY_S = 30.0
"""Seconds that a writer waits for one of another process."""
MAX_IDLE = 32
"""Connections that are kept open for the next block of work."""
LEDGER = """
CREATE TABLE IF NOT EXISTS migrations (
    area TEXT NOT NULL,
    number INTEGER NOT NULL,
    applied_at REAL NOT NULL DEFAULT ((julianday('now') - 2440587.5) * 86400.0),
    PRIMARY KEY (area, number)
)
"""


class Store:
    """A SQLite database in a folder; every block of work has a connection of its own.

    Args:
        folder: created if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        # Files of users and the key of the sessions are nobody else's business.
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path = folder / DATABASE
        self.path.touch(mode=0o600)
        self._idle: list[sqlite3.Connection] = []
        self._writing = threading.Lock()
        self._writer: int | None = None

    @contextmanager
    def write(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """Yield a connection inside a transaction that is committed unless the block raises.

        Args:
            durable: whether the commit survives a loss of power at once. Otherwise it does as
                soon as a durable commit follows. Both survive the end of the process.

        Raises:
            RuntimeError: the thread is writing already, and would wait for itself.
        """
        if self._writer == threading.get_ident():
            raise RuntimeError("Store.write() inside of Store.write(): pass on the connection")
        # SQLite's writers wait by sleeping longer and longer, so one of many could wait for long.
        with self._turn(), self._connected() as db:
            db.execute("PRAGMA query_only = OFF")
            db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait until no other thread is writing."""
        with self._writing:
            self._writer = threading.get_ident()
            try:
                yield
            finally:
                self._writer = None

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection that sees one state of the database and cannot write."""
        with self._connected() as db:
            db.execute("PRAGMA query_only = ON")
            db.execute("BEGIN")
            try:
                yield db
            finally:
                db.execute("ROLLBACK")

    def migrate(self, area: str, migrations: Sequence[str]) -> None:
        """Apply the migrations of an area that are not applied yet, in one transaction.

        Args:
            area: its name; areas count their migrations independently.
            migrations: SQL statements, each text is one migration. Never change one that was
                released; append another.

        Raises:
            ArtifactError: a newer version of the server has written the database.
        """
        with self.write() as db:
            db.execute(LEDGER)
            query = "SELECT count(*) FROM migrations WHERE area = ?"
            (done,) = db.execute(query, (area,)).fetchone()
            if done > len(migrations):
                raise ArtifactError(
                    f"{self.path}: {area} has version {done}, this installation knows versions up "
                    f"to {len(migrations)}. Install a newer align-suite."
                )
            for number, script in enumerate(migrations[done:], start=done + 1):
                for statement in _statements(script):
                    db.execute(statement)
                db.execute("INSERT INTO migrations (area, number) VALUES (?, ?)", (area, number))

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """Yield an idle connection, or a new one: opening it takes longer than most queries."""
        try:
            db = self._idle.pop()
        except IndexError:
            db = self._open()
        try:
            yield db
        finally:
            # One that could not even roll back is not used again.
            if db.in_transaction or len(self._idle) >= MAX_IDLE:
                db.close()
            else:
                self._idle.append(db)

    def close(self) -> None:
        """Close the idle connections; the store can still be used."""
        while self._idle:
            self._idle.pop().close()

    def _open(self) -> sqlite3.Connection:
        # The next block may run in another thread, but never two at the same time.
        db = sqlite3.connect(
            self.path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
        )
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA foreign_keys = ON")
        return db


def _statements(script: str) -> Iterator[str]:
    """Yield the statements of a script; ``executescript`` would end the transaction."""
    statement = ""
    for part in script.split(";"):
        statement += part + ";"
        if sqlite3.complete_statement(statement):
            if statement.strip(" \n;"):
                yield statement
            statement = ""
