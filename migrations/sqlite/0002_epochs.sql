-- What is secret changes with every epoch and is encrypted under a storage key that does not outlive it
-- (kds-server/src/at_rest.rs).

-- What a restart must not lose: keys that open deposits, contributions to the next epoch's seeds.
CREATE TABLE vault (
    key   BLOB PRIMARY KEY NOT NULL,
    value BLOB NOT NULL
) WITHOUT ROWID;

-- What has happened to this server's shares since the share file was written last.
CREATE TABLE share_log (
    number    INTEGER PRIMARY KEY NOT NULL,
    operation BLOB NOT NULL
);
DROP TABLE shares;
