"""The files of a cache: names, hashes, checksums, and atomic writing."""
