"""One page about a run, from its folder alone: what it holds (read, incidents, artifacts), its curves, and the page."""
