"""What is sampled, and how: the job in plain values, what it asks of its networks, and the making in blocks."""
