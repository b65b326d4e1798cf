-- One server's durable state. Every value is the canonical encoding of the core (quorum::codec),
-- except shares, which are encrypted under the server's storage key.

-- What this database belongs to, and where its state stands.
CREATE TABLE meta (
    name  TEXT PRIMARY KEY NOT NULL,
    value BLOB NOT NULL
) WITHOUT ROWID;

-- The ordering log: what was accepted, prepared and committed at each sequence number. A batch stands
-- beside its votes only where it is not the accepted one.
CREATE TABLE slots (
    sequence        INTEGER PRIMARY KEY NOT NULL,
    accepted        BLOB,
    accepted_batch  BLOB,
    prepared        BLOB,
    prepared_batch  BLOB,
    committed       BLOB,
    committed_batch BLOB
);

-- The authenticated map's entries as of meta 'checkpoint'.
CREATE TABLE leaves (
    key   BLOB PRIMARY KEY NOT NULL,
    value BLOB NOT NULL
) WITHOUT ROWID;

-- This server's share of each secret; NULL where a deposit held none that opens.
CREATE TABLE shares (
    secret INTEGER PRIMARY KEY NOT NULL,
    epoch  INTEGER NOT NULL,
    share  BLOB
);
