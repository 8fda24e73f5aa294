"""Files of a cache: their names, hashes, checksums, and how to write all of one or nothing."""
