"""Corpus → rows: sources, documents, chats, packing, tokenising."""
