"""What a run takes before it starts: memory, time and cost of the ways to run it, and the cheapest that fits."""
