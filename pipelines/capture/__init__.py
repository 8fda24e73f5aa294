"""From sources to a sealed cache: `job` runs `part`, workers run `unit`, `seal` comes last."""
