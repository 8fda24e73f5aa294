"""`align`: a cache for students with another tokenizer, made of a sealed cache."""
