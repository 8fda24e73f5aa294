"""Opening, loading and saving checkpoints; int8 weights; cutting students out of a teacher."""
