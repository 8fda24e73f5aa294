"""The JSON of a cache: manifest, plan, commits; and the statistics that calibration froze."""
