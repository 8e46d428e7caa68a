"""Planning before a run starts: memory, time and cost of the candidate configurations, and the cheapest that fits."""
