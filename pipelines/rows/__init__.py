"""From corpus files to rows: find, read, mark, tokenise, pack and write them."""
