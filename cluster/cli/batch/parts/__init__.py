"""Parts: one input split over several jobs, each with its own output, and how they are merged."""
