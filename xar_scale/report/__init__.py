"""One page about a run, from its folder alone: what it holds (read, trouble, kept), its curves, and the page."""
