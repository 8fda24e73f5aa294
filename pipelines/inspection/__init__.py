"""`inspect`: a cache's contents as tables, one row in the terminal or as a web page."""
