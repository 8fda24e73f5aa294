"""`verify`: a sealed cache held against its manifest, and what it holds against the teacher."""
