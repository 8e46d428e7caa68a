"""The xAR network and its mathematics: no processes, no files."""
