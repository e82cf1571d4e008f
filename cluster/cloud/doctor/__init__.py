"""`tramontane doctor`: whether machines can serve, found out by looking and by trying; `read_` gathers facts, `judge` weighs them."""
