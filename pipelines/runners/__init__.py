"""Running the steps of a job: on a Beam runner, or on a pool of processes of this machine."""
