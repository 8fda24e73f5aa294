"""`init`: first settings for a teacher and a corpus, after looking at both."""
