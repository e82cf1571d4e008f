"""What a step computes, decided without torch: requests, the scheduler, and how long steps take."""
