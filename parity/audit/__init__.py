"""Whether a path does what it says of itself: its factors moved one by one, and its fitness to be judged."""
