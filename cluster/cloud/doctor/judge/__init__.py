"""What facts mean: pure functions from `facts` to findings, each with its remedy. They look at nothing themselves."""
