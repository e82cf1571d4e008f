"""Where the machines come from: what a model needs of them, whether they are fit for it, and when a cloud takes them away."""
