"""`verify`: a sealed cache is compared with its manifest, file by file, and with its teacher."""
