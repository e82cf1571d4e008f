"""How a plan writes amounts of memory: in decimal gigabytes, as clouds and data sheets do."""


def gigabytes(num_bytes: int) -> str:
    """ "14.5 GB", "0.50 GB"."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.1f} GB"
