"""What a person sees: phases, progress and tables."""
