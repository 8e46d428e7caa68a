"""The xAR network and its mathematics: no distributed code, no files."""
