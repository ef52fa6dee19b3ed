"""The head profile: its file, finding one, comparing two, importing and exporting."""
