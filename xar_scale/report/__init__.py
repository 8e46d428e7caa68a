"""Build one page about a run from its folder: contents (read, incidents, artifacts), curves, page."""
