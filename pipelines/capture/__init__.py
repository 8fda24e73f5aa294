"""From sources to a sealed cache. Order of the calls: job, part_directories, part (with step_inputs
and disk_space), remaining_units, teacher_lease, unit, seal; for a sealed cache, addition."""
