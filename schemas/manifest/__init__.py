"""The JSON of a cache (request, plan, commits, manifest) and the statistics from calibration."""
