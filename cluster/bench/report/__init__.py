"""What a benchmark found, as a table, JSON, plots and a page. Each reads the same results and measures nothing."""
